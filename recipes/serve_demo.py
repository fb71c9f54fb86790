"""Serves a web page that shows models side by side: their recommendations, times and most similar items.

    python recipes/serve_demo.py outputs/quickstart/sasrec outputs/quickstart/distilled outputs/quickstart/ilora
    python recipes/serve_demo.py outputs/quickstart/sasrec outputs/quickstart/distilled \
        --names "SASRec, ids only" "SASRec, distilled"
    python recipes/serve_demo.py outputs/quickstart/sasrec outputs/quickstart/distilled --space_dir outputs/space

Visitors build a history from titles, and may add an item by its title: models that take new items recommend it without
training. All models need the same catalogue. With `--space_dir`, the recipe writes the folder of a Space
(`hf upload user/name outputs/space --repo-type space`), with copies of the models and their catalogue: check that the
licence of the data allows titles to be published. Needs the package of the extra `demo`.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from typing import ClassVar

from hf_ilora.demo import check_gradio
from hf_ilora.demo.sessions import Demo
from hf_ilora.demo.shown_models import load_models
from hf_ilora.demo.space import write_space
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER
from hf_ilora_cli.shown_text import shown


@dataclass
class DemoArguments:
    """The models, the page and its address."""

    POSITIONAL: ClassVar[str] = "models"

    models: list[str] = field(metadata={"help": "folders or Hub names of saved models with a catalogue"})
    names: list[str] | None = field(
        default=None, metadata={"help": "names of the models on the page; by default those of their folders"}
    )
    title: str = field(default="Recommendations side by side", metadata={"help": "title of the page"})
    top_k: int = field(default=10, metadata={"help": "recommendations of each model"})
    new_items: bool = field(default=True, metadata={"help": "let visitors add items by their titles"})
    title_encoder: str = field(
        default=EMBEDDED_ENCODER, metadata={"help": "encoder of titles, for new items; see encode_titles"}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets other machines see the page"}
    )
    port: int | None = field(default=None, metadata={"help": "port; by default the first free one from 7860 on"})
    space_dir: str | None = field(
        default=None, metadata={"help": "write the folder of a Space there; by default, serve the page"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the title encoder or the language model of an iLoRA"}
    )


ARGUMENTS = (DemoArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks its own server whether it is up
    check_gradio()
    models = load_models(arguments.models, arguments.names, trust_remote_code=arguments.trust_remote_code)
    title_encoder = arguments.title_encoder if arguments.new_items else None
    settings = {"top_k": arguments.top_k, "title_encoder": title_encoder}
    demo = Demo(models, **settings, trust_remote_code=arguments.trust_remote_code)
    if arguments.space_dir is not None:
        write_space(arguments.space_dir, models, title=arguments.title, **settings)
        print(f"{shown(arguments.space_dir)} is ready: publish the titles in it only if the licence of the data allows")
        return
    from hf_ilora.demo.page import build_page, serve  # imports Gradio, which takes seconds

    serve(build_page(demo, arguments.title), arguments.host, arguments.port)


if __name__ == "__main__":
    run_main(main)
