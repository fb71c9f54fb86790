"""Runs all stages in one command, from the data to a distilled SASRec, the table of results and a folder to publish.

    python recipes/run_pipeline.py quickstart
    python recipes/run_pipeline.py quickstart --output_dir outputs/mine --only data sasrec
    python recipes/run_pipeline.py quickstart --set sasrec.max_steps=20 ilora.max_steps=2

A pipeline is a YAML file of stages, each a recipe with its settings. A stage is skipped when neither the recipes, its
settings nor what it reads have changed since it was finished; else its folder is made anew. A killed pipeline resumes
where it was, inside the stage that was cut short where the recipe can resume. `hf_ilora.runs.pipeline.Stage.key` says
what counts as a change. An edit of the package's source does not, for it would throw away hours of training: a stage
that is skipped in spite of one says so, and `--force <stage>` runs it again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora.runs import parse_arguments, run_main, set_up_logging
from hf_ilora.runs.pipeline import read_stages, run_stages, selected

logger = logging.getLogger(__name__)


@dataclass
class PipelineArguments:
    """Which stages to run, and where to write."""

    output_dir: str = field(metadata={"help": "folder of the pipeline; the options of the stages call it {output_dir}"})
    stages: dict = field(
        metadata={"help": "in the YAML file only: name of a stage -> recipe, config, launch, reads, options"}
    )
    set: list[str] | None = field(
        default=None, metadata={"help": "options of stages, each as stage.option=value, such as sasrec.max_steps=20"}
    )
    only: list[str] | None = field(default=None, metadata={"help": "run these stages and those that they read"})
    force: list[str] | None = field(default=None, metadata={"help": "run these stages though nothing has changed"})


ARGUMENTS = (PipelineArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output_dir)
    all_stages = read_stages(arguments.stages, arguments.set or [])
    selected(all_stages, arguments.force)  # raises for an unknown name
    stages = selected(all_stages, arguments.only)
    set_up_logging(output)
    run_stages(stages, output, arguments.force or [])
    logger.info("all %d stages are done: %s", len(stages), output)
    for results in (output / stage.name / "results.md" for stage in stages):
        if results.is_file():
            print(results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_main(main)
