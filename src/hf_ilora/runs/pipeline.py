"""Runs the stages of a pipeline, skips those that nothing has changed for, and records which are finished.

A pipeline may offer groups, such as `student`: the user chooses the configuration that replaces `{student}` in a stage,
by its file or by the name of one that ships in the folder of the group.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import yaml

from hf_ilora.files import LOCK_FILE, remove_folder, written_whole
from hf_ilora.runs.arguments import checked_settings, config_contents, prompt_path, read_configs
from hf_ilora.runs.processes import ProgramFailed, program_name
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora.runs.record import is_finished
from hf_ilora_cli.commands import PROGRAM_VARIABLE
from hf_ilora_cli.shipped import CONFIG, LAUNCH, RECIPE, closest_first, find_file, shipped_folder, shipped_names

logger = logging.getLogger(__name__)

STATE_FILE = "pipeline.json"


@dataclass(frozen=True)
class Stage:
    """A recipe with its settings. Recipe, config and launch are paths or names of shipped files.

    Args:
        name: name of the stage, and of its folder in the output folder.
        recipe: the recipe, such as train_sasrec.py.
        options: settings of the recipe, by option; {output_dir} is replaced by the pipeline's folder.
        reads: names of the earlier stages whose folders the recipe reads.
        config: YAML files of the recipe; later ones override earlier ones, and the options override them all.
        launch: accelerate configuration to launch the recipe with; None runs it with python.
        minutes: its expected duration, to estimate the time left.
        resumes: whether the recipe resumes in its folder after a crash; else the folder is deleted first.
    """

    name: str
    recipe: str
    options: dict = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    launch: str | None = None
    minutes: float = 1.0
    resumes: bool = False

    def command(self, output_dir: Path) -> list[str]:
        """The words that run the stage."""
        recipe = str(find_file(RECIPE, self.recipe))
        if self.launch is None:
            words = [sys.executable, "-m", "hf_ilora_cli.recipe_process", recipe]
        else:
            words = [sys.executable, "-m", "hf_ilora_cli.launch_recipe", recipe, "--launch", self.launch]
        return words + self.recipe_options(output_dir)

    def recipe_options(self, output_dir: Path) -> list[str]:
        """The command line of the recipe."""
        words = [word for config in self.config for word in ("--config", config)]
        for name, value in {**self.options, "output_dir": "{output_dir}/" + self.name}.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(one).replace("{output_dir}", str(output_dir)) for one in values)]
        return words

    def settings(self) -> dict:
        """The settings of the recipe: its configurations, overridden by its options."""
        return self._with_options(self._config_contents())

    def _config_contents(self) -> list[tuple[Path, dict]]:
        """The files of the configurations, each with its own settings; later ones override earlier ones."""
        return [content for config in self.config for content in config_contents(config)]

    def _with_options(self, contents: list[tuple[Path, dict]]) -> dict:
        settings = {}
        for _, own in contents:
            settings |= own
        return settings | self.options

    def check(self) -> None:
        """Raise a ValueError if a file of the stage does not exist or the recipe does not know a setting."""
        try:
            argument_types = load_recipe(find_file(RECIPE, self.recipe)).ARGUMENTS
            read_configs(self.config, argument_types)
            if self.launch is not None:
                _read_yaml(find_file(LAUNCH, self.launch))
            checked_settings(self.options, argument_types, "options")
            if "prompt_file" in self.options:
                prompt_path(self.options["prompt_file"])
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error

    def key(self, keys_read: list[str], output_dir: Path) -> str:
        """A digest that changes when something that is tracked changes.

        Tracked are the stage's settings, the version of hf_ilora, the runs of the stages in `reads`, and the content of
        its recipe, of the config and launch files, and of every file that the options or those two files name, also in
        lists. Of a folder that they name, the names, sizes and modification times of its files are tracked.

        Not tracked are the files in `output_dir` (`reads` tracks those), folders that contain it or the working
        directory, the source of hf_ilora under the same version, the place of its installation, other packages, and
        downloads.

        Args:
            keys_read: `PipelineState.run_of` each stage in `reads`.
            output_dir: folder of the pipeline.

        Raises:
            ValueError: a config or launch file has no settings.
        """
        contents = self._config_contents()
        files = [find_file(RECIPE, self.recipe), *(file for file, _ in contents)]
        settings, launch_settings = self._with_options(contents), {}
        if self.launch is not None:
            files.append(find_file(LAUNCH, self.launch))
            launch_settings = _read_yaml(files[-1])
        settings.pop("output_dir", None)  # the stage's own replaces that of its config
        if settings.get("prompt_file") is not None:
            files.append(prompt_path(settings["prompt_file"]))
        files += _named_paths([settings, launch_settings], output_dir)
        content = [_content(file) for file in files]
        tracked = {"stage": asdict(self), "files": content, "reads": keys_read, "version": metadata.version("hf_ilora")}
        del tracked["stage"]["minutes"]
        return _digest(tracked)


def read_stages(stages: dict, overrides: Sequence[str] = (), groups: Mapping[str, str] | None = None) -> list[Stage]:
    """The stages in their order, checked before anything runs.

    Args:
        stages: the settings of each stage, by its name. In its `config`, {student} is replaced by the configuration
            that is chosen from the group student.
        overrides: choices in groups, as `group=name`, and options of stages to replace or add, as `stage.option=value`.
        groups: the default choice of each group.

    Raises:
        ValueError: a stage has unknown or missing settings, files that do not exist or have no settings, or options
            that the recipe does not know; a stage reads one that does not come before it; or an override names a group
            or stage that does not exist.
    """
    choices, options = dict(groups or {}), []
    for override in overrides:
        if "." in override.partition("=")[0]:
            options.append(override)
        else:
            choices |= [_parsed_choice(override, choices)]
    configs = {f"{{{group}}}": _config_of_choice(group, name) for group, name in choices.items()}
    result: dict[str, Stage] = {}
    for name, settings in stages.items():
        if not isinstance(settings, dict) or "recipe" not in settings:
            raise ValueError(f"stage {name} has {settings}: expected settings with a recipe, such as train_sasrec.py")
        if isinstance(settings.get("config"), str):
            settings = {**settings, "config": [settings["config"]]}
        stage = Stage(name, **checked_settings(settings, (Stage,), f"stage {name}"))
        stage = replace(stage, config=[configs.get(config, config) for config in stage.config])
        for read in stage.reads:
            if read not in result:
                raise ValueError(f"stage {name} reads {read}: expected an earlier one of {', '.join(result) or 'none'}")
        result[name] = stage
    if not result:
        raise ValueError("stages is empty: expected at least one stage")
    for override in options:
        name, option, value = _parsed_option(override)
        if name not in result:
            raise ValueError(f"{override}: there is no stage {name}: expected one of {', '.join(result)}")
        result[name] = replace(result[name], options={**result[name].options, option: value})
    for stage in result.values():
        stage.check()
    return list(result.values())


def composed(stages: Sequence[Stage]) -> str:
    """All settings of the stages as the YAML file of a pipeline, which needs an `--output_dir` and nothing else."""
    parts = {
        stage.name: {
            "recipe": stage.recipe,
            "launch": stage.launch,
            "reads": stage.reads,
            "options": {name: value for name, value in stage.settings().items() if name != "output_dir"},
            "minutes": stage.minutes,
            "resumes": stage.resumes,
        }
        for stage in stages
    }
    stages = {
        name: {key: value for key, value in part.items() if value not in (None, [])} for name, part in parts.items()
    }
    return yaml.safe_dump({"stages": stages}, sort_keys=False, allow_unicode=True, width=120)


def selected(stages: list[Stage], only: list[str] | None) -> list[Stage]:
    """The stages that `only` names and all that they read, or every stage.

    Raises:
        ValueError: `only` names a stage that does not exist.
    """
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


class PipelineState:
    """The status of each stage and the key it had then; saved in pipeline.json of the output folder."""

    def __init__(self, output_dir: Path):
        self.path, self.source = output_dir / STATE_FILE, source_digest()
        self.stages = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def note(self, name: str, key: str, status: str, seconds: float = 0.0) -> None:
        """Record the status of a stage."""
        entry = {"key": key, "status": status, "seconds": round(seconds, 1), "time": time.time()}
        self.stages[name] = entry | {"source": self.source}
        with written_whole(self.path) as path:
            path.write_text(json.dumps(self.stages, indent=2) + "\n", encoding="utf-8")

    def run_of(self, name: str) -> str:
        """Identifies the last run of a stage; when it runs again, the stages that read it must run again too."""
        return f"{self.stages[name]['key']} {self.stages[name]['time']}"

    def source_changed(self, name: str) -> bool:
        """Whether hf_ilora's source has changed since the stage was noted."""
        return self.stages[name]["source"] != self.source

    def has(self, name: str, key: str, status: str) -> bool:
        """Whether the stage was last noted with this key and status."""
        return (self.stages.get(name, {}).get("key"), self.stages.get(name, {}).get("status")) == (key, status)


