"""Files and folders that are written whole: what a failure, a kill and the umask leave behind."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ilora.files import folder_written_whole, previous_folder, remove_unfinished, written_whole


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
