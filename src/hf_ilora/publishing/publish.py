"""Publishes the folder of a finished run on the Hub, after a check that others can use it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig, check_public_llm
from hf_ilora.models.ilora.language_models import load_tokenizer
from hf_ilora.models.loading import load_recommender, saved_config
from hf_ilora.models.next_item.card import is_edited, is_untouched
from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE, Catalogue
from hf_ilora.models.next_item.hub_upload import CARD_FILE, RUN_FILE, upload
from hf_ilora.models.next_item.saved_model import saved_shapes, saved_weights
from hf_ilora_cli.shown_text import shareable_json

# Other files of a run are not published: checkpoints, optimizer states, logs and pickled training arguments.
_OPTIONAL_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "*.py",
)


@dataclass(frozen=True)
class ModelFolder:
    """A complete folder of a model.

    Args:
        files: the files to publish by their paths in the repository; each is a path here, or its content.
        config: configuration of the model.
        catalogue: catalogue of the model.
        run: content of run.json.
    """

    files: dict[str, Path | bytes]
    config: PreTrainedConfig
    catalogue: Catalogue
    run: dict


def check_folder(
    folder: str | Path,
    *,
    run_file: str | Path | None = None,
    llm_name: str | None = None,
    llm_revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelFolder:
    """Read the folder of a model and check that all files to publish are complete.

    Absolute paths in run.json are cut to their last part, because they name folders of this machine.

    Args:
        folder: folder with config.json, weights, items.parquet, run.json, and for an iLoRA the tokenizer.
        run_file: path of run.json if it is not in the folder.
        llm_name: for an iLoRA, Hub name of the language model, to publish instead of the name in config.json.
        llm_revision: commit of the language model; None means its main branch at the time of loading.
        trust_remote_code: run code that comes with the tokenizer of an iLoRA.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is broken or does not fit the others, the run is not finished, the model is not one of
            this package, or the name of the language model is a local path.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = dict(files_of_model(folder))
    run_file = _existing(Path(run_file or folder / RUN_FILE), "the record of the run; pass its path as run_file")
    run = _finished_run(run_file)
    files[RUN_FILE] = shareable_json(run_file)
    if (folder / CARD_FILE).is_file():
        files |= card_files(folder / CARD_FILE)
    config = saved_config(folder)
    catalogue = Catalogue.from_parquet(folder / CATALOGUE_FILE)
    if isinstance(config, ILoraConfig):
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
        if llm_name is not None:
            config.llm_name_or_path, config.llm_revision, config.llm_gguf_file = llm_name, llm_revision, None
            files[CONFIG_NAME] = _renamed_config(folder / CONFIG_NAME, config)
        check_public_llm(config)
        if config.num_items != len(catalogue):
            raise ValueError(
                f"{folder / CATALOGUE_FILE} has {len(catalogue)} items: expected {config.num_items}, those of the "
                "model; restore the catalogue that was saved with it"
            )
    else:
        load_recommender(folder)  # raises if the files do not fit each other
    return ModelFolder(files, config, catalogue, run)


def files_of_model(folder: str | Path) -> dict[str, Path]:
    """The files that make up a saved model, by name: configuration, whole weights, catalogue, tokenizer and code.

    Raises:
        FileNotFoundError, ValueError: as `check_folder`.
    """
    folder = Path(folder)
    expected = "the folder that save_pretrained wrote"
    files = {name: _existing(folder / name, expected) for name in (CONFIG_NAME, CATALOGUE_FILE)}
    if saved_shapes(folder, {}) is None:  # raises for weights that are broken
        raise FileNotFoundError(f"no {folder / SAFE_WEIGHTS_NAME}: expected {expected}")
    weights = [Path(file) for file in saved_weights(folder, {})]
    if weights[0].name != SAFE_WEIGHTS_NAME:
        weights.append(folder / SAFE_WEIGHTS_INDEX_NAME)
    files |= {path.name: path for path in weights}
    for pattern in _OPTIONAL_FILES:
        files |= {path.name: path for path in folder.glob(pattern) if path.is_file()}
    return files


def card_files(card: Path) -> dict[str, Path]:
    """A card and the images in its folder that it shows, by file name."""
    shown = re.findall(r"!\[[^\n]*?\]\(([\w.-]+\.(?:png|svg|jpg))\)", card.read_text(encoding="utf-8"))
    return {card.name: card} | {name: card.parent / name for name in shown if (card.parent / name).is_file()}


def push_folder(
    folder: str | Path | ModelFolder,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Publish the folder of a model, with its card, on the Hub in one commit; it is safe to repeat.

    Args:
        folder: a folder that `check_folder` accepts, or its result; README.md is written by `write_card` or by hand.
        repo_id: "user/name", or "name" for the user of the token; created if it does not exist.
        commit_message: message of the commit.
        private: create a private repository; None uses the default of the Hub.
        token: None uses HF_TOKEN or the token of `hf auth login`.
        revision: branch; created from main if it does not exist.
        parent_commit: fail unless this is the head of the branch.

    Returns:
        The commit; the existing one if nothing has changed.

    Raises:
        PermissionError: when the token is missing or invalid, or has no write permission.
        ValueError: as `check_folder`, without README.md, when the repository is public and `private` is True, when its
            card was edited on the Hub, and when somebody else commits at the same time.
        OSError: when the Hub cannot be reached.
    """
    checked = folder if isinstance(folder, ModelFolder) else check_folder(folder)
    if CARD_FILE not in checked.files:
        raise ValueError(
            f"the folder has no {CARD_FILE}: expected a card; write one with hf_ilora.publishing.write_card"
        )

    def card(repo_id: str, existing: str | None) -> str:
        file = checked.files[CARD_FILE]
        own = file.decode() if isinstance(file, bytes) else file.read_text(encoding="utf-8")
        if existing not in (None, own) and is_untouched(own) and is_edited(existing):
            raise ValueError(
                f"the card of {repo_id} was written or edited on the Hub: expected no card, or an unchanged one of "
                f"hf_ilora; fetch it into the model's folder (hf download {repo_id} {CARD_FILE} --local-dir FOLDER) "
                "and publish it as it is (hf-ilora push --keep_card true), or delete it on the Hub"
            )
        return own

    return upload(
        checked.files,
        repo_id,
        card=card,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        parent_commit=parent_commit,
    )


def _renamed_config(path: Path, config: ILoraConfig) -> bytes:
    """config.json with the name of the language model in `config`."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    names = {name: vars(config)[name] for name in ("llm_name_or_path", "llm_revision", "llm_gguf_file")}
    names["text_config"] = saved["text_config"] | {"_name_or_path": config.llm_name_or_path}
    return (json.dumps(saved | names, indent=2, sort_keys=True) + "\n").encode()


def _existing(path: Path, expected: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected {expected}")
    return path


def _finished_run(path: Path) -> dict:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        status = run["status"]
        run["seed"], run["data_fingerprint"], run["versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a run ({error!r}): restore it, or run again") from error
    if status != "finished":
        raise ValueError(
            f"the run of {path} is {status}: expected a finished one; run the same command again to finish it"
        )
    return run
