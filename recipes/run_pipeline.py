"""The whole way in one command: data, SASRec, iLoRA, teacher labels, distilled SASRec, evaluation, a folder to publish.

    python recipes/run_pipeline.py recipes/configs/quickstart.yaml
    python recipes/run_pipeline.py recipes/configs/quickstart.yaml --output_dir outputs/mine --only data sasrec

A pipeline is a YAML file of stages, each a recipe of this folder with its settings. A stage is skipped when neither the
recipes, its settings nor what it reads have changed since it was finished, and it says so; else its folder is made
anew. A killed pipeline goes on where it was, inside the stage that was cut short where the recipe can resume.
`Stage.key` says what counts as a change. An edit of the package's source does not, for it would throw away hours of
training: a stage that is skipped in spite of one says so, and `--force <stage>` runs it again.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import yaml

import hf_ilora
from hf_ilora.files import written_whole
from hf_ilora.runs import parse_arguments, read_record, set_up_logging

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).resolve().parent
STATE_FILE = "pipeline.json"


@dataclass
class PipelineArguments:
    """Which pipeline, and where to."""

    output_dir: str = field(metadata={"help": "folder of the pipeline; {output_dir} in the settings of the stages"})
    stages: dict = field(metadata={"help": "of the YAML file: name of a stage -> recipe, reads, options..."})
    only: list[str] | None = field(default=None, metadata={"help": "run these stages only, and those they read"})
    force: list[str] | None = field(default=None, metadata={"help": "run these stages though nothing has changed"})


ARGUMENTS = (PipelineArguments,)


@dataclass(frozen=True)
class Stage:
    """A recipe with its settings.

    Args:
        name: of the stage, and of its folder in the output folder.
        recipe: file in recipes/, such as train_sasrec.py.
        options: settings of the recipe, by option; {output_dir} stands for the pipeline's folder.
        reads: names of the earlier stages whose folders the recipe reads.
        config: YAML file of the recipe, whose settings the options override.
        launch: file of accelerate_configs to launch the recipe with; None runs it with python.
        minutes: about how long it takes, for the time left.
        resumes: whether the recipe goes on in its folder after a kill; else the folder is made anew.
    """

    name: str
    recipe: str
    options: dict = field(default_factory=dict)
    reads: list = field(default_factory=list)
    config: str | None = None
    launch: str | None = None
    minutes: float = 1.0
    resumes: bool = False

    def command(self, output_dir: Path) -> list[str]:
        """The words that run the stage."""
        words = [sys.executable]
        if self.launch is not None:
            words += ["-m", "accelerate.commands.launch", "--config_file", self.launch]
        words.append(str(RECIPES / self.recipe))
        if self.config is not None:
            words += ["--config", self.config]
        for name, value in {**self.options, "output_dir": "{output_dir}/" + self.name}.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(one).replace("{output_dir}", str(output_dir)) for one in values)]
        return words

    def key(self, keys_read: list[str], output_dir: Path) -> str:
        """Changes when something that is tracked does.

        Tracked are the stage's settings, the version of hf_ilora, the runs of the stages in `reads`, and the content of
        all recipes, of the config and launch files, and of the files that the settings name, be it in the options or in
        those two files, in lists too. Of a folder that the settings name, the names, sizes and times of change of its
        files are tracked.

        Not tracked are what lies in `output_dir` (that is for `reads`), folders around it or around the working
        directory, the source of hf_ilora under the same version, other packages, and what is downloaded.

        Args:
            keys_read: of the stages that it reads: their keys and when they were finished.
            output_dir: folder of the pipeline.

        Raises:
            ValueError: for a config or launch file that holds no settings.
        """
        files = sorted(RECIPES.glob("*.py"))  # recipes import one another
        files += [Path(file) for file in (self.config, self.launch) if file is not None]
        settings = {**_read_yaml(self.config), **self.options, "output_dir": None}  # the stage's own replaces config's
        files += _named_paths([settings, _read_yaml(self.launch)], output_dir)
        content = [_content(file) for file in files]
        what = {"stage": asdict(self), "files": content, "reads": keys_read, "version": hf_ilora.__version__}
        del what["stage"]["minutes"]
        return _digest(what)


def source_digest() -> str:
    """Changes when a Python file of hf_ilora does."""
    package = Path(hf_ilora.__file__).parent
    return _digest({str(file.relative_to(package)): _content(file) for file in package.rglob("*.py")})


def _content(path: Path) -> str | list:
    """sha256 of a file; for a folder name, size and time of change of its files, which are large."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_yaml(file: str | None) -> dict:
    """The settings in a YAML file; none without a file."""
    if file is None:
        return {}
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds {str(settings)[:40]}: expected lines of `field: value`; mend the file")
    return settings


