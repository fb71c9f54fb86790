import hashlib
import re
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from hf_ilora.downloads import ChecksumError, DownloadError, default_cache_dir, download_file, download_wheel

CONTENT = bytes(range(256)) * 1000  # 256,000 bytes
CHECKSUM = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture
def fetch(server, tmp_path):
    """Call download_file against the server, without long pauses."""
    server.content = CONTENT
    destination = tmp_path / "cache" / "file.zip"

    def call(**settings):
        settings = {"checksum": CHECKSUM, "attempts": 3, "backoff_seconds": 0.01, "read_timeout": 5.0} | settings
        return download_file(f"{server.url}/file.zip", destination, **settings)

    call.destination = destination
    call.part = destination.with_name("file.zip.part")
    return call


def test_a_file_arrives_whole_and_leaves_no_part_behind(fetch):
    assert fetch() == fetch.destination
    assert fetch.destination.read_bytes() == CONTENT
    assert not fetch.part.exists()


def test_an_md5_checksum_is_accepted_too(fetch):
    assert fetch(checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}").read_bytes() == CONTENT


def test_a_file_in_the_cache_is_not_downloaded_again(fetch, server):
    fetch()
    fetch()
    assert len(server.ranges_asked) == 1


def test_a_cut_connection_is_resumed_where_it_broke_off(fetch, server):
    server.cuts = [100_000]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-"]


def test_a_half_download_never_counts_as_whole_and_a_later_call_resumes_it(fetch, server):
    server.cuts = [100_000]
    with pytest.raises(DownloadError, match=r"gave up after 1 failures in a row .*100,000 bytes in .*try again"):
        fetch(attempts=1)
    assert not fetch.destination.exists()
    assert fetch.part.read_bytes() == CONTENT[:100_000]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-"]


def test_a_server_without_range_support_is_started_anew(fetch, server):
    server.ranges = False
    server.cuts = [100_000]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-"]


def test_an_answer_with_another_range_than_asked_is_not_appended(fetch, server):
    server.wrong_range = True
    server.cuts = [100_000]
    assert fetch().read_bytes() == CONTENT
    assert server.ranges_asked == [None, "bytes=100000-", None]


def test_a_part_that_was_complete_is_only_checked(fetch, server):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(CONTENT)
    assert fetch().read_bytes() == CONTENT
    assert server.ranges_asked == [f"bytes={len(CONTENT)}-"]


def test_attempts_count_failures_without_progress_only(fetch, server):
    server.cuts = [50_000] * 5
    assert fetch(attempts=2).read_bytes() == CONTENT
    assert len(server.ranges_asked) == 6


def test_a_503_is_tried_again(fetch, server):
    server.statuses = [503, 503]
    assert fetch().read_bytes() == CONTENT


def test_a_lasting_503_is_an_error_after_the_attempts(fetch, server):
    server.statuses = [503] * 10
    with pytest.raises(DownloadError, match=r"gave up after 3 failures in a row .*503"):
        fetch()
    assert len(server.ranges_asked) == 3
    assert not fetch.destination.exists()


def test_a_404_is_an_error_at_once(fetch, server):
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"answered 404.*expected 200: check the address"):
        fetch()
    assert len(server.ranges_asked) == 1


def test_wrong_bytes_are_deleted_and_the_error_names_both_checksums(fetch, server):
    server.content = b"<html>log in first</html>"
    actual = hashlib.sha256(server.content).hexdigest()
    expected = CHECKSUM.removeprefix("sha256:")
    with pytest.raises(ChecksumError, match=f"is {actual}, expected {expected}.*Try again"):
        fetch()
    assert not fetch.destination.exists()
    assert not fetch.part.exists()
    server.content = CONTENT
    assert fetch().read_bytes() == CONTENT


def test_a_damaged_part_is_deleted_when_its_checksum_is_wrong(fetch):
    fetch.part.parent.mkdir()
    fetch.part.write_bytes(b"other bytes")
    with pytest.raises(ChecksumError):
        fetch()
    assert fetch().read_bytes() == CONTENT


def test_a_redirect_is_followed(fetch, server):
    server.redirect_to = f"{server.url}/elsewhere"
    assert fetch().read_bytes() == CONTENT


def test_a_silent_server_times_out(fetch, server):
    server.silent.set()
    start = time.monotonic()
    with pytest.raises(DownloadError, match="ReadTimeout"):
        fetch(attempts=2, read_timeout=0.2)
    assert time.monotonic() - start < 3


def test_an_unreachable_address_fails_in_seconds(dead_url, tmp_path):
    start = time.monotonic()
    with pytest.raises(DownloadError, match="ConnectError"):
        download_file(f"{dead_url}/file", tmp_path / "file", checksum=CHECKSUM, attempts=2, backoff_seconds=0.01)
    assert time.monotonic() - start < 3


def test_callers_at_the_same_time_share_one_download(fetch, server):
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetch.destination.read_bytes() == CONTENT
    assert len(server.ranges_asked) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("HF_ILORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "hf_ilora"


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with one wheel."""
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    wheel = folder / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinydata/rows.txt", "1 2 3")
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def test_a_wheel_comes_through_pip_with_pips_own_configuration(wheelhouse, tmp_path):
    content = wheelhouse.read_bytes()
    destination = tmp_path / "cache" / wheelhouse.name
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert download_wheel("tinydata==1.0", destination, checksum=checksum).read_bytes() == content
    wheelhouse.unlink()
    assert download_wheel("tinydata==1.0", destination, checksum=checksum) == destination  # the cache


def test_a_wheel_with_another_checksum_is_refused(wheelhouse, tmp_path):
    destination = tmp_path / "cache" / wheelhouse.name
    with pytest.raises(ChecksumError, match=r"tinydata==1\.0: sha256 .* expected 00"):
        download_wheel("tinydata==1.0", destination, checksum="sha256:00")
    assert not list(destination.parent.rglob("*.whl"))


def test_pips_failure_is_reported_in_its_own_words(wheelhouse, tmp_path):
    with pytest.raises(DownloadError, match=r"(?s)exited with code 1 .*index configuration.*No matching distribution"):
        download_wheel("missingdata==1.0", tmp_path / "missingdata-1.0-py3-none-any.whl", checksum="sha256:00")


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(DownloadError, match=f"{re.escape(python)} has no module pip.*-m ensurepip.*save the wheel"):
        download_wheel("tinydata==1.0", tmp_path / "tinydata-1.0-py3-none-any.whl", checksum="sha256:00")
