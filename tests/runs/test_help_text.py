"""recipe_help: what is shown of each option, in which group, and the same on every machine."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import torch
from transformers import TrainingArguments

from hf_ilora.runs.help_text import recipe_help

DOCSTRING = """Counts things, one after
the other.

    python count.py --data_dir things \\
        --colour red

More is said here.
"""


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


@dataclass
class DataArguments:
    """What to count: all of it."""

    data_dir: str = field(metadata={"help": "folder of things"})
    colour: str = field(default="red", metadata={"help": "colour to count", "choices": ("red", "blue")})
    order: Literal["up", "down"] = field(default="up", metadata={"help": "direction"})
    size: Size = field(default=Size.SMALL, metadata={"help": "size"})
    steps: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "steps"})
    limit: int | None = field(default=None, metadata={"help": "things to count; by default all"})
    title: str | None = field(default=None, metadata={"help": "title of 100%% of them."})
    plot: bool = field(default=True, metadata={"help": "draw a plot"})
    dry: bool = field(default=False, metadata={"help": "count nothing"})
    pinned: bool = field(default_factory=torch.cuda.is_available, metadata={"help": "pin memory"})


@dataclass
class CountTrainingArguments(TrainingArguments):
    """TrainingArguments that count; everything can be set."""

    learning_rate: float = 1.0e-3
    patience: int = field(default=3, metadata={"help": "evaluations to wait"})


EXPECTED = """\
usage: count.py [CONFIG ...] [--option value ...]

Counts things, one after the other.

Example:
  python count.py --data_dir things \\
      --colour red

CONFIG is a YAML file of options, or the name of one that ships with hf_ilora. Of several, later
ones override earlier ones, and options on the command line override them all. All other paths in it
count from the working directory.

What you must give:
  --data_dir TEXT               folder of things

What to count:
  --colour {red,blue}           colour to count (default: red)
  --order {up,down}             direction (default: up)
  --size {small,large}          size (default: small)
  --steps INT [INT ...]         steps (default: 1 2)
  --limit INT                   things to count; by default all
  --title TEXT                  title of 100% of them (default: none)
  --plot [true|false], --no_plot
                                draw a plot (default: true)
  --dry [true|false]            count nothing (default: false)
  --pinned [true|false]         pin memory (default: torch.cuda.is_available())

General:
  --config CONFIG               the configuration, where it is not the first word
  --debug                       show the traceback of an error
  --help                        show this text
"""


def test_every_kind_of_option_is_shown_with_its_choices_and_default():
    assert recipe_help("recipes/count.py", DOCSTRING, (DataArguments,), "count.py") == EXPECTED


def test_what_our_training_arguments_declare_comes_first_and_the_rest_is_folded():
    folded = recipe_help("recipes/count.py", DOCSTRING, (CountTrainingArguments,), "count.py")
    required, group = folded.partition("\nTrainingArguments that count:\n")[::2]
    assert "What you must give:\n  --output_dir TEXT" in required
    lines = [line for line in group.partition("\n\n")[0].splitlines() if line.startswith("  --")]
    assert [line.split()[0] for line in lines] == ["--patience", "--learning_rate"]
    assert "The initial learning rate for the optimizer (default: 0.001)" in group  # help of the class below
    assert "--weight_decay" not in folded and "--help-all" in folded

    everything = recipe_help("recipes/count.py", DOCSTRING, (CountTrainingArguments,), "count.py", everything=True)
    rest = everything.partition("\nThe rest of transformers.TrainingArguments:\n")[2]
    assert "--weight_decay FLOAT" in rest and "--learning_rate" not in rest and "--help-all" not in everything


def test_a_launched_command_has_its_own_example_and_shows_how_to_launch():
    text = recipe_help("recipes/train_sasrec.py", DOCSTRING, (DataArguments,), "hf-ilora train-sasrec")
    assert "Example:\n  hf-ilora train-sasrec ml-100k/sasrec" in text
    assert "How to launch:\n  --launch NAME" in text and "--num_processes INT" in text
    assert "\nShipped: " in text and "ml-100k/sasrec" in text.partition("\nShipped: ")[2]