def _named_paths(settings: object, output_dir: Path) -> Iterator[Path]:
    """Files and folders that text in settings names, at any depth, but for what is in or around `output_dir`."""
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _named_paths(value, output_dir)
    elif isinstance(settings, str):
        output = output_dir.resolve()
        # os.path takes text of any length. "." and "/" may be separators of something: nobody means all that is there.
        path = Path(os.path.realpath(settings.replace("{output_dir}", str(output))))
        around = output.is_relative_to(path) or Path.cwd().is_relative_to(path)
        if os.path.exists(path) and not around and not path.is_relative_to(output):
            yield path


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_stages(stages: dict) -> list[Stage]:
    """The stages in their order.

    Raises:
        ValueError: for a stage with unknown or missing settings, files that are not there or hold no settings, and
            stages that read what does not come before them.
    """
    known = [setting.name for setting in fields(Stage) if setting.name != "name"]
    result: dict[str, Stage] = {}
    for name, settings in stages.items():
        if not isinstance(settings, dict) or "recipe" not in settings or set(settings) - set(known):
            found = sorted(settings) if isinstance(settings, dict) else settings
            raise ValueError(f"stage {name} has {found}: expected recipe, and any of {', '.join(known)}")
        stage = Stage(name, **settings)
        for file in (RECIPES / stage.recipe, stage.config, stage.launch):
            if file is not None and not Path(file).is_file():
                raise ValueError(f"stage {name} names {file}, which is no file here ({Path.cwd()}): check the path")
        for file in (stage.config, stage.launch):
            _read_yaml(file)  # raises for what holds no settings
        for read in stage.reads:
            if read not in result:
                raise ValueError(f"stage {name} reads {read}: expected an earlier one of {', '.join(result) or 'none'}")
        result[name] = stage
    if not result:
        raise ValueError("stages is empty: expected at least one stage")
    return list(result.values())


class PipelineState:
    """Which stages are finished, by the key they had; kept in pipeline.json of the output folder."""

    def __init__(self, output_dir: Path):
        self.path, self.source = output_dir / STATE_FILE, source_digest()
        self.stages = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def note(self, name: str, key: str, status: str, seconds: float = 0.0) -> None:
        entry = {"key": key, "status": status, "seconds": round(seconds, 1), "time": time.time()}
        self.stages[name] = entry | {"source": self.source}
        with written_whole(self.path) as path:
            path.write_text(json.dumps(self.stages, indent=2) + "\n", encoding="utf-8")

    def run_of(self, name: str) -> str:
        """Tells the runs of a stage apart: what reads a stage that ran again has to run again."""
        return f"{self.stages[name]['key']} {self.stages[name]['time']}"

    def source_changed(self, name: str) -> bool:
        """Whether hf_ilora's source is another one than when the stage was noted."""
        return self.stages[name]["source"] != self.source

    def has(self, name: str, key: str, status: str) -> bool:
        return (self.stages.get(name, {}).get("key"), self.stages.get(name, {}).get("status")) == (key, status)


def selected(stages: list[Stage], only: list[str] | None) -> list[Stage]:
    """The stages that are asked for, with all that they read."""
    if only is None:
        return stages
    by_name = {stage.name: stage for stage in stages}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise ValueError(f"there is no stage {', '.join(unknown)}: expected names of {', '.join(by_name)}")
    wanted = set(only)
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.reads)
    return [stage for stage in stages if stage.name in wanted]


def is_finished(folder: Path) -> bool:
    """Whether the run in a stage's folder came to its end."""
    record = folder / "run.json"
    return record.exists() and read_record(record)["status"] == "finished"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output_dir)
    all_stages = read_stages(arguments.stages)
    stages = selected(all_stages, arguments.only)
    selected(all_stages, arguments.force)  # raises for names that are none
    set_up_logging(output)
    state, finished = PipelineState(output), {}
    minutes_left, begin, estimated = sum(stage.minutes for stage in stages), time.monotonic(), 0.0
    for number, stage in enumerate(stages, start=1):
        key = stage.key([finished[name] for name in stage.reads], output)
        folder, title = output / stage.name, f"stage {number} of {len(stages)}, {stage.name}"
        minutes_left -= stage.minutes
        if stage.resumes and state.has(stage.name, key, "started") and is_finished(folder):
            # Killed between the end of the run and its note; the recipe refuses a folder that holds a finished run.
            logger.info("%s: its run.json says that it is finished, noted", title)
            state.note(stage.name, key, "finished")
        if state.has(stage.name, key, "finished") and folder.is_dir() and stage.name not in (arguments.force or []):
            logger.info("%s: nothing has changed since it was finished, skipped", title)
            if state.source_changed(stage.name):
                logger.warning("%s: the source of hf_ilora has changed; --force %s runs it again", title, stage.name)
            finished[stage.name] = state.run_of(stage.name)
            continue
        pace = (1 + (time.monotonic() - begin) / 60) / (1 + estimated)  # little is known after little time
        logger.info("%s begins; about %.1f minutes left", title, (minutes_left + stage.minutes) * pace)
        if not (stage.resumes and state.has(stage.name, key, "started")):
            shutil.rmtree(folder, ignore_errors=True)
        state.note(stage.name, key, "started")
        start = time.monotonic()
        result = subprocess.run(stage.command(output), check=False)
        if result.returncode:
            raise RuntimeError(
                f"{title} failed with exit code {result.returncode}; its log is {folder / 'run.log'}. The same command "
                "goes on from here"
            )
        seconds = time.monotonic() - start
        estimated += stage.minutes
        state.note(stage.name, key, "finished", seconds)
        finished[stage.name] = state.run_of(stage.name)
        logger.info("%s: done in %.0f s", title, seconds)
    logger.info("all %d stages are done: %s", len(stages), output)


if __name__ == "__main__":
    main()
