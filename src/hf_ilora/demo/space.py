"""Writes a demo as the folder of a Hub Space: this package, the models, and their requirements."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from hf_ilora.files import folder_written_whole
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig, check_public_llm
from hf_ilora.publishing import files_of_model
from hf_ilora_cli import shown_text

from .shown_models import ShownModel

_PACKAGES = {"hf_ilora": Path(__file__).parents[1], "hf_ilora_cli": Path(shown_text.__file__).parent}
_FILES = ("app.py", "demo.json", "README.md", "requirements.txt", "models", *_PACKAGES)
_APP = '''\
"""Serves the demo, here with `python app.py` and on a Space; the packages beside this file are those of hf_ilora."""

import json
import os
from pathlib import Path

from hf_ilora.demo.page import build_page, serve
from hf_ilora.demo.sessions import Demo
from hf_ilora.demo.shown_models import load_models

os.chdir(Path(__file__).parent)  # demo.json names the folders of models from here
settings = json.loads(Path("demo.json").read_text(encoding="utf-8"))
models = load_models(settings["models"], settings["names"])
demo = Demo(models, top_k=settings["top_k"], title_encoder=settings["title_encoder"])
serve(build_page(demo, settings["title"]))
'''


def write_space(
    folder: str | Path, models: Sequence[ShownModel], *, title: str, top_k: int, title_encoder: str | None
) -> None:
    """Write the folder of a Space.

    Args:
        folder: output folder; one that an earlier call wrote is replaced.
        models: the models of the demo. Those in folders are copied, without the files that only training needs; those
            on the Hub are referred to by name.
        title, top_k, title_encoder: settings of the demo.

    Raises:
        ValueError: for a folder with other files, models with broken files, and a title encoder or an iLoRA's language
            model that is a folder on this machine.
    """
    if title_encoder is not None and Path(title_encoder).is_dir():
        raise ValueError(
            f"title_encoder {title_encoder} is a folder on this machine: expected its name on the Hub; push it first"
        )
    with folder_written_whole(folder, _FILES) as unfinished:
        sources = [_source(model, number, unfinished) for number, model in enumerate(models, start=1)]
        for name, package in _PACKAGES.items():
            shutil.copytree(package, unfinished / name, ignore=shutil.ignore_patterns("__pycache__"))
        settings = {
            "models": sources,
            "names": [model.name for model in models],
            "title": title,
            "top_k": top_k,
            "title_encoder": title_encoder,
        }
        contents = {
            "app.py": _APP,
            "demo.json": json.dumps(settings, indent=2) + "\n",
            "requirements.txt": "\n".join(_requirements()) + "\n",
            "README.md": _readme(title, [source for source in sources if not source.startswith("models/")]),
        }
        for name, content in contents.items():
            (unfinished / name).write_text(content, encoding="utf-8")


def _source(model: ShownModel, number: int, space: Path) -> str:
    """The source of a model in the Space: its name on the Hub, or the folder of its copy."""
    if not Path(model.source).is_dir():
        return model.source
    if isinstance(model.model.config, ILoraConfig):
        check_public_llm(model.model.config)
    folder = f"models/{number}"
    (space / folder).mkdir(parents=True)
    for name, path in files_of_model(model.source).items():
        if path.suffix != ".py":  # the package beside it has the code
            shutil.copyfile(path, space / folder / name)
    return folder


def _requirements() -> list[str]:
    """The requirements of hf_ilora and its extra `demo`, pinned to the versions installed here."""
    needed = [Requirement(text) for text in importlib.metadata.requires("hf_ilora")]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": "demo"})]
    return [f"{each.name}=={Version(importlib.metadata.version(each.name)).public}" for each in needed]


def _readme(title: str, hub_models: list[str]) -> str:
    """The card of the Space; its metadata tells the Hub how to run it."""
    settings = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "app_file": "app.py",
        "pinned": False,
    }
    if hub_models:
        settings["models"] = hub_models
    front_matter = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front_matter}---\n\n# {shown_text.in_markdown(title)}\n\n"
        "Build a history of titles and see what several recommenders make of it. `python app.py` serves the same page "
        "after `pip install -r requirements.txt`.\n"
    )


__all__ = ["write_space"]
