"""Draws a finished evaluation, or the learning curves of training runs, as a picture.

    python recipes/plot_results.py --results outputs/quickstart/evaluation --output outputs/quickstart/evaluation.png
    python recipes/plot_results.py --runs outputs/ml-100k/seeds/seed-1 outputs/ml-100k/seeds/seed-2 \
        --names SASRec SASRec --output outputs/ml-100k/curves.png

`--results` takes the folder or the results.json of `hf-ilora evaluate` (quality against the time of one recommendation,
language models, students and baselines in one picture) or of `hf-ilora evaluate-ilora` (HR@1 among the candidates).
`--runs` takes folders of training runs, and draws the training loss and the quality on validation by epoch; runs with
the same name are seeds of one model. The suffix of `--output`, .png, .pdf or .svg, determines the format.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora.evaluation.candidate_report import CandidateContext, plot_candidate_hits
from hf_ilora.evaluation.learning_curves import plot_learning_curves, read_curve
from hf_ilora.evaluation.report import plot_quality
from hf_ilora.publishing.measured import read_reports
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_choice, names_of_models
from hf_ilora_cli.shown_text import shown

SUFFIXES = (".png", ".pdf", ".svg")


@dataclass
class PlotArguments:
    """The results or runs to draw, and the file to write."""

    output: str = field(metadata={"help": "image file to write"})
    results: str | None = field(
        default=None, metadata={"help": "results.json of an evaluation, or its folder: draws the quality of its models"}
    )
    runs: list[str] | None = field(
        default=None, metadata={"help": "folders of training runs: draws their learning curves"}
    )
    names: list[str] | None = field(
        default=None,
        metadata={"help": "names of the runs, by default their folders; runs with one name are seeds of one model"},
    )

    def __post_init__(self):
        if (self.results is None) == (not self.runs):
            raise ValueError("expected either --results, an evaluation, or --runs, folders of training runs")
        if self.runs:
            self.names = names_of_models(self.runs, self.names)
        elif self.names:
            raise ValueError("names apply to --runs only: the models of an evaluation have names")
        check_choice("the suffix of output", Path(self.output).suffix, SUFFIXES)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("pictures need matplotlib: install hf_ilora[plot]")


ARGUMENTS = (PlotArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output)
    if arguments.runs:
        curves = [read_curve(Path(run), name) for run, name in zip(arguments.runs, arguments.names, strict=True)]
        plot_learning_curves(curves, output)
    else:
        reports, context = read_reports(Path(arguments.results))
        draw = plot_candidate_hits if isinstance(context, CandidateContext) else plot_quality
        draw(reports, context, output)
    print(f"wrote {shown(output)}")


if __name__ == "__main__":
    run_main(main)
