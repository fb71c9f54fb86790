"""hf_ilora: LLM recommenders, distilled into a SASRec that is cheap to serve.

Importing the package registers its models with `AutoConfig` and `AutoModel`, and its pipeline with `pipeline`. Every
other public name is imported on first use, so that ``import hf_ilora`` loads neither datasets nor evaluate.
"""

import importlib

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.configuration_caser import CaserConfig
from hf_ilora.models.next_item.configuration_counting import PopularityConfig, TransitionCountsConfig
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.recommendation_pipeline import TASK, SequentialRecommendationPipeline

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

_EXPORTS = {
    "AllSamplesPolicy": "hf_ilora.distillation.policies",
    "Catalogue": "hf_ilora.models.next_item.catalogue",
    "DLLM2RecLoss": "hf_ilora.distillation.losses",
    "DistillationArguments": "hf_ilora.training.distillation_arguments",
    "DistillationTrainer": "hf_ilora.training.distillation_trainer",
    "EnsembleTeacher": "hf_ilora.distillation.ensemble",
    "GatedLoraConfig": "hf_ilora.models.ilora.gated_lora_config",
    "GatedLoraLinear": "hf_ilora.models.ilora.gated_lora",
    "GatedLoraModel": "hf_ilora.models.ilora.gated_lora_model",
    "GeneratedRecommendation": "hf_ilora.models.ilora.title_generation",
    "GroundTruthErrorPolicy": "hf_ilora.distillation.policies",
    "HitRatio": "hf_ilora.evaluation.metrics",
    "ILoraOutput": "hf_ilora.models.ilora.modeling_ilora",
    "ILoraTrainer": "hf_ilora.training.ilora_trainer",
    "ILoraTrainingArguments": "hf_ilora.training.ilora_arguments",
    "ItemIndex": "hf_ilora.serving.item_index",
    "ItemTitles": "hf_ilora.titles.item_titles",
    "KLDivergencePolicy": "hf_ilora.distillation.policies",
    "MAP": "hf_ilora.evaluation.metrics",
    "MRR": "hf_ilora.evaluation.metrics",
    "NDCG": "hf_ilora.evaluation.metrics",
    "NextItemTrainer": "hf_ilora.training.next_item_trainer",
    "NextItemTrainingArguments": "hf_ilora.training.next_item_arguments",
    "NextItemOutput": "hf_ilora.models.next_item.next_item_output",
    "Precision": "hf_ilora.evaluation.metrics",
    "Recall": "hf_ilora.evaluation.metrics",
    "SASRecModel": "hf_ilora.models.next_item.modeling_sasrec",
    "SequenceDatasets": "hf_ilora.data.sequences",
    "SequentialRecommendationPipeline": "hf_ilora.models.next_item.recommendation_pipeline",
    "TeacherLabels": "hf_ilora.distillation.teacher_labels",
    "TitleSimilarity": "hf_ilora.distillation.ensemble_members",
    "TrainingFacts": "hf_ilora.evaluation.beyond_accuracy",
    "ValidRatio": "hf_ilora.evaluation.answer_metrics",
    "acquire": "hf_ilora.distillation.acquisition",
    "add_items": "hf_ilora.titles.item_titles",
    "beyond_accuracy": "hf_ilora.evaluation.beyond_accuracy",
    "build_sequences": "hf_ilora.data.sequences",
    "compare_runs": "hf_ilora.evaluation.statistics",
    "convert_reference": "hf_ilora.reference.convert_models",
    "convert_reference_caser": "hf_ilora.reference.convert_models",
    "convert_reference_gru4rec": "hf_ilora.reference.convert_models",
    "convert_reference_sasrec": "hf_ilora.reference.convert_models",
    "cooccurrence_embeddings": "hf_ilora.titles.cooccurrence",
    "dro_loss": "hf_ilora.distillation.losses",
    "encode_titles": "hf_ilora.titles.encoders",
    "export": "hf_ilora.serving.export",
    "fill_new_items": "hf_ilora.titles.item_titles",
    "get_gated_lora_model": "hf_ilora.models.ilora.gated_lora_model",
    "item_title_embeddings": "hf_ilora.titles.encoders",
    "joint_item_embeddings": "hf_ilora.titles.joint",
    "load_interactions": "hf_ilora.data.interactions",
    "load_movielens": "hf_ilora.data.movielens",
    "load_public_dataset": "hf_ilora.data.public_datasets",
    "metric_folder": "hf_ilora.evaluation.metric_folders",
    "pca_embeddings": "hf_ilora.titles.pca",
    "propensity_scores": "hf_ilora.distillation.losses",
    "ranking_distillation_weights": "hf_ilora.distillation.losses",
    "recommend_all": "hf_ilora.serving.recommend_all",
    "user_lora": "hf_ilora.models.ilora.user_lora",
    "whitened": "hf_ilora.titles.pca",
}

__all__ = sorted([*_EXPORTS, *(part.__name__ for pair in _MODELS.items() for part in pair)])


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_ilora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
