"""Files and folders that are written whole: what a failure, a kill and the umask leave behind; and who may write."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_ilora import files
from hf_ilora.files import (
    LOCK_FILE,
    folder_written_whole,
    held_folder,
    previous_folder,
    remove_folder,
    remove_unfinished,
    written_whole,
)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    earlier = os.umask(request.param)
    yield request.param
    os.umask(earlier)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def killed_in(block: str, path) -> None:
    """Run `block`, an unfinished write of `path` that kills its own process."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from hf_ilora.files import folder_written_whole, written_whole\n"
        f"path = Path(sys.argv[1])\n{block}"
    )
    finished = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert finished.returncode == -signal.SIGKILL


class TestFiles:
    def test_a_file_takes_its_name_at_the_end_of_the_block(self, tmp_path):
        path = tmp_path / "new" / "letter.txt"
        with written_whole(path) as unfinished:
            unfinished.write_text("finished")
            assert not path.exists()
            assert unfinished.suffix == ".txt"
        assert path.read_text() == "finished"
        assert os.listdir(path.parent) == ["letter.txt"]

    def test_an_error_leaves_the_earlier_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "letter.txt"
        path.write_text("earlier")
        with pytest.raises(OSError, match="No space left"), written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("No space left on device")
        assert path.read_text() == "earlier"
        assert os.listdir(tmp_path) == ["letter.txt"]

    @pytest.mark.parametrize("failure", [OSError(28, "No space"), SafetensorError("I/O error: x (os error 28)")])
    def test_an_error_of_the_file_system_names_the_file_whoever_writes_it(self, tmp_path, failure):
        for write, path in ((written_whole, tmp_path / "letter.txt"), (folder_written_whole, tmp_path / "letters")):
            with pytest.raises(OSError, match="No space") as raised, write(path):
                raise failure
            assert (raised.value.errno, raised.value.filename) == (28, str(path))
            failure = type(failure)(*failure.args)
        with pytest.raises(FileNotFoundError) as raised, written_whole(tmp_path / "letter.txt"):
            (tmp_path / "source.txt").read_text()
        assert raised.value.filename == str(tmp_path / "source.txt")

    def test_permissions_are_those_of_the_umask_whatever_the_writer_does(self, tmp_path, umask):
        with written_whole(tmp_path / "letter.txt") as unfinished:
            unfinished.write_text("text")
            unfinished.chmod(0o600)
        with written_whole(tmp_path / "weights.safetensors") as unfinished:
            save_file({"weight": torch.ones(2)}, unfinished)  # which creates its file for the owner alone
        for name in ("letter.txt", "weights.safetensors"):
            assert permissions(tmp_path / name) == 0o666 & ~umask
        assert load_file(tmp_path / "weights.safetensors")["weight"].tolist() == [1, 1]

    def test_a_private_leftover_of_the_same_process_id_leaves_no_permissions(self, tmp_path):
        with written_whole(tmp_path / "a.txt") as unfinished:
            name = unfinished
        name.touch(mode=0o600)
        with written_whole(tmp_path / "a.txt") as unfinished:
            unfinished.write_text("whole")
        (tmp_path / "plain").touch()
        assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_what_a_killed_process_leaves_is_recognised_and_removed(self, tmp_path):
        killed_in(
            "with written_whole(path) as unfinished:\n"
            "    unfinished.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)",
            tmp_path / "letter.txt",
        )
        (leftover,) = os.listdir(tmp_path)
        assert leftover.startswith(".letter.") and leftover.endswith(".unfinished.txt")
        remove_unfinished(tmp_path)
        assert os.listdir(tmp_path) == []


