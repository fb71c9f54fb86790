"""hf_ilora: LLM recommenders, distilled into a SASRec that is cheap to serve.

Importing the package registers its models with `AutoConfig` and `AutoModel`, and its pipeline with `pipeline`. Every
other public name is imported on first use, so that ``import hf_ilora`` loads neither datasets nor evaluate.
"""

import ast
import importlib
from pathlib import Path

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.configuration_caser import CaserConfig
from hf_ilora.models.next_item.configuration_counting import PopularityConfig, TransitionCountsConfig
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
from hf_ilora.models.next_item.configuration_next_item import TASK
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.recommendation_pipeline import SequentialRecommendationPipeline

__version__ = "0.1.0"

# AutoModel gives the whole recommender rather than a bare encoder such as SASRecModel: `recommend` needs the head, and
# the models that count have no encoder.
_MODELS = {
    SASRecConfig: SASRecForNextItem,
    GRU4RecConfig: GRU4RecForNextItem,
    CaserConfig: CaserForNextItem,
    PopularityConfig: PopularityForNextItem,
    TransitionCountsConfig: TransitionCountsForNextItem,
    ILoraConfig: ILoraForRecommendation,
}
for _config_class, _model_class in _MODELS.items():
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)
PIPELINE_REGISTRY.register_pipeline(TASK, SequentialRecommendationPipeline, pt_model=AutoModel)

# Public name -> the module that defines it. __init__.pyi lists them once, for type checkers too.
_EXPORTS = {
    alias.name: statement.module
    for statement in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom)
    for alias in statement.names
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_ilora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
