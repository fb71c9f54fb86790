"""AutoConfig and AutoModel know our recommenders after `import hf_ilora`, whatever was imported in which order."""

import subprocess
import sys

import pytest

# Runs in a process of its own: what is imported already decides everything here.
CHECK = """
import sys, tempfile
from transformers import AutoConfig, AutoModel
from hf_ilora import (
    CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, PopularityConfig, PopularityForNextItem,
    SASRecConfig, SASRecForNextItem, TransitionCountsConfig, TransitionCountsForNextItem,
)
pairs = [
    (SASRecConfig, SASRecForNextItem),
    (GRU4RecConfig, GRU4RecForNextItem),
    (CaserConfig, CaserForNextItem),
    (PopularityConfig, PopularityForNextItem),
    (TransitionCountsConfig, TransitionCountsForNextItem),
]
for config_class, model_class in pairs:
    model = AutoModel.from_config(config_class(num_items=5))
    assert type(model) is model_class, type(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert type(AutoConfig.from_pretrained(folder)) is config_class
        assert type(AutoModel.from_pretrained(folder)) is model_class
    assert AutoConfig.for_model(config_class.model_type, num_items=5).num_items == 5
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("hf_ilora")], "still watching"
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def check_after(imports: str) -> None:
    done = run_python(f"{imports}\n{CHECK}")
    assert done.returncode == 0, done.stderr


def test_auto_classes_know_the_recommenders_after_a_bare_import():
    check_after("import hf_ilora")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_ilora; from transformers import AutoConfig",
        "import hf_ilora; from transformers import AutoModel",
        "import hf_ilora; from transformers import AutoProcessor",
        "import hf_ilora; from transformers import AutoTokenizer",
        "import hf_ilora; from transformers import PreTrainedConfig",
        "import hf_ilora; from transformers import PreTrainedModel",
        "import hf_ilora; from transformers import Trainer",
        "import hf_ilora; from transformers import TrainingArguments",
        "import hf_ilora; from transformers import pipeline",
        "import hf_ilora; import transformers.models.auto.modeling_auto",
        "import hf_ilora.models.next_item.configuration_sasrec",
        "import hf_ilora.models.next_item.modeling_sasrec",
        "from hf_ilora import SASRecConfig",
        "from hf_ilora import SASRecForNextItem",
        "from transformers import AutoConfig; import hf_ilora",
        "from transformers import AutoModel; import hf_ilora",
        "from transformers import Trainer, pipeline; import hf_ilora",
        "import threading, hf_ilora, transformers\n"
        "threads = [threading.Thread(target=getattr, args=(transformers, name)) for name in ('Trainer', 'AutoModel')]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()",
    ],
)
def test_every_import_order_ends_with_the_recommenders_registered(imports):
    check_after(imports)


def test_nothing_is_registered_without_hf_ilora():
    """The check above means nothing if transformers knew these types by itself."""
    done = run_python("from transformers import AutoConfig; AutoConfig.for_model('sasrec', num_items=5)")
    assert "Unrecognized model identifier: sasrec" in done.stderr


def test_watched_modules_keep_their_source_and_run_as_programs():
    done = run_python(
        "import hf_ilora, inspect, runpy, transformers.hf_argparser\n"
        "assert 'class HfArgumentParser' in inspect.getsource(transformers.hf_argparser)\n"
        "name = 'hf_ilora.models.next_item.next_item_output'\n"
        "assert runpy.run_module(name)['__name__'] == name"
    )
    assert done.returncode == 0, done.stderr