def run_stages(stages: list[Stage], output_dir: Path, force: Sequence[str] = ()) -> None:
    """Run the stages in order; skip those that nothing has changed for since they were finished.

    Args:
        stages: the stages to run, including all that they read.
        output_dir: folder of the pipeline.
        force: names of stages to run even if nothing has changed.

    Raises:
        ProgramFailed: a stage failed.
    """
    state, finished = PipelineState(output_dir), {}
    minutes_left, begin, estimated = sum(stage.minutes for stage in stages), time.monotonic(), 0.0
    for number, stage in enumerate(stages, start=1):
        key = stage.key([finished[name] for name in stage.reads], output_dir)
        folder, title = output_dir / stage.name, f"stage {number} of {len(stages)}, {stage.name}"
        minutes_left -= stage.minutes
        if stage.resumes and state.has(stage.name, key, "started") and is_finished(folder):
            # Killed between the end of the run and its note; the recipe refuses the folder of a finished run.
            logger.info("%s: its run.json says that it is finished, noted", title)
            state.note(stage.name, key, "finished")
        if state.has(stage.name, key, "finished") and folder.is_dir() and stage.name not in force:
            logger.info("%s: nothing has changed since it was finished, skipped", title)
            if state.source_changed(stage.name):
                logger.warning("%s: the source of hf_ilora has changed; --force %s runs it again", title, stage.name)
            finished[stage.name] = state.run_of(stage.name)
            continue
        pace = (1 + (time.monotonic() - begin) / 60) / (1 + estimated)  # little is known after little time
        logger.info("%s begins; about %.1f minutes left", title, (minutes_left + stage.minutes) * pace)
        if not (stage.resumes and state.has(stage.name, key, "started")):
            remove_folder(folder)
        state.note(stage.name, key, "started")
        start = time.monotonic()
        exit_code = _run(stage, output_dir)
        if exit_code:
            raise ProgramFailed(
                f"{title}, failed with exit code {exit_code}; its log is {folder / 'run.log'}. The same command "
                "resumes here",
                exit_code,
            )
        seconds = time.monotonic() - start
        estimated += stage.minutes
        state.note(stage.name, key, "finished", seconds)
        finished[stage.name] = state.run_of(stage.name)
        logger.info("%s: done in %.0f s", title, seconds)


