"""Reads zip archives of unknown origin in place, after checking every member."""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

MAX_UNPACKED_BYTES = 4 * 2**30  # the largest MovieLens release unpacks to about 1.2 GB
MAX_COMPRESSION_RATIO = 100  # ratings as text compress about 5:1, a zip bomb thousands to one


class ArchiveError(ValueError):
    """An archive is damaged or unsafe to read."""


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.Path]:
    """Open a zip archive or a wheel as a folder to read from; nothing is extracted to disk.

    Returns:
        The archive's root; valid inside the ``with`` block.

    Raises:
        ArchiveError: the file is not a complete zip archive; a member is damaged, encrypted or a link, or has an
            absolute path or one with ".."; or the declared sizes exceed the limits.
    """
    remedy = "delete the file and download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(path, member)
            unpacked = sum(member.file_size for member in archive.infolist())
            allowed = min(MAX_UNPACKED_BYTES, max(2**20, MAX_COMPRESSION_RATIO * path.stat().st_size))
            if unpacked > allowed:
                raise ArchiveError(
                    f"{path} declares {unpacked:,} bytes of unpacked files; expected at most {allowed:,} "
                    f"(the limit against zip bombs): {remedy} from a source you trust"
                )
            yield zipfile.Path(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(f"{path} is not a whole zip archive ({error}): {remedy}") from error


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename.replace("\\", "/")
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or ".." in PurePosixPath(name).parts:
        reason = "has a path outside of the archive"
    elif stat.S_ISLNK(member.external_attr >> 16):
        reason = "is a symbolic link"
    elif member.flag_bits & 0x1:
        reason = "is encrypted"
    else:
        return
    raise ArchiveError(
        f"{path}: member {member.filename!r} {reason}; expected plain files with relative paths. "
        "Do not use this archive: download it again from a source you trust"
    )
