"""AutoConfig and AutoModel know the models of hf_ilora once it is imported, whatever was imported before."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    GRU4RecConfig,
    GRU4RecForNextItem,
    ILoraConfig,
    ILoraForRecommendation,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    SequentialRecommendationPipeline,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)

NEXT_ITEM_MODELS = [
    (SASRecConfig, SASRecForNextItem),
    (GRU4RecConfig, GRU4RecForNextItem),
    (CaserConfig, CaserForNextItem),
    (PopularityConfig, PopularityForNextItem),
    (TransitionCountsConfig, TransitionCountsForNextItem),
]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("config_class", "model_class"), NEXT_ITEM_MODELS)
def test_auto_classes_make_and_load_each_model(config_class, model_class, tmp_path):
    config = AutoConfig.for_model(config_class.model_type, num_items=5)
    assert type(config) is config_class and config.num_items == 5
    model = AutoModel.from_config(config)
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    assert type(AutoModel.from_pretrained(tmp_path)) is model_class


def test_auto_classes_know_ilora():
    """tests/models/test_loading.py loads one."""
    assert type(AutoConfig.for_model("ilora")) is ILoraConfig
    assert AutoModel._model_mapping[ILoraConfig] is ILoraForRecommendation


def test_the_pipeline_is_registered():
    """tests/models/next_item/test_recommendation_pipeline.py uses it."""
    task = PIPELINE_REGISTRY.check_task("sequential-recommendation")[1]
    assert task["impl"] is SequentialRecommendationPipeline and task["pt"] == (AutoModel,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["from transformers import AutoModel\nimport hf_ilora", "import hf_ilora\nfrom transformers import AutoModel"],
)
def test_the_order_of_imports_does_not_matter(imports):
    done = run_python(f"{imports}\nprint(type(AutoModel.from_config(hf_ilora.SASRecConfig(num_items=5))).__name__)")
    assert done.stdout.strip() == "SASRecForNextItem", done.stderr


def test_nothing_is_registered_without_hf_ilora():
    """The checks above mean nothing if transformers knew these types by itself."""
    done = run_python("from transformers import AutoConfig; AutoConfig.for_model('sasrec', num_items=5)")
    assert "Unrecognized model identifier: sasrec" in done.stderr
