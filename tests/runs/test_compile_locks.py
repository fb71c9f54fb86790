"""DeepSpeed's first compilation: a lock that is left behind is an error, one that is held is waited for."""

import pytest

from hf_ilora import NextItemTrainingArguments
from hf_ilora.runs import parse_arguments
from hf_ilora.runs.compile_locks import check_compile_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm" / "lock"


def test_a_lock_that_nobody_holds_is_an_error_before_deepspeed_waits_for_it(lock, monkeypatch):
    check_compile_locks()
    lock.touch()
    with pytest.raises(ValueError, match=rf"{lock} is the lock of a compilation that was killed.* delete the file"):
        check_compile_locks()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="was killed"):
        parse_arguments((NextItemTrainingArguments,), ["--output_dir", "out"])


def test_a_lock_of_a_process_that_compiles_is_waited_for(lock):
    with lock.open("w"):
        check_compile_locks()
