"""Runs the stages of a pipeline in one command, such as those from the data to a distilled SASRec and its results.

    python recipes/run_pipeline.py quickstart
    python recipes/run_pipeline.py quickstart --output_dir outputs/mine --only data sasrec
    python recipes/run_pipeline.py quickstart sasrec.max_steps=20 ilora.max_steps=2
    python recipes/run_pipeline.py experiment data=ml-100k teacher=ilora student=sasrec distill=dllm2rec active=entropy

A pipeline is a YAML file of stages; each stage is a recipe with its settings. It may offer groups: `student=sasrec`
takes recipes/configs/student/sasrec.yaml, and `student=mine.yaml` your own file. `--compose_only true` prints all
settings and runs nothing. A run writes them to <output_dir>/composed.yaml, which is a pipeline too.

A finished stage is skipped if its recipe, its settings and its inputs have not changed; otherwise its folder is deleted
and it runs again: to keep the results of one choice beside those of another, choose another --output_dir.
`hf_ilora.runs.pipeline.Stage.key` defines what counts as a change. To resume a killed pipeline, run the same command
again: it resumes inside the interrupted stage if the recipe of that stage can resume.

A change in the source of the package does not count, because it would discard hours of training. The log names the
stages that were skipped in spite of one; `--force <stage>` runs them again.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from hf_ilora.files import written_whole
from hf_ilora.runs import parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.pipeline import composed, read_stages, run_stages, selected
from hf_ilora_cli.shown_text import shown_lines

logger = logging.getLogger(__name__)


@dataclass
class PipelineArguments:
    """The stages and the folder to write to."""

    ASSIGNMENTS: ClassVar[str] = "set"

    output_dir: str = field(
        metadata={"help": "folder of the pipeline, which options of stages can refer to as {output_dir}"}
    )
    stages: dict = field(
        metadata={"help": "only in the YAML file: recipe, config, launch, reads and options of each stage by its name"}
    )
    groups: dict = field(
        default_factory=dict,
        metadata={"help": "only in the YAML file: the choices that it offers, each with the name of the default"},
    )
    set: list[str] | None = field(
        default=None,
        metadata={
            "help": "choices of groups, as group=name, and options of stages, as stage.option=value, such as "
            "sasrec.max_steps=20; they may also be the first words after CONFIG"
        },
    )
    compose_only: bool = field(default=False, metadata={"help": "print the settings of all stages and run nothing"})
    only: list[str] | None = field(
        default=None, metadata={"help": "run only these stages and those whose output they read"}
    )
    force: list[str] | None = field(default=None, metadata={"help": "run these stages even if nothing has changed"})


ARGUMENTS = (PipelineArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output_dir)
    all_stages = read_stages(arguments.stages, arguments.set or [], arguments.groups)
    selected(all_stages, arguments.force)  # raises for an unknown name
    stages = selected(all_stages, arguments.only)
    if arguments.compose_only:
        print(shown_lines(composed(stages)), end="")
        return
    with sole_writer(output):
        set_up_logging(output)
        with written_whole(output / "composed.yaml") as path:
            path.write_text(composed(all_stages), encoding="utf-8")
        if arguments.groups:
            logger.info("the stages and their settings:\n%s", composed(stages))
        run_stages(stages, output, arguments.force or [])
    logger.info("all %d stages are done: %s", len(stages), output)
    for results in (output / stage.name / "results.md" for stage in stages):
        if results.is_file():
            print(shown_lines(results.read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_main(main)