def source_digest() -> str:
    """A digest of hf_ilora's Python files, without the recipes of an installed package, which the keys track."""
    package, recipes = Path(__file__).parents[1], shipped_folder(RECIPE)
    files = [file for file in package.rglob("*.py") if not file.is_relative_to(recipes)]
    return _digest({str(file.relative_to(package)): _content(file) for file in files})


def _run(stage: Stage, output_dir: Path) -> int:
    """Run a stage to its end; returns the exit code."""
    # Messages then name the stage beside the command that started the pipeline.
    environment = {**os.environ, PROGRAM_VARIABLE: f"{program_name()} ({stage.name})"}
    process = subprocess.Popen(stage.command(output_dir), env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt as error:
        from hf_ilora_cli.launching import end_children

        end_children(error)
        raise


def _parsed_choice(override: str, choices: Mapping[str, str]) -> tuple[str, str]:
    """Group and name of `group=name`."""
    group, equals, name = override.partition("=")
    if equals and name and group in choices:
        return group, name
    groups = f"group=name with a group of {', '.join(choices)}, or " if choices else ""
    raise ValueError(f"{override}: expected {groups}stage.option=value, such as sasrec.max_steps=20")


def _config_of_choice(group: str, name: str) -> str:
    """The configuration that is chosen: a file, or one that ships in the folder of the group."""
    if Path(name).is_file():
        return name
    names = [each.removeprefix(f"{group}/") for each in shipped_names(CONFIG) if each.startswith(f"{group}/")]
    if name not in names:
        raise ValueError(
            f"{group}={name}: expected one of {', '.join(closest_first(name, names))}, or a YAML file (paths count "
            "from the working directory)"
        )
    return f"{group}/{name}"


def _parsed_option(override: str) -> tuple[str, str, object]:
    """Stage, option and value of `stage.option=value`; YAML reads the value, as in the file of the pipeline."""
    target, equals, text = override.partition("=")
    name, _, option = target.partition(".")
    if not equals or not option:
        raise ValueError(f"{override}: expected stage.option=value, such as sasrec.max_steps=20")
    try:
        return name, option, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override}: the value is not valid YAML: {error}") from error


def _read_yaml(file: Path) -> dict:
    """The settings in a YAML file."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} contains {str(settings)[:40]}: expected lines of `field: value`; fix the file")
    return settings


def _named_paths(settings: object, output_dir: Path) -> Iterator[Path]:
    """The existing files and folders that settings name, at any depth, except those in or around `output_dir`."""
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _named_paths(value, output_dir)
    elif isinstance(settings, str):
        output = output_dir.resolve()
        # os.path takes text of any length. A setting such as "." or "/" may be a separator, not a folder.
        path = Path(os.path.realpath(settings.replace("{output_dir}", str(output))))
        around = output.is_relative_to(path) or Path.cwd().is_relative_to(path)
        if os.path.exists(path) and not around and not path.is_relative_to(output):
            yield path


def _content(path: Path) -> str | list:
    """The sha256 of a file; of a folder, whose files may be large, their names, sizes and modification times."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != LOCK_FILE)
        return [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
