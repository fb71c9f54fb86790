"""Uploads to the Hub: all files in one commit, with retries that never commit twice."""

import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import is_edited, is_untouched, measured_weights, model_card, newest_card, with_metadata
from .saved_model import weights_fingerprint

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
RUN_FILE = "run.json"
EVALUATE_AGAIN = "`hf-ilora evaluate` and `hf-ilora push` write a card with those of the new ones"
WAITS_SECONDS = (1.0, 3.0, 9.0)  # between attempts

_PUSH_AGAIN = "check the connection and push again; files that have arrived are not sent twice"
_CLIENT_LOGGER = logging.getLogger("huggingface_hub.utils._http")
_Result = TypeVar("_Result")
_UPLOAD_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "parent_commit")


class HubUploads:
    """Mixin for models whose `save_pretrained(push_to_hub=True)` uploads everything that it writes."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | str | None = None,
    ) -> CommitInfo:
        """Upload the model to the Hub in one commit, with its catalogue, its code and, if it has one, its tokenizer.

        An existing card is kept; otherwise one without measurements is added. For a card with measured results, see
        `hf_ilora.publishing`.

        Args:
            repo_id: "user/name"; created if it does not exist.
            commit_message, commit_description: title and body of the commit message.
            private: make a new repository private; None uses the Hub's setting.
            token: token for the Hub; None uses HF_TOKEN or the token of `hf auth login`.
            revision: branch; created from main if it does not exist.
            create_pr: propose the commit as a pull request.
            parent_commit: fail unless this is the latest commit of the branch.
            max_shard_size: as in transformers.
            tags: tags to add to the card.

        Returns:
            The commit, or the latest one when nothing has changed.

        Raises:
            PermissionError: when the token is missing, wrong, or may not write there.
            ValueError: when a private repository was requested and a public one exists, and when another commit is
                pushed during the upload.
            OSError: when the Hub cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder,
                push_to_hub=True,
                max_shard_size=max_shard_size,
                repo_id=repo_id,
                tags=tags,
                token=token,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent_commit,
            )


