"""A Trainer that teaches a next-item model with a teacher's rankings, DLLM2Rec's way and beyond."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.distillation.losses import (
    BASE_LOSSES,
    FORMS,
    NO_LABEL,
    DLLM2RecLoss,
    distribution_loss,
    embedding_loss,
    propensity_scores,
)
from hf_ilora.distillation.policies import KLDivergencePolicy, rank_gap_weights
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID

from .label_collator import POSITIONS, newest_only

STUDENT_LOSS = "student"
DIRECTIONS = ("forward", "reverse")
EMBEDDING_LOSSES = ("mse", "cosine")


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments with the settings of distillation; everything else can be set as usual."""

    remove_unused_columns: bool = False  # the collator reads columns that no forward names
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    base_loss: str = field(
        default=STUDENT_LOSS,
        metadata={
            "help": "loss of the true next item: student (its own, loss_type), bce (as published), cross_entropy, "
            "sampled_softmax or gbce over the distilled positions' scores"
        },
    )
    form: str = field(
        default="corrected", metadata={"help": "corrected, or reference: the published arithmetic to the digit"}
    )
    alpha: float = field(
        default=0.0,
        metadata={
            "help": "weight of the DROS terms (1 as published): of the labels that the teacher was asked about with "
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
        default="last", metadata={"help": "last (as published): the newest label of each window; all: every label"}
    )
    num_scored_items: int | None = field(
        default=None,
        metadata={"help": "items drawn per step to score beside targets and teacher items; by default the catalogue"},
    )
    num_distillation_negatives: int = field(default=1, metadata={"help": "negatives per position (1 as published)"})
    kl_weight: float = field(
        default=0.0, metadata={"help": "weight of the divergence between whole distributions; needs an online teacher"}
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

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "base_loss": (STUDENT_LOSS, *BASE_LOSSES),
            "form": FORMS,
            "distilled_positions": POSITIONS,
            "kl_direction": DIRECTIONS,
            "embedding_loss": EMBEDDING_LOSSES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("kl_weight", "embedding_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number, 0 or more")
        if self.num_distillation_negatives < 1 or (self.num_scored_items is not None and self.num_scored_items < 2):
            raise ValueError(
                f"num_distillation_negatives is {self.num_distillation_negatives}, num_scored_items "
                f"{self.num_scored_items}: expected at least 1 and 2"
            )


class DistillationTrainer(Trainer):
    """Trains a next-item model on its own labels and on a teacher's.

    The loss of a batch is base + alpha DROS + lam ranking (`DLLM2RecLoss`) + kl_weight KL + embedding_weight distance.
    Every term is a sum over positions, divided by the number of labels of the whole accumulated and distributed batch:
    eight small batches give the gradient of one large one (except with form="reference", whose DROS term multiplies
    means of a batch). Each part is logged under its own name.

    Args:
        model: the student, any next-item model of this package.
        args: `DistillationArguments`.
        teacher: an online teacher, with `rank_items(histories, top_k, exclude_seen)`; None reads `teacher_items` and
            `teacher_distances` of the batches, which `DistillationCollator` puts there.
        item_counts: (num_items + 1,) occurrences in training, for DROS.
        policy: chooses which labels count, `select(student_scores, teacher_scores, target)`; None takes all.
        teacher_embeddings: (num_items + 1, hidden) embeddings of the titles in the student's size, such as
            `pca_embeddings` gives, for the embedding loss.
        kwargs: as in `Trainer`.

    Raises:
        ValueError: when a weight is positive and what it needs is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        args: DistillationArguments,
        *,
        teacher=None,
        item_counts: torch.Tensor | None = None,
        policy=None,
        teacher_embeddings: torch.Tensor | None = None,
        **kwargs,
    ):
        if args.kl_weight and teacher is None:
            raise ValueError(
                f"kl_weight is {args.kl_weight} without an online teacher: expected one, since labels hold the "
                "teacher's best items only; set kl_weight to 0"
            )
        if isinstance(policy, KLDivergencePolicy) and teacher is None:
            raise ValueError(
                "KLDivergencePolicy without an online teacher: expected one, whose whole scores it compares"
            )
        if teacher is not None and args.num_scored_items is not None:
            raise ValueError(
                f"num_scored_items is {args.num_scored_items} with an online teacher, which ranks the whole catalogue: "
                "expected None, or labels"
            )
        if teacher is not None and args.distilled_positions != "last":
            raise ValueError(
                "distilled_positions is all with an online teacher, which is asked about whole histories: expected "
                "last, or labels of recipes/label_with_teacher.py"
            )
        if args.embedding_weight and teacher_embeddings is None:
            raise ValueError(
                f"embedding_weight is {args.embedding_weight} without teacher_embeddings: expected the item embeddings "
                "of the teacher in the student's size (pca_embeddings)"
            )
        if args.alpha and item_counts is None:
            raise ValueError(f"alpha is {args.alpha} without item_counts: expected the counts of the training items")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs: expected one each; start with accelerate launch, since what is "
                "scored must not be divided among copies of the student"
            )
        super().__init__(model, args, **kwargs)
        device = self.args.device
        self.teacher, self.policy = teacher, policy
        self._needs_whole_scores = bool(args.kl_weight) or isinstance(policy, KLDivergencePolicy)
        self.teacher_embeddings = None if teacher_embeddings is None else teacher_embeddings.to(device)
        self.distillation_loss = DLLM2RecLoss(
            args.alpha,
            args.beta,
            args.lam,
            args.gamma_position,
            args.gamma_confidence,
            args.gamma_consistency,
            args.top_k,
            propensity=None if item_counts is None else propensity_scores(item_counts[1:]),
            form=args.form,
            base_loss=args.base_loss,
            num_items=self.model.config.num_items,
        ).to(device)
        # Not under ZeRO-3, where all processes must use the same layers in a step, whatever their batches hold.
        self._may_share_scores = (
            args.base_loss == STUDENT_LOSS
            and self.model.config.loss_type == "cross_entropy"
            and args.num_scored_items is None
            and not is_deepspeed_zero3_enabled()
        )
        self._weights = {
            "base_loss": 1.0,
            "dro_loss": args.alpha,
            "ranking_loss": args.lam,
            "kl_loss": args.kl_weight,
            "embedding_loss": args.embedding_weight,
        }
        self._weights = {name: weight for name, weight in self._weights.items() if weight or name == "ranking_loss"}
        self._logged = torch.zeros(len(self._weights), device=device)  # sums of the parts since step `_logged_at`
        self._logged_at: int | None = None  # a resumed run begins at a later one

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        if not model.training:  # the validation loss is the student's own
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs["labels"]  # (batch, length)
        labelled = labels.ne(IGNORED_LABEL)
        asked, teacher_items, distances = self._teacher_labels(inputs, labelled)  # (batch, length), (asked, k) twice
        has_student_loss = self.args.base_loss == STUDENT_LOSS
        # Where the teacher was asked about most labels, their scores give the student's own loss too: one pass over the
        # catalogue instead of two, at the price of scores for every label.
        shares_scores = self._may_share_scores and bool(2 * asked.sum() > labelled.sum())
        scored = asked if has_student_loss else labelled
        if not has_student_loss:  # the base loss wants every label, whether the teacher was asked about it or not
            teacher_items, distances = (_spread(asked[scored], rows) for rows in (teacher_items, distances))
        if not has_student_loss or shares_scores:
            del inputs["labels"]  # the student would compute its own loss
        targets = labels[scored]  # (positions,)
        negatives = torch.randint(
            1,
            self.model.config.num_items + 1,
            (len(targets), self.args.num_distillation_negatives),
            device=targets.device,
        )
        sample = self._sampled_items(targets, negatives, teacher_items)  # (items,) or None
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            scored_positions=labelled if shares_scores else scored,
            scored_items=sample,
        )  # logits: (positions, items), or (positions, num_items + 1)
        num_labels = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        if shares_scores:
            own_loss = F.cross_entropy(outputs.logits.float(), labels[labelled], reduction="sum")
            outputs.loss = own_loss / num_labels
            if len(targets) < len(outputs.logits):
                outputs.logits = outputs.logits[asked[labelled]]
        parts = self._parts(outputs, targets, negatives, teacher_items, distances, scored, sample)
        parts = {name: value * (len(targets) / num_labels) for name, value in parts.items()}
        if has_student_loss:
            parts["base_loss"] = outputs.loss
        loss = sum(self._weights[name] * value for name, value in parts.items())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the processes' gradients are averaged
        if self._logged_at is None:
            self._logged_at = self.state.global_step
        zero = loss.new_zeros(())
        self._logged += torch.stack([parts.get(name, zero).detach().float() for name in self._weights])
        return (loss, outputs) if return_outputs else loss

    def _teacher_labels(self, inputs: dict, labelled: torch.Tensor):
        """Takes the teacher's part out of a batch, or asks the online teacher.

        Returns:
            asked (batch, length) bool, where there are teacher labels, and the items (asked, k) and distances (asked,
            k) there.
        """
        if self.teacher is None:
            if "teacher_items" not in inputs:
                raise ValueError(
                    "the batch has no teacher_items: expected batches of DistillationCollator, or an online teacher"
                )
            items, distances = inputs.pop("teacher_items"), inputs.pop("teacher_distances")  # (batch, length, k)
            asked = items[..., 0].ne(PADDING_ITEM_ID)
            return asked, items[asked][:, : self.args.top_k], distances[asked][:, : self.args.top_k]
        top_k = self.model.config.num_items if self._needs_whole_scores else self.args.top_k
        items, distances = self.teacher.rank_items(inputs["input_ids"], top_k=top_k, exclude_seen=False)
        asked = newest_only(labelled)
        has_label = asked.any(1)  # (batch,)
        return asked, items[has_label], distances[has_label].float()

    def _sampled_items(self, targets, negatives, teacher_items) -> torch.Tensor | None:
        """Ids of the items to score, ascending and different: all that is named, and some drawn; None means all."""
        if self.args.num_scored_items is None:
            return None
        named = torch.cat([part.flatten() for part in (targets, negatives, teacher_items)])
        drawn = torch.randint(1, self.model.config.num_items + 1, (self.args.num_scored_items,), device=named.device)
        sample = torch.cat([named, drawn]).unique()
        return sample[sample != PADDING_ITEM_ID]

    def _parts(self, outputs, targets, negatives, teacher_items, distances, scored, sample) -> dict[str, torch.Tensor]:
        """The parts of the loss but the student's own, scalars, as means over the scored positions."""
        if not len(targets):
            return {"ranking_loss": outputs.logits.sum()}  # of no numbers: 0, with a gradient of zeros
        arguments = self.args
        scores, columns, propensity = outputs.logits, [targets, negatives, teacher_items], None
        if sample is not None:
            columns = [torch.searchsorted(sample, ids) for ids in columns]
            if arguments.alpha:
                propensity = self.distillation_loss.propensity[sample - 1]
        elif arguments.alpha or self._needs_whole_scores:
            # Without padding, which these terms would read. Elsewhere its -inf does no harm, and a slice costs a copy.
            scores, columns = scores[:, 1:], [ids - 1 for ids in columns]
        target, negative, teacher_columns = columns
        teacher_columns = teacher_columns.masked_fill(teacher_items.eq(PADDING_ITEM_ID), NO_LABEL)
        teacher_scores = None
        if self._needs_whole_scores:
            # Positions about which the teacher was not asked get equal scores, and no weight.
            teacher_scores = torch.zeros_like(distances).scatter_(1, teacher_columns.clamp(min=0), -distances)
        sample_weights = self._sample_weights(scores, teacher_scores, target, teacher_columns)  # (positions,)
        losses = self.distillation_loss(
            scores, target, negative, teacher_columns, distances, sample_weights, propensity
        )
        parts = {"ranking_loss": losses.ranking_loss}
        if arguments.base_loss != STUDENT_LOSS:
            parts["base_loss"] = losses.base_loss
        if arguments.alpha:
            parts["dro_loss"] = losses.dro_loss
        if arguments.kl_weight:
            divergence = distribution_loss(scores, teacher_scores, arguments.kl_temperature, arguments.kl_direction)
            parts["kl_loss"] = (divergence * sample_weights).mean()
        if arguments.embedding_weight:
            users = outputs.last_hidden_state[scored]  # (positions, hidden)
            wanted = self.teacher_embeddings[targets]  # (positions, hidden)
            parts["embedding_loss"] = embedding_loss(users, wanted, arguments.embedding_loss).mean()
        return parts

    def _sample_weights(self, scores, teacher_scores, target, teacher_columns) -> torch.Tensor:
        """How much each position's teacher labels count, (positions,): 0 where the policy leaves them out."""
        with torch.no_grad():
            weights = teacher_columns[:, 0].ne(NO_LABEL).float()
            if self.policy is not None:
                weights = weights * self.policy.select(scores, teacher_scores, target)
            if self.args.rank_gap_weighting:
                student_ranks = scores.ge(scores.gather(1, target.unsqueeze(1))).sum(1)  # (positions,)
                found = teacher_columns.eq(target.unsqueeze(1))  # (positions, k)
                teacher_ranks = found.int().argmax(1) + 1  # where the teacher names the truth at all
                weights = weights * found.any(1) * rank_gap_weights(student_ranks, teacher_ranks)
        return weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._logged_at is not None:
            # All processes reduce the same parts, also one that met no teacher label.
            steps = max(1, self.state.global_step - self._logged_at)
            means = self.accelerator.reduce(self._logged, reduction="sum") / steps
            if not self.args.average_tokens_across_devices:  # each process's parts are means of their own
                means = means / self.accelerator.num_processes
            logs |= dict(zip(self._weights, means.tolist(), strict=True))
            self._logged, self._logged_at = torch.zeros_like(self._logged), self.state.global_step
        super().log(logs, start_time)


def _spread(kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (kept ones, k) put where `kept` (all,) is True: (all, k), zero elsewhere."""
    spread = rows.new_zeros(len(kept), rows.shape[1])
    spread[kept] = rows
    return spread


__all__ = ["DistillationArguments", "DistillationTrainer"]
