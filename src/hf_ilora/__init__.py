"""hf_ilora: LLM recommenders, distilled into a SASRec that is cheap to serve.

Every public name is imported on first use, so that ``import hf_ilora`` loads neither torch nor datasets.
"""

import importlib

from ._registration import register_with_auto_classes

__version__ = "0.1.0"

_EXPORTS = {
    "AllSamplesPolicy": "hf_ilora.distillation.policies",
    "CaserConfig": "hf_ilora.models.next_item.configuration_caser",
    "CaserForNextItem": "hf_ilora.models.next_item.modeling_caser",
    "Catalogue": "hf_ilora.models.next_item.catalogue",
    "DLLM2RecLoss": "hf_ilora.distillation.losses",
    "DistillationArguments": "hf_ilora.training.distillation_arguments",
    "DistillationTrainer": "hf_ilora.training.distillation_trainer",
    "GRU4RecConfig": "hf_ilora.models.next_item.configuration_gru4rec",
    "GRU4RecForNextItem": "hf_ilora.models.next_item.modeling_gru4rec",
    "GatedLoraLinear": "hf_ilora.models.ilora.gated_lora",
    "GeneratedRecommendation": "hf_ilora.models.ilora.title_generation",
    "GroundTruthErrorPolicy": "hf_ilora.distillation.policies",
    "HitRatio": "hf_ilora.evaluation.metrics",
    "ILoraConfig": "hf_ilora.models.ilora.configuration_ilora",
    "ILoraForRecommendation": "hf_ilora.models.ilora.modeling_ilora",
    "ILoraOutput": "hf_ilora.models.ilora.modeling_ilora",
    "ILoraTrainer": "hf_ilora.training.ilora_trainer",
    "ILoraTrainingArguments": "hf_ilora.training.ilora_arguments",
    "KLDivergencePolicy": "hf_ilora.distillation.policies",
    "MRR": "hf_ilora.evaluation.metrics",
    "NDCG": "hf_ilora.evaluation.metrics",
    "NextItemTrainer": "hf_ilora.training.next_item_trainer",
    "NextItemTrainingArguments": "hf_ilora.training.next_item_arguments",
    "NextItemOutput": "hf_ilora.models.next_item.next_item_output",
    "PopularityConfig": "hf_ilora.models.next_item.configuration_counting",
    "PopularityForNextItem": "hf_ilora.models.next_item.modeling_counting",
    "Recall": "hf_ilora.evaluation.metrics",
    "SASRecConfig": "hf_ilora.models.next_item.configuration_sasrec",
    "SASRecForNextItem": "hf_ilora.models.next_item.modeling_sasrec",
    "SASRecModel": "hf_ilora.models.next_item.modeling_sasrec",
    "SequenceDatasets": "hf_ilora.data.sequences",
    "TeacherLabels": "hf_ilora.distillation.teacher_labels",
    "TransitionCountsConfig": "hf_ilora.models.next_item.configuration_counting",
    "TransitionCountsForNextItem": "hf_ilora.models.next_item.modeling_counting",
    "ValidRatio": "hf_ilora.evaluation.metrics",
    "acquire": "hf_ilora.distillation.acquisition",
    "build_sequences": "hf_ilora.data.sequences",
    "compare_runs": "hf_ilora.evaluation.statistics",
    "convert_reference_sasrec": "hf_ilora.reference.convert_sasrec",
    "dro_loss": "hf_ilora.distillation.losses",
    "load_interactions": "hf_ilora.data.interactions",
    "load_movielens": "hf_ilora.data.movielens",
    "pca_embeddings": "hf_ilora.titles.pca",
    "propensity_scores": "hf_ilora.distillation.losses",
    "ranking_distillation_weights": "hf_ilora.distillation.losses",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_ilora' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


register_with_auto_classes()
