"""The public names of hf_ilora and the modules that define them: read by `__init__.py`, and by type checkers."""

from hf_ilora.data.building import build_sequences as build_sequences
from hf_ilora.data.interactions import load_interactions as load_interactions
from hf_ilora.data.movielens import load_movielens as load_movielens
from hf_ilora.data.public_datasets import load_public_dataset as load_public_dataset
from hf_ilora.data.sequences import SequenceDatasets as SequenceDatasets
from hf_ilora.distillation.acquisition import acquire as acquire
from hf_ilora.distillation.ensemble import EnsembleTeacher as EnsembleTeacher
from hf_ilora.distillation.ensemble_members import TitleSimilarity as TitleSimilarity
from hf_ilora.distillation.losses import (
    DLLM2RecLoss as DLLM2RecLoss,
    dro_loss as dro_loss,
    propensity_scores as propensity_scores,
    ranking_distillation_weights as ranking_distillation_weights,
)
from hf_ilora.distillation.policies import (
    AllSamplesPolicy as AllSamplesPolicy,
    GroundTruthErrorPolicy as GroundTruthErrorPolicy,
    KLDivergencePolicy as KLDivergencePolicy,
)
from hf_ilora.distillation.teacher_labels import TeacherLabels as TeacherLabels
from hf_ilora.evaluation.answer_metrics import ValidRatio as ValidRatio
from hf_ilora.evaluation.beyond_accuracy import TrainingFacts as TrainingFacts, beyond_accuracy as beyond_accuracy
from hf_ilora.evaluation.list_metrics import (
    Coverage as Coverage,
    Deciles as Deciles,
    Diversity as Diversity,
    Gini as Gini,
    Novelty as Novelty,
    Serendipity as Serendipity,
)
from hf_ilora.evaluation.metric_folders import metric_folder as metric_folder
from hf_ilora.evaluation.metrics import (
    MAP as MAP,
    MRR as MRR,
    NDCG as NDCG,
    HitRatio as HitRatio,
    Precision as Precision,
    Recall as Recall,
)
from hf_ilora.evaluation.statistics import compare_runs as compare_runs
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig as ILoraConfig
from hf_ilora.models.ilora.gated_lora import GatedLoraLinear as GatedLoraLinear
from hf_ilora.models.ilora.gated_lora_config import GatedLoraConfig as GatedLoraConfig
from hf_ilora.models.ilora.gated_lora_model import (
    GatedLoraModel as GatedLoraModel,
    get_gated_lora_model as get_gated_lora_model,
)
from hf_ilora.models.ilora.modeling_ilora import (
    ILoraForRecommendation as ILoraForRecommendation,
    ILoraOutput as ILoraOutput,
)
from hf_ilora.models.ilora.title_generation import GeneratedRecommendation as GeneratedRecommendation
from hf_ilora.models.ilora.user_lora import user_lora as user_lora
from hf_ilora.models.next_item.catalogue import Catalogue as Catalogue
from hf_ilora.models.next_item.configuration_caser import CaserConfig as CaserConfig
from hf_ilora.models.next_item.configuration_counting import (
    PopularityConfig as PopularityConfig,
    TransitionCountsConfig as TransitionCountsConfig,
)
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig as GRU4RecConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig as SASRecConfig
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem as CaserForNextItem
from hf_ilora.models.next_item.modeling_counting import (
    PopularityForNextItem as PopularityForNextItem,
    TransitionCountsForNextItem as TransitionCountsForNextItem,
)
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem as GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem as SASRecForNextItem, SASRecModel as SASRecModel
from hf_ilora.models.next_item.next_item_output import NextItemOutput as NextItemOutput
from hf_ilora.models.next_item.recommendation_pipeline import (
    SequentialRecommendationPipeline as SequentialRecommendationPipeline,
)
from hf_ilora.reference.convert_models import (
    convert_reference as convert_reference,
    convert_reference_caser as convert_reference_caser,
    convert_reference_gru4rec as convert_reference_gru4rec,
    convert_reference_sasrec as convert_reference_sasrec,
)
from hf_ilora.serving.exact_item_index import ExactItemIndex as ExactItemIndex
from hf_ilora.serving.export import export as export
from hf_ilora.serving.item_index import ItemIndex as ItemIndex
from hf_ilora.serving.recommend_all import recommend_all as recommend_all
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings as cooccurrence_embeddings
from hf_ilora.titles.encoders import (
    TitleEncoder as TitleEncoder,
    encode_titles as encode_titles,
    item_title_embeddings as item_title_embeddings,
)
from hf_ilora.titles.item_titles import (
    ItemTitles as ItemTitles,
    add_items as add_items,
    fill_new_items as fill_new_items,
)
from hf_ilora.titles.joint import joint_item_embeddings as joint_item_embeddings
from hf_ilora.titles.pca import pca_embeddings as pca_embeddings, whitened as whitened
from hf_ilora.training.distillation_arguments import DistillationArguments as DistillationArguments
from hf_ilora.training.distillation_trainer import DistillationTrainer as DistillationTrainer
from hf_ilora.training.ilora_arguments import ILoraTrainingArguments as ILoraTrainingArguments
from hf_ilora.training.ilora_trainer import ILoraTrainer as ILoraTrainer
from hf_ilora.training.next_item_arguments import NextItemTrainingArguments as NextItemTrainingArguments
from hf_ilora.training.next_item_trainer import NextItemTrainer as NextItemTrainer

__version__: str
__all__: list[str]
