"""Files and folders are written whole or not at all, whatever fails or kills the writer; a folder has one writer."""

import errno
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
from filelock import FileLock
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


PROGRAM = """
import os, runpy, signal, sys
from pathlib import Path
globals().update(runpy.run_path(sys.argv[1]))
path = Path(sys.argv[2])
"""
FILE = "with written_whole(path) as unfinished:\n    unfinished.write_text('half')\n    "
FOLDER = "with folder_written_whole(path) as unfinished:\n    (unfinished / 'half.txt').touch()\n    "


def killed_in(block: str, path) -> None:
    """Run `block`, an unfinished write of `path`, in a process that kills itself in it."""
    program = f"{PROGRAM}{block}os.kill(os.getpid(), signal.SIGKILL)"
    finished = subprocess.run([sys.executable, "-c", program, files.__file__, str(path)], check=False)
    assert finished.returncode == -signal.SIGKILL


@contextmanager
def writing(block: str, path):
    """A process in the middle of `block`, an unfinished write of `path`, which it finishes when this block ends."""
    command = [sys.executable, "-c", f"{PROGRAM}{block}print('writing', flush=True); sys.stdin.read()"]
    command += [files.__file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.stdin.close()


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
            save_file({"weight": torch.ones(2)}, unfinished)  # which creates files for the owner alone
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

    def test_what_a_killed_process_leaves_is_removed_by_the_next_write(self, tmp_path):
        for name in ("letter.txt", "letter.2.txt", "[*].txt"):
            killed_in(FILE, tmp_path / name)
        leftovers = os.listdir(tmp_path)
        assert len(leftovers) == 6 and all(name.startswith(".") for name in leftovers)
        with written_whole(tmp_path / "letter.txt") as unfinished:
            unfinished.write_text("whole")
        with written_whole(tmp_path / "[*].txt") as unfinished:
            unfinished.write_text("whole")
        left = {name for name in os.listdir(tmp_path) if not name.startswith(".letter.2.")}
        assert left == {"letter.txt", "[*].txt"}
        assert len(os.listdir(tmp_path)) == 4  # the leftover of another file stays until that file is written
        remove_unfinished(tmp_path)
        assert set(os.listdir(tmp_path)) == left

    def test_what_a_living_process_writes_stays(self, tmp_path):
        path = tmp_path / "letter.txt"
        with writing(FILE, path):
            remove_unfinished(tmp_path)
            with written_whole(path) as ours, written_whole(path) as again:
                ours.write_text("ours")
                again.write_text("again")
            assert path.read_text() == "ours"
            assert len(os.listdir(tmp_path)) == 3
        assert path.read_text() == "half"  # the process ran to its end
        assert os.listdir(tmp_path) == ["letter.txt"]

    def test_on_a_disk_without_locks_files_are_written_and_leftovers_stay(self, tmp_path, monkeypatch):
        killed_in(FILE, tmp_path / "letter.txt")

        def no_locks(*arguments, **settings):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(FileLock, "acquire", no_locks)
        with written_whole(tmp_path / "letter.txt") as unfinished:
            unfinished.write_text("whole")
        assert (tmp_path / "letter.txt").read_text() == "whole"
        assert len(os.listdir(tmp_path)) == 3


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

    def test_a_folder_with_other_files_is_not_replaced(self, tmp_path):
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

    def test_what_a_killed_process_left_of_this_folder_is_removed_and_nothing_else(self, tmp_path):
        for name in ("model-1.5", "model-1"):
            killed_in(FOLDER, tmp_path / name)
        (tmp_path / ".model-1.77.unfinished").mkdir()  # as earlier versions called it
        with folder_written_whole(tmp_path / "model-1"):
            pass
        kept, *leftovers = sorted(os.listdir(tmp_path), reverse=True)
        assert kept == "model-1"
        assert len(leftovers) == 2 and all(name.startswith(".model-1.5.") for name in leftovers)

    def test_what_a_living_process_writes_stays(self, tmp_path):
        with writing(FOLDER, tmp_path / "model"):
            with folder_written_whole(tmp_path / "model") as unfinished:
                (unfinished / "half.txt").touch()
            shutil.rmtree(tmp_path / "model")
        assert os.listdir(tmp_path) == ["model"]
        assert os.listdir(tmp_path / "model") == ["half.txt"]


# --- one folder, one writer ---

HOLD = "with held_folder(path):\n    "


def test_a_folder_has_one_writer_and_the_error_of_a_second_one_names_it(tmp_path):
    with writing(HOLD, tmp_path / "run") as process:
        message = rf"run is in use: process {process.pid} on .* writing there since 20.* choose another output_dir"
        for _ in range(2):  # a refused process does not break the lock
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
    with writing(HOLD, tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == process.pid
        with held_folder(tmp_path / "run"):
            pass
    # the lock file of another machine on the same disk, where our process id is that of another process
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps({"process": os.getpid(), "since": "x", "machine": "other"}))
    with held_folder(tmp_path / "run"):
        pass
    (tmp_path / "run" / LOCK_FILE).write_text("no JSON")
    with (
        held_folder(tmp_path / "run"),
        pytest.raises(ValueError, match="has been writing there since"),
        held_folder(tmp_path / "run"),
    ):
        pass


def test_a_new_folder_without_files_is_removed(tmp_path):
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
