import stat
import zipfile

import pytest

from hf_ilora.data import archives
from hf_ilora.data.archives import ArchiveError, open_archive


@pytest.fixture
def pack(tmp_path):
    """Write a zip from names (or ZipInfo) and contents."""

    def write(*members, compression=zipfile.ZIP_DEFLATED):
        path = tmp_path / "archive.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members:
                archive.writestr(name, content)
        return path

    return write


def test_members_are_read_in_place(pack, tmp_path):
    path = pack(("folder/a.txt", "one"), ("folder/deeper/b.txt", "two"))
    with open_archive(path) as root:
        assert (root / "folder" / "a.txt").read_text() == "one"
        assert (root / "folder" / "deeper" / "b.txt").read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_a_member_outside_the_archive_is_refused(pack, name):
    with (
        pytest.raises(ArchiveError, match=r"has a path outside of the archive; expected .*trust"),
        open_archive(pack(("ok.txt", "fine"), (name, "evil"))),
    ):
        pass


def test_a_symbolic_link_is_refused(pack):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ArchiveError, match="'link' is a symbolic link"), open_archive(pack((link, "/etc/passwd"))):
        pass


def test_an_encrypted_member_is_refused(pack):
    path = pack(("secret.txt", "x" * 10))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 0x1  # the flag in the central directory
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="is encrypted"), open_archive(path):
        pass


def test_a_bomb_is_refused_by_its_declared_size(pack, monkeypatch):
    path = pack(("zeros", b"\0" * 5_000_000))
    assert path.stat().st_size < 10_000
    with (
        pytest.raises(ArchiveError, match="declares 5,000,000 bytes of unpacked files; expected at most 1,048,576"),
        open_archive(path),
    ):
        pass
    monkeypatch.setattr(archives, "MAX_COMPRESSION_RATIO", 10_000)  # the control: the same file under another limit
    with open_archive(path) as root:
        assert len((root / "zeros").read_bytes()) == 5_000_000


def test_too_large_an_archive_is_refused(pack, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1000)
    path = pack(("a", "x" * 600), ("b", "y" * 600), compression=zipfile.ZIP_STORED)
    with (
        pytest.raises(ArchiveError, match="declares 1,200 bytes of unpacked files; expected at most 1,000"),
        open_archive(path),
    ):
        pass


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_zip_is_an_error_with_a_remedy(pack, part):
    path = pack(("a.txt", "some text " * 50), ("b.txt", "more text"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ArchiveError, match=r"is not a whole zip archive .*download it again"), open_archive(path):
        pass


def test_a_damaged_member_is_an_error_when_it_is_read(pack):
    path = pack(("a.txt", "abcdefgh" * 10), compression=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"abcdefgH", 1))
    with pytest.raises(ArchiveError, match="Bad CRC-32"), open_archive(path) as root:
        (root / "a.txt").read_bytes()