class UploadOfSaved:
    """Uploads the files that `save_pretrained` writes after this object is created.

    Args:
        save_directory: folder that `save_pretrained` writes to.
        arguments: keyword arguments of `save_pretrained`; those for the Hub are removed from this dictionary.
    """

    def __init__(self, save_directory: str | os.PathLike, arguments: dict):
        self.folder = Path(save_directory)
        self.is_main_process = arguments.get("is_main_process", True)
        self.repo_id = arguments.pop("repo_id", None) or self.folder.resolve().name
        check_repo_id(self.repo_id)
        self.token = arguments.pop("token", None)
        self.tags = checked_tags(arguments.pop("tags", None))
        self.arguments = {name: arguments.pop(name) for name in _UPLOAD_ARGUMENTS if name in arguments}
        self.before = self._states()

    def send(self, model, further_files: Mapping[str, bytes] | None = None) -> CommitInfo | None:
        """Upload the files written since this object was created, with README.md if the folder has it.

        A card on the Hub stays if it was edited by hand, or has the results of an evaluation of the same weights.

        Args:
            model: a model with a `config`, a `catalogue` and `model_tags`.
            further_files: contents by path in the repository.

        Returns:
            The commit, or None in processes other than the main one.
        """
        if not self.is_main_process:
            return None
        written = [path for path, state in self._states().items() if self.before.get(path) != state]
        files = {path.relative_to(self.folder).as_posix(): path for path in written} | dict(further_files or {})
        tags = [*(model.model_tags or []), *self.tags]
        own = self.folder / CARD_FILE

        def card(repo_id: str, existing: str | None) -> str:
            weights = weights_fingerprint(self.folder)
            if own.is_file():
                text = newest_card(own.read_text(encoding="utf-8"), existing, weights)
            elif existing is not None and (is_untouched(existing) or is_edited(existing)):
                text = existing
            else:
                revision = self.arguments.get("revision")
                text = newest_card(str(model_card(model.config, model.catalogue, repo_id, revision)), existing, weights)
            if measured_weights(text) not in (None, weights):
                logger.warning("the card of %s has the results of other weights: %s", repo_id, EVALUATE_AGAIN)
            return with_metadata(text, tags=tags) if tags else text

        return upload(files, self.repo_id, card=card, token=self.token, **self.arguments)

    def _states(self) -> dict[Path, tuple[int, int]]:
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in self.folder.rglob("*") if path.is_file()
        }


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    repo_type: str = "model",
    card: Callable[[str, str | None], str] | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Upload files to a repository in one commit; calling it again is safe.

    Files that have arrived are neither sent nor committed a second time.

    Args:
        files: path in the repository -> local path or content.
        repo_id: "user/name", or "name" of the token's user; created if it does not exist.
        repo_type: "model" or "dataset".
        card: function that makes README.md from the full repo_id and the repository's card (or None); None uploads the
            README.md in `files`, if any.
        commit_message, commit_description, private, token, revision, create_pr, parent_commit: as in
            `HubUploads.push_to_hub`.

    Returns:
        The commit, or the latest one when nothing has changed.

    Raises:
        PermissionError, ValueError, OSError: as in `HubUploads.push_to_hub`.
    """
    check_repo_id(repo_id)
    api, repository = HfApi(token=token), {"repo_type": repo_type}
    unsigned = _UnsignedUrls()
    _CLIENT_LOGGER.addFilter(unsigned)
    try:
        repo_id = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True, **repository)).repo_id
        if private and not api.repo_info(repo_id, **repository).private:
            raise ValueError(
                f"{repo_id} exists and is public: expected a private repository; choose another name, or change its "
                "visibility on the Hub first"
            )
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, **repository)
        head = api.repo_info(repo_id, revision=revision, **repository).sha
        if parent_commit is not None and head != parent_commit:
            raise ValueError(
                f"{revision or 'main'} of {repo_id} is at commit {head}: expected {parent_commit}, the parent_commit; "
                "check what has been committed since"
            )
        files = dict(files)
        if card is not None:
            files[CARD_FILE] = card(repo_id, _existing_card(api, repo_id, head, repo_type)).encode()

        def commit() -> CommitInfo:
            # A commit may have succeeded although its answer was lost. The client omits files that the branch already
            # has, and returns the latest commit if no file is left.
            operations = [CommitOperationAdd(path, content) for path, content in sorted(files.items())]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the catalogue
                return api.create_commit(
                    repo_id,
                    operations,
                    commit_message=commit_message or f"Upload {repo_type}",
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=head,
                    **repository,
                )

        # A pull request does not change the branch, from which one could see that the commit has succeeded.
        return commit() if create_pr else retried(commit)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 412:
            raise ValueError(
                f"somebody else committed to {repo_id} during the upload: expected no other commit; check it and push "
                "again"
            ) from error
        if status in (401, 403):
            raise PermissionError(
                f"the Hub does not let this token write to {repo_id} ({client_message(error)}): expected a token with "
                "write access; log in with `hf auth login`, set HF_TOKEN, or pass token="
            ) from error
        raise OSError(f"{repo_id} could not be sent ({client_message(error)}): {_PUSH_AGAIN}") from error
    except httpx2.TransportError as error:
        raise OSError(
            f"the connection to the Hub failed while sending {repo_id} ({client_message(error)}): {_PUSH_AGAIN}"
        ) from error
    except RuntimeError as error:  # the client's wrapper of an error while it sends a large file
        both = f"{client_message(error)} {client_message(error.__cause__ or error)}"
        raise OSError(f"{repo_id} could not be sent ({both}): {_PUSH_AGAIN}") from error
    finally:
        _CLIENT_LOGGER.removeFilter(unsigned)


def retried(call: Callable[[], _Result]) -> _Result:
    """Call `call`, retrying when the Hub or the connection fails temporarily, and return its result.

    `create_repo` and `create_commit` need this, since the client does not retry them itself.
    """
    for wait in WAITS_SECONDS:
        try:
            return call()
        except (httpx2.TransportError, HfHubHTTPError, json.JSONDecodeError) as error:
            # The client reads some answers as JSON before it looks at their status.
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in (429, 500, 502, 503, 504):
                raise
            logger.warning("the request to the Hub failed (%s): retrying in %g s", client_message(error), wait)
        time.sleep(wait)
    return call()


def _existing_card(api: HfApi, repo_id: str, commit: str, repo_type: str) -> str | None:
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=commit, repo_type=repo_type)
        return Path(path).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return None


def client_message(error: Exception) -> str:
    """The message of a client's error, in one line and without the signatures of URLs."""
    return _unsigned(" ".join(str(error).split()))


def _unsigned(text: str) -> str:
    """Remove the queries of the URLs in a text: for large files, they contain a signature."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


class _UnsignedUrls(logging.Filter):
    """Removes signatures of URLs from the client's log messages."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _unsigned(record.getMessage()), ()
        return True


# --- checks of arguments ---


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError unless the Hub accepts the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id is {repo_id!r}, which is not a valid name on the Hub ({error}): expected user/name or name, made "
            "of the letters a to z, digits, '-', '_' and '.'"
        ) from error


def checked_tags(tags: list[str] | str | None) -> list[str]:
    """The tags of a card as a list.

    Raises:
        ValueError: for a tag that is blank or not a string, since the Hub rejects such a card.
    """
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    wrong = [tag for tag in tags if not isinstance(tag, str) or not tag.strip()]
    if wrong:
        raise ValueError(f"tags contain {wrong[0]!r}: expected strings that are not blank")
    return tags


__all__ = ["CARD_FILE", "EVALUATE_AGAIN", "RUN_FILE", "HubUploads", "UploadOfSaved", "check_repo_id", "checked_tags"]
__all__ += ["client_message", "retried", "upload"]
