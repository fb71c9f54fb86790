"""Arguments of distillation."""

from dataclasses import dataclass, field
from typing import ClassVar

from hf_ilora.distillation.losses import BASE_LOSSES, FORMS, STUDENT_LOSS
from hf_ilora.distillation.policies import SAMPLE_POLICIES

from .initial_items import INITIAL_ITEMS
from .next_item_arguments import NextItemTrainingArguments
from .windows import LABELLED_POSITIONS

DISTILLED_INITIAL_ITEMS = (*INITIAL_ITEMS, "teacher")
DIRECTIONS = ("forward", "reverse")
EMBEDDING_LOSSES = ("mse", "cosine")


@dataclass
class DistillationArguments(NextItemTrainingArguments):
    r"""Training of a next-item model on a teacher's answers: `NextItemTrainingArguments` with the settings below.

    > Parameters that control the losses

    Args:
        base_loss: loss of the true next item: "student" (the model's own, `loss_type`), or over the scores of the
            distilled positions "bce" (as DLLM2Rec), "cross_entropy", "sampled_softmax" or "gbce".
        form: "corrected", or "reference": the arithmetic of DLLM2Rec's program to the digit.
        alpha, beta: weight and temperature of the DROS terms.
        lam: weight of the ranking distillation.
        gamma_position, gamma_confidence, gamma_consistency: parts of a teacher item's weight by its rank, by the
            teacher's confidence, and by being among the student's own best.
        kl_weight, kl_temperature, kl_direction: divergence between the distributions of teacher and student: with
            distilled_positions "last" over the whole catalogue, with "all" over the items that the student's own loss
            scores (with kl_temperature 1 and "forward"; an `EnsembleTeacher` has a temperature).
        title_neighbours, title_neighbour_temperature: weight of the divergence from a distribution over the items
            whose titles are near the target's: the softmax of their cosines, divided by the temperature.
        embedding_weight, embedding_loss: distance between the user embedding and the teacher's embedding of the target.
        num_scored_items: items drawn per step to score beside targets and teacher items; `None` scores the catalogue.
        num_distillation_negatives: negatives per position.

    > Parameters that choose what is distilled

    Args:
        distilled_positions: "last", the newest label of each window, or "all".
        top_k: teacher items per label that count.
        policy, policy_threshold: the labels that count: "all", "ground_truth_error" or "kl_divergence" with its
            threshold.
        rank_gap_weighting: weigh labels by how much higher than the student the teacher ranks the truth.

    > Parameters that control the item embeddings

    Args:
        initial_items: also "teacher": the principal components of the labels' item embeddings.

    Raises:
        ValueError: for settings out of range or that contradict each other.

    Source: DLLM2Rec (arXiv 2405.00338), sections 4.1 to 4.3.
    """

    initial_items_choices: ClassVar[tuple[str, ...]] = DISTILLED_INITIAL_ITEMS

    initial_items: str = field(
        default="random",
        metadata={
            "help": "item embeddings of the untrained student: random, cooccurrence, plain_cooccurrence (no logarithm, "
            "for data in which most items are rare), titles, titles_and_cooccurrence (no logarithm), "
            "titles_and_log_cooccurrence, or teacher (principal components of the labels' item embeddings)",
        },
    )
    policy: str = field(
        default="all",
        metadata={
            "choices": tuple(SAMPLE_POLICIES),
            "help": "labels that count: all, ground_truth_error or kl_divergence",
        },
    )
    policy_threshold: float = field(
        default=0.0,
        metadata={
            "help": "limit of the target's score for ground_truth_error, of the divergence in nats for kl_divergence"
        },
    )
    base_loss: str = field(
        default=STUDENT_LOSS,
        metadata={
            "help": "loss of the true next item: student (its own, loss_type), bce (as in DLLM2Rec), cross_entropy, "
            "sampled_softmax or gbce over the distilled positions' scores"
        },
    )
    form: str = field(
        default="corrected", metadata={"help": "corrected, or reference: the published arithmetic to the digit"}
    )
    alpha: float = field(
        default=0.0,
        metadata={
            "help": "weight of the DROS terms (DLLM2Rec: 1): of the labels that the teacher was asked about with "
            "base_loss student, else of all"
        },
    )
    beta: float = field(default=1.0, metadata={"help": "temperature of the DROS terms"})
    lam: float = field(default=0.8, metadata={"help": "weight of the ranking distillation"})
    gamma_position: float = field(default=0.3, metadata={"help": "share of a label's weight by its rank"})
    gamma_confidence: float = field(default=0.5, metadata={"help": "share by the teacher's confidence"})
    gamma_consistency: float = field(default=0.1, metadata={"help": "share by being in the student's own top k"})
    top_k: int = field(default=10, metadata={"help": "teacher items per label that count"})
    distilled_positions: str = field(
        default="last", metadata={"help": "last (as in DLLM2Rec): the newest label of each window; all: every label"}
    )
    num_scored_items: int | None = field(
        default=None,
        metadata={"help": "items drawn per step to score beside targets and teacher items; by default the catalogue"},
    )
    num_distillation_negatives: int = field(default=1, metadata={"help": "negatives per position (DLLM2Rec: 1)"})
    kl_weight: float = field(
        default=0.0, metadata={"help": "weight of the divergence between the distributions of teacher and student"}
    )
    title_neighbours: float = field(
        default=0.0,
        metadata={"help": "weight of the divergence from the items whose titles are near the target's; needs titles"},
    )
    title_neighbour_temperature: float = field(
        default=0.1, metadata={"help": "divides the cosines of titles in that divergence"}
    )
    kl_temperature: float = field(default=1.0, metadata={"help": "divides both models' scores in that divergence"})
    kl_direction: str = field(default="forward", metadata={"help": "forward: KL(teacher || student), or reverse"})
    embedding_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of the distance between user embedding and the teacher's embedding of the target, at the "
            "same positions as alpha's terms"
        },
    )
    embedding_loss: str = field(default="cosine", metadata={"help": "that distance: mse or cosine"})
    rank_gap_weighting: bool = field(
        default=False,
        metadata={
            "help": "weigh labels by how much higher than the student the teacher ranks the truth; 0 where the truth "
            "is not among the teacher's items"
        },
    )

    def __post_init__(self) -> None:
        choices = {
            "policy": tuple(SAMPLE_POLICIES),
            "base_loss": (STUDENT_LOSS, *BASE_LOSSES),
            "form": FORMS,
            "distilled_positions": LABELLED_POSITIONS,
            "kl_direction": DIRECTIONS,
            "embedding_loss": EMBEDDING_LOSSES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("kl_temperature", "title_neighbour_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number above 0")
        for name in ("kl_weight", "embedding_weight", "title_neighbours"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number, 0 or more")
        if self.num_distillation_negatives < 1 or (self.num_scored_items is not None and self.num_scored_items < 2):
            raise ValueError(
                f"num_distillation_negatives is {self.num_distillation_negatives}, num_scored_items "
                f"{self.num_scored_items}: expected at least 1 and 2"
            )
        super().__post_init__()
        if self.item_table == "row_sharded":
            raise ValueError("item_table is 'row_sharded' in a distillation: expected 'replicated'")


__all__ = ["DistillationArguments"]