class TestFolders:
    def test_a_folder_takes_the_place_of_the_earlier_one_at_the_end_of_the_block(self, tmp_path):
        folder = tmp_path / "data"
        for content in ("first", "second"):
            with folder_written_whole(folder, ["letter.txt", "stale.txt"]) as unfinished:
                (unfinished / "letter.txt").write_text(content)
                assert not folder.exists() or (folder / "letter.txt").read_text() == "first"
            (folder / "stale.txt").touch()
        assert (folder / "letter.txt").read_text() == "second"
        with folder_written_whole(folder, ["letter.txt", "stale.txt"]):
            pass
        assert os.listdir(folder) == []
        assert os.listdir(tmp_path) == ["data"]

    def test_an_error_leaves_the_earlier_folder_and_nothing_else(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "letter.txt").write_text("earlier")
        with pytest.raises(OSError, match="No space left"), folder_written_whole(folder, ["letter.txt"]) as unfinished:
            (unfinished / "letter.txt").write_text("half")
            raise OSError("No space left on device")
        assert (folder / "letter.txt").read_text() == "earlier"
        assert os.listdir(tmp_path) == ["data"]

    def test_permissions_are_those_of_the_umask(self, tmp_path, umask):
        with folder_written_whole(tmp_path / "model") as unfinished:
            save_file({"weight": torch.ones(2)}, unfinished / "weights.safetensors")
            (unfinished / "more").mkdir()
            save_file({"weight": torch.ones(2)}, unfinished / "more" / "weights.safetensors")
        folder = tmp_path / "model"
        for path in (folder, folder / "more"):
            assert permissions(path) == 0o777 & ~umask
            assert permissions(path / "weights.safetensors") == 0o666 & ~umask

    def test_nothing_foreign_is_deleted(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        for name in ("a.txt", "b.txt", "c.txt", "d.txt", "letter.txt"):
            (folder / name).touch()
        message = "data contains a.txt, b.txt, c.txt and more: expected a new folder, an empty one or one that"
        with pytest.raises(ValueError, match=message), folder_written_whole(folder, ["letter.txt"]):
            pytest.fail("the block must not run")
        assert len(os.listdir(folder)) == 5
        with pytest.raises(ValueError, match=r"a\.txt is a file"), folder_written_whole(folder / "a.txt"):
            pytest.fail("the block must not run")

    def test_a_kill_between_the_renames_is_repaired_by_the_next_write(self, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "letter.txt").write_text("earlier")
        folder.rename(previous_folder(folder))
        with pytest.raises(OSError, match="No space left"), folder_written_whole(folder, ["letter.txt"]):
            raise OSError("No space left on device")
        assert (folder / "letter.txt").read_text() == "earlier"
        assert os.listdir(tmp_path) == ["data"]

    @pytest.mark.slow
    def test_what_killed_processes_left_of_one_folder_is_removed_and_nothing_else(self, tmp_path):
        for name in ("model-1.5", "other"):
            killed_in(
                "with folder_written_whole(path) as unfinished:\n"
                "    (unfinished / 'half.txt').touch()\n"
                "    os.kill(os.getpid(), signal.SIGKILL)",
                tmp_path / name,
            )
        (tmp_path / "model-1.5").mkdir()
        remove_unfinished(tmp_path, "model-1.5")
        kept, leftover = sorted(os.listdir(tmp_path), reverse=True)
        assert kept == "model-1.5"
        assert leftover.startswith(".other.") and leftover.endswith(".unfinished")


# --- one folder, one writer ---

HOLD = """
import runpy, sys
files = runpy.run_path(sys.argv[1])
with files["held_folder"](sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder):
    """A process that holds a folder until its standard input ends."""
    command = [sys.executable, "-c", HOLD, files.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_a_folder_has_one_writer_and_a_second_one_is_told_who_it_is(tmp_path):
    with holder(tmp_path / "run") as process:
        message = rf"run has another writer: process {process.pid} holds this folder since 20.* choose another output_d"
        for _ in range(2):  # being refused takes nothing from the holder
            with pytest.raises(ValueError, match=message), held_folder(tmp_path / "run"):
                pass
        with pytest.raises(ValueError, match=message):
            remove_folder(tmp_path / "run")
        assert (tmp_path / "run").is_dir()
        with held_folder(tmp_path / "other"):
            pass
    with held_folder(tmp_path / "run"):
        (tmp_path / "run" / "model").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    remove_folder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_holds_nothing_whatever_its_lock_file_says(tmp_path):
    with holder(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == process.pid
        with held_folder(tmp_path / "run"):
            pass
    # the file of a machine that shares the disk, on which our own number is that of another process
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps({"process": os.getpid(), "since": "x", "machine": "other"}))
    with held_folder(tmp_path / "run"):
        pass
    (tmp_path / "run" / LOCK_FILE).write_text("no JSON")
    with (
        held_folder(tmp_path / "run"),
        pytest.raises(ValueError, match="holds this folder since"),
        held_folder(tmp_path / "run"),
    ):
        pass


def test_a_new_folder_in_which_nothing_is_written_does_not_stay(tmp_path):
    with pytest.raises(RuntimeError), held_folder(tmp_path / "new"):
        raise RuntimeError
    (tmp_path / "old").mkdir()
    with held_folder(tmp_path / "old"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with held_folder(tmp_path / "gone"):
        shutil.rmtree(tmp_path / "gone")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="expected a folder; choose another output_dir"), held_folder(path):
            pass
