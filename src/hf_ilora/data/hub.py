"""Reads data sets from a folder or from the Hub."""

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_ilora.files import previous_folder
from hf_ilora.models.next_item.hub_upload import client_message

_Data = TypeVar("_Data")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def read_folder_or_hub(
    source: str | os.PathLike,
    patterns: Collection[str],
    read: Callable[[Path], _Data],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> _Data:
    """Read a data set from a folder, or download it from the Hub first.

    Args:
        source: a folder, or "user/name" on the Hub. A local folder of that name takes precedence.
        patterns: which files to download, such as "*.parquet".
        read: reads a folder; raises FileNotFoundError or ValueError.
        revision, token, cache_dir, local_files_only: as in `download_dataset`; only for the Hub.

    Raises:
        ValueError: a revision is given for a folder; otherwise as `download_dataset` and `read`.
        FileNotFoundError, PermissionError, OSError: as `download_dataset` and `read`.
    """
    if not is_hub_name(source):
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {source} is a folder: expected a data set on the Hub; leave revision "
                "out"
            )
        return read(Path(source))
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    folder = download_dataset(source, patterns, **hub)
    try:
        return read(folder)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"{source} on the Hub: {error}; ask its owner, or load another revision; if the files were damaged here, "
            f"delete {folder} and load again"
        ) from error


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether `source` is a string like "user/name" and not a local file or folder, not even an interrupted save."""
    if not isinstance(source, str) or _HUB_NAME.fullmatch(source) is None:
        return False
    return not Path(source).exists() and not previous_folder(Path(source).resolve()).exists()


def download_dataset(
    name: str,
    patterns: Collection[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download the files of a data set on the Hub that its cache lacks.

    Args:
        name: "user/name".
        patterns: which files, such as "*.parquet".
        revision: branch, tag or commit; None for main.
        token: None uses HF_TOKEN or the token of `hf auth login`.
        cache_dir: folder of the cache; None for the default cache of huggingface_hub.
        local_files_only: read only the cache, as with HF_HUB_OFFLINE=1 and when the Hub does not answer.

    Returns:
        The folder in the cache.

    Raises:
        FileNotFoundError: there is no such data set, or the Hub cannot be reached and the cache lacks it.
        PermissionError: the Hub does not accept the token.
        ValueError: there is no such revision.
        OSError: the download fails.
    """
    expected = "expected a folder or a data set on the Hub"
    try:
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=sorted(patterns),
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a folder, the Hub cannot be reached, and its cache lacks the data set "
            f"({client_message(error)}): {expected}; check the path, the network and HF_HUB_OFFLINE"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r}: expected a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a folder, and the Hub has no such data set for this token ({client_message(error)}): "
            f"{expected}; prepare the data first, check the spelling, or pass token= if it is private or gated"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub does not let this token read {name} ({client_message(error)}): expected a token with read "
                "access; log in with `hf auth login`, set HF_TOKEN, or pass token="
            ) from error
        raise OSError(f"{name} could not be downloaded ({client_message(error)}): load it again later") from error
    except httpx2.TransportError as error:
        raise OSError(
            f"the connection failed while downloading {name} ({client_message(error)}): load it again"
        ) from error
    return Path(folder)


__all__ = ["download_dataset", "is_hub_name", "read_folder_or_hub"]
