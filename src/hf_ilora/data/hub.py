"""Data sets by folder or by their name on the Hub."""

import os
import re
from collections.abc import Collection
from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether `source` is a string like "user/name" and no file or folder."""
    return isinstance(source, str) and _HUB_NAME.fullmatch(source) is not None and not Path(source).exists()


def downloaded(
    name: str,
    patterns: Collection[str],
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download files of a data set on the Hub to its cache, as far as they are not there.

    Args:
        name: "user/name".
        patterns: of the files, such as "*.parquet".
        revision: branch, tag or commit; None for main.
        token: None uses HF_TOKEN or the token of `hf auth login`.
        cache_dir: None uses the cache of the Hub.
        local_files_only: read the cache alone, as with HF_HUB_OFFLINE=1 and when the Hub does not answer.

    Returns:
        The folder of the files in the cache.

    Raises:
        FileNotFoundError: when there is no such data set, or the Hub cannot be reached and the cache does not have it.
        PermissionError: when the token is not accepted.
        ValueError: when there is no such revision.
        OSError: when the download fails.
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
            f"{name} is no folder, the Hub cannot be reached, and its cache lacks the data set ({_told(error)}): "
            f"{expected}; check the path, the network and HF_HUB_OFFLINE"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r}: expected a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is no folder, and the Hub has no such data set for this token ({_told(error)}): {expected}; "
            "prepare the data first, check the spelling, or pass token= if it is private or gated"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub does not let this token read {name} ({_told(error)}): expected a token with read access; log "
                "in with `hf auth login`, set HF_TOKEN, or pass token="
            ) from error
        raise OSError(f"{name} could not be downloaded ({_told(error)}): load it again later") from error
    except httpx2.TransportError as error:
        raise OSError(f"the connection failed while downloading {name} ({_told(error)}): load it again") from error
    return Path(folder)


def hub_remedy(folder: Path) -> str:
    """What to do about downloaded files that are damaged or do not belong together."""
    return f"ask its owner, or load another revision; if the files were damaged here, delete {folder} and load again"


def _told(error: Exception) -> str:
    """The client's message of an error, in one line."""
    return " ".join(str(error).split())


__all__ = ["downloaded", "hub_remedy", "is_hub_name"]
