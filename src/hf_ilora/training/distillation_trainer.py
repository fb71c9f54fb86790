"""A Trainer that teaches a next-item model with a teacher's answers: DLLM2Rec and further losses."""

import os
from collections.abc import Callable
from functools import reduce
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput

from hf_ilora.distillation.ensemble import AskedMember, EnsembleTeacher
from hf_ilora.distillation.ensemble_members import LabelScores, TitleSimilarity
from hf_ilora.distillation.losses import (
    NO_LABEL,
    STUDENT_LOSS,
    DLLM2RecLoss,
    distribution_loss,
    embedding_loss,
    label_weights,
    propensity_scores,
)
from hf_ilora.distillation.policies import (
    AllSamplesPolicy,
    KLDivergencePolicy,
    SamplePolicy,
    rank_gap_weights,
    sample_policy,
)
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.loading import load_recommender
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_output import NextItemOutput
from hf_ilora.titles.pca import pca_embeddings, whitened

from .distillation_arguments import DistillationArguments
from .label_collator import DistillationCollator, TeacherIndices
from .next_item_trainer import NextItemTrainer
from .soft_targets import SoftTargets, check_soft_targets
from .teacher_checks import check_labels_of_rows, check_teacher, check_teachers_catalogue, given_labels
from .windows import NextItemCollator, item_counts


class RankingTeacher(Protocol):
    """A teacher that is asked in every step."""

    def rank_items(self, histories: torch.Tensor, top_k: int, exclude_seen: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rank the catalogue after histories (batch, length), padded with 0.

        Returns:
            item_ids (batch, top_k), best first, and distances (batch, top_k), smaller for more confident answers.
        """


class DistillationTrainer(NextItemTrainer):
    """Trains a next-item model on its own labels and on a teacher's.

    The loss of a batch is base + alpha DROS + lam ranking (`DLLM2RecLoss`) + kl_weight KL + title_neighbours KL to the
    items whose titles are near the target's + embedding_weight distance.
    Every term is a sum over positions, divided by the number of labels of the whole accumulated and distributed batch:
    eight small batches give the gradient of one large one (except with form="reference", whose DROS term multiplies
    means of a batch). Each part is logged under its own name. A student whose configuration adds the teacher's item
    embeddings (`teacher_embedding_size`) gets them from the labels, and ends with a plain item table.

    Args:
        model: the student, a SASRec, GRU4Rec or Caser.
        args: `DistillationArguments`.
        teacher_labels: answers of a teacher about `train_dataset`, `TeacherLabels.load(...)`; or pass `teacher`.
        teacher: asked in every step: an `EnsembleTeacher`, a recommender, any object with `rank_items(histories, top_k,
            exclude_seen)`, or the folder or Hub name of a saved recommender. With distilled_positions "all" it is asked
            about every label, which an ensemble and its kinds of members can answer; stored labels among its members
            are used as if they were passed as `teacher_labels`. With `title_neighbours`, no teacher is needed.
        trust_remote_code: run code that comes with the language model of an iLoRA that `teacher` names.
        policy: chooses the labels that count, `select(student_scores, teacher_scores, target)`; None builds the one
            that the arguments name.
        kwargs: as in `NextItemTrainer`.

    Raises:
        TypeError: as `NextItemTrainer`.
        ValueError: for settings that do not fit the teacher or the data, and a first epoch that meets no teacher label.
    """

    arguments_class = DistillationArguments

    def __init__(
        self,
        model: EncoderForNextItem | None = None,
        args: DistillationArguments | None = None,
        data_collator: Callable | None = None,
        *,
        teacher_labels: TeacherLabels | None = None,
        teacher: RankingTeacher | str | os.PathLike | None = None,
        trust_remote_code: bool = False,
        policy: SamplePolicy | None = None,
        **kwargs: Any,
    ):
        args = self.checked_arguments(args)
        teacher_labels = given_labels(teacher, teacher_labels, args, kwargs.get("train_dataset"))
        self.teacher_labels = teacher_labels
        self.teacher: RankingTeacher | None = None  # set below
        self._ensemble: EnsembleTeacher | None = None  # of teachers that are asked about every position
        if policy is None:
            policy = sample_policy(args.policy, args.policy_threshold)
        self.policy = policy
        at_all_positions = args.distilled_positions == "all" or teacher is None or teacher_labels is not None
        self._needs_whole_scores = isinstance(policy, KLDivergencePolicy) or (args.kl_weight and not at_all_positions)
        check_teacher(teacher, teacher_labels, policy, args)
        super().__init__(model, args, data_collator, **kwargs)
        if teacher_labels is not None and self._train_rows is not None:
            check_labels_of_rows(teacher_labels, len(self._train_rows), self.model.config.num_items, args)
        if teacher is not None and args.top_k > self.model.config.num_items:
            raise ValueError(
                f"top_k is {args.top_k}: expected at most {self.model.config.num_items}, the number of items that the "
                "teacher ranks"
            )
        if isinstance(teacher, str | os.PathLike):
            teacher = load_recommender(str(teacher), trust_remote_code=trust_remote_code)
        if args.kl_weight and at_all_positions:
            if isinstance(teacher, EnsembleTeacher):
                self._ensemble = teacher
            else:
                member: object = teacher
                if teacher is None:
                    assert teacher_labels is not None  # see `check_teacher`
                    member = LabelScores(teacher_labels)
                self._ensemble = EnsembleTeacher([cast(AskedMember, member)], [1.0])  # it refuses what cannot be one
        else:
            self.teacher = teacher
        for asked in (self.teacher, self._ensemble):
            if isinstance(asked, nn.Module):
                asked.eval().to(self.args.device)
                check_teachers_catalogue(asked, self.model, asked is self._ensemble)
        self._build_losses()
        self._labels_met = 0  # by this process
        self.add_callback(_TeacherWasMetCallback(self))

    def _default_collator(self, args: DistillationArguments) -> Callable:
        if self.teacher_labels is None:
            return NextItemCollator()
        return DistillationCollator(self.teacher_labels)

    def batch_completion(self) -> Callable[[dict], dict]:
        args, names_items = self.args, None
        if args.num_scored_items is not None:
            names_items = "answers" if args.base_loss == STUDENT_LOSS else "labels"
        return TeacherIndices(args.distilled_positions, args.top_k, names_items)

    def _window_settings(self) -> dict:
        return super()._window_settings() | ({} if self.teacher_labels is None else {"with_origins": True})

    def _prepare_model(self, model: EncoderForNextItem, args: DistillationArguments) -> None:
        super()._prepare_model(model, args)
        if model.config.teacher_embedding_size is None:
            return
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ZeRO-3 spreads weights over processes, where the teacher's item embeddings cannot be folded: expected "
                "teacher_embedding_size=None, or another accelerate configuration"
            )
        if self.teacher_labels is not None:
            model.set_teacher_embeddings(self.teacher_labels.item_embeddings())

    def _start_items(self, model: EncoderForNextItem) -> None:
        if self.args.initial_items != "teacher":
            super()._start_items(model)
            return
        assert self.teacher_labels is not None  # see `check_teacher`
        embeddings = pca_embeddings(self.teacher_labels.item_embeddings(), model.config.hidden_size)
        model.start_from_item_embeddings(embeddings, self.args.initial_mixing)

    def _build_losses(self) -> None:
        args, config = self.args, self.model.config
        self._target_embeddings: torch.Tensor | None = None
        if args.embedding_weight:
            assert self.teacher_labels is not None  # see `check_teacher`
            table = pca_embeddings(self.teacher_labels.item_embeddings(), config.hidden_size)
            self._target_embeddings = table.to(args.device)  # (num_items + 1, hidden)
        propensity = None
        if args.alpha:
            if self._train_rows is None:
                raise ValueError(
                    f"alpha is {args.alpha} without a datasets.Dataset as train_dataset, whose items are counted for "
                    "the DROS terms: expected one, or alpha=0"
                )
            labelled_positions = self._labelled_positions(self.model, args)
            propensity = propensity_scores(item_counts(self._train_rows, config.num_items, labelled_positions)[1:])
        self._soft_targets = None
        if self._ensemble is not None or args.title_neighbours:
            check_soft_targets(args, self.model)
            similarity = None
            if args.title_neighbours:
                similarity = TitleSimilarity(whitened(self.item_title_embeddings())).to(args.device)
            self._soft_targets = SoftTargets(self._ensemble, similarity, args)
        self._students_parts = ("base_loss", *(self._soft_targets.parts if self._soft_targets is not None else ()))
        self.distillation_loss = DLLM2RecLoss(
            args.alpha,
            args.beta,
            args.lam,
            args.gamma_position,
            args.gamma_confidence,
            args.gamma_consistency,
            args.top_k,
            propensity=propensity,
            form=args.form,
            base_loss=args.base_loss,
            num_items=config.num_items,
        ).to(args.device)
        # Whether the loss reads only the scores of some items, and the ids of the best ones.
        self._looks_up_scores = (
            args.base_loss == STUDENT_LOSS
            and not args.alpha
            and args.num_scored_items is None
            and not args.rank_gap_weighting
            and isinstance(self.policy, AllSamplesPolicy)
            and not self._needs_whole_scores
            and (config.loss_type == "cross_entropy" or not args.gamma_consistency)
        )
        # Not under ZeRO-3, where all processes must use the same layers in a step, whatever their batches hold.
        self._may_share_scores = (
            args.base_loss == STUDENT_LOSS
            and config.loss_type == "cross_entropy"
            and args.num_scored_items is None
            and self._soft_targets is None
            and not self._looks_up_scores
            and not is_deepspeed_zero3_enabled()
        )
        has_teacher = self.teacher is not None or self.teacher_labels is not None
        learns_ranks = args.alpha or args.embedding_weight or args.base_loss != STUDENT_LOSS
        learns_ranks = learns_ranks or (has_teacher and (args.lam or self._needs_whole_scores))
        self._needs_scores = bool(learns_ranks)
        weights = {
            "base_loss": 1.0,
            "dro_loss": args.alpha,
            "ranking_loss": args.lam if self._needs_scores else 0.0,
            "kl_loss": args.kl_weight,
            "title_neighbour_loss": args.title_neighbours,
            "embedding_loss": args.embedding_weight,
        }
        if self._needs_scores and args.item_optimizer == "lazy_adam":
            raise ValueError(
                "item_optimizer is 'lazy_adam' with a loss on scores of the catalogue (lam, alpha, base_loss, "
                "embedding_weight, kl_direction): expected lam=0 and teachers that are asked at every position, or "
                "'same'"
            )
        always = ("ranking_loss",) if self._needs_scores else ()
        self._weights = {name: weight for name, weight in weights.items() if weight or name in always}
        self._logged = torch.zeros(len(self._weights), device=args.device)  # sums of the parts since step `_logged_at`
        self._logged_at: int | None = None  # a resumed run begins at a later one

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `NextItemTrainer.train`; at the end the teacher's item embeddings are folded into the item table."""
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.model.fold_teacher_embeddings()
        return result

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, NextItemOutput]:
        if not model.training:  # the validation loss is the student's own
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "teacher_indices" not in inputs:  # a batch of another data loader: completing it here waits for the device
            if self.teacher_labels is not None and "teacher_items" not in inputs:
                raise ValueError(
                    "the batch has no teacher_items: expected a datasets.Dataset as train_dataset, or batches of "
                    "DistillationCollator"
                )
            inputs = self.batch_completion()(inputs)
        inputs = dict(inputs)
        labels = inputs["labels"]  # (batch, length)
        named_items = inputs.pop("named_items", None)
        labelled = inputs["label_indices"]  # (labels,), in the flattened (batch * length)
        num_labels = len(labelled) if num_items_in_batch is None else num_items_in_batch
        asked, teacher_items, distances = self._teacher_answers(inputs)  # (asked,), (asked, k) twice or None
        self._labels_met += len(asked)
        soft_targets = None
        if self._soft_targets is not None:
            stored = None
            if teacher_items is not None and distances is not None:
                places = torch.searchsorted(labelled, asked)  # (asked,), of each in `labelled`
                size = len(labelled)
                stored = _spread(size, places, teacher_items), _spread(size, places, distances)
            soft_targets = self._soft_targets.of_batch(inputs["input_ids"], labelled, stored)
        if not self._needs_scores:
            outputs = model(**inputs, num_items_in_batch=num_items_in_batch, soft_targets=soft_targets)
            loss = outputs.loss
            self._log_parts(dict(zip(self._students_parts, outputs.loss_parts, strict=True)), loss)
            loss = self._over_processes(loss, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        has_student_loss = self.args.base_loss == STUDENT_LOSS
        # Where the teacher was asked about most labels, their scores give the student's own loss too: one pass over the
        # catalogue instead of two, at the price of scores for every label.
        shares_scores = self._may_share_scores and 2 * len(asked) > len(labelled)
        scored = asked if has_student_loss else labelled
        if not has_student_loss:  # the base loss reads every label, whether the teacher was asked about it or not
            assert teacher_items is not None and distances is not None
            places = torch.searchsorted(labelled, asked)  # (asked,), of each in `labelled`
            teacher_items = _spread(len(labelled), places, teacher_items)
            distances = _spread(len(labelled), places, distances)
        if not has_student_loss or shares_scores:
            del inputs["labels"], inputs["label_indices"]  # the student would compute its own loss
        targets = labels.flatten()[scored]  # (positions,)
        negatives = self._draw_negatives(targets)
        sample, num_best = self._sampled_items(named_items, negatives), 0  # (items,) or None
        if self._looks_up_scores:
            assert teacher_items is not None
            sample = self._looked_up_items(negatives, teacher_items)  # (asked, negatives + k)
            num_best = min(self.args.top_k, self.model.config.num_items) if self.args.gamma_consistency else 0
        outputs = model(
            **inputs,
            num_items_in_batch=num_items_in_batch,
            scored_positions=labelled if shares_scores else scored,
            scored_items=sample,
            soft_targets=soft_targets,
            num_best=num_best,
        )  # logits: (positions, items), or (positions, num_items + 1)
        if shares_scores:
            own_loss = F.cross_entropy(outputs.logits.float(), labels.flatten()[labelled], reduction="sum")
            outputs.loss = own_loss / num_labels
            if len(targets) < len(outputs.logits):
                outputs.logits = outputs.logits[torch.searchsorted(labelled, asked)]
        if self._looks_up_scores:
            if num_best:
                outputs.best_items = outputs.best_items[torch.searchsorted(labelled, asked)]  # (asked, k)
            parts = self._looked_up_parts(outputs, targets, negatives, teacher_items, distances)
        else:
            parts = self._parts(outputs, targets, negatives, teacher_items, distances, sample)
        if self.args.embedding_weight and len(targets):
            parts["embedding_loss"] = self._embedding_loss(outputs, targets, scored)
        parts = {name: value * (len(targets) / num_labels) for name, value in parts.items()}
        if has_student_loss:
            parts["base_loss"] = outputs.loss
        loss = reduce(torch.add, [self._weights[name] * value for name, value in parts.items()])
        if self._soft_targets is not None:  # their weighted sum is part of the student's loss
            parts |= dict(zip(self._students_parts, outputs.loss_parts, strict=True))
        self._log_parts(parts, loss)
        loss = self._over_processes(loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _over_processes(self, loss: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """A loss that is a mean over the labels of all processes, whose gradients are averaged."""
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            return loss * self.accelerator.num_processes
        return loss

    def _log_parts(self, parts: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        if self._logged_at is None:
            self._logged_at = self.state.global_step
        zero = loss.new_zeros(())
        self._logged += torch.stack([parts.get(name, zero).detach().float() for name in self._weights])

    def _teacher_answers(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Take the teacher's answers out of a batch, or ask the online teacher.

        Returns:
            asked (asked,), where there are teacher labels in the flattened (batch * length), and the items (asked, k)
            and distances (asked, k) there; None for teachers that are asked about the competing items.
        """
        asked = inputs.pop("teacher_indices")
        if self.teacher is None:
            return asked, inputs.pop("teacher_items", None), inputs.pop("teacher_distances", None)
        top_k = self.model.config.num_items if self._needs_whole_scores else self.args.top_k
        items, distances = self.teacher.rank_items(inputs["input_ids"], top_k=top_k, exclude_seen=False)
        rows = asked // inputs["labels"].shape[1]
        return asked, items[rows], distances[rows].float()

    def _draw_negatives(self, targets: torch.Tensor) -> torch.Tensor:
        """(positions, num_distillation_negatives) item ids, of targets (positions,); some may be targets."""
        shape = (len(targets), self.args.num_distillation_negatives)
        return torch.randint(1, self.model.config.num_items + 1, shape, device=targets.device)

    def _sampled_items(self, named_items: torch.Tensor | None, negatives: torch.Tensor) -> torch.Tensor | None:
        """Ids of the items to score, ascending and distinct: all named ones, and some drawn; None means all items.

        Their number is known beforehand, so that nothing waits for the device: where negatives are named already or
        twice, more items are drawn.
        """
        if self.args.num_scored_items is None:
            return None
        assert named_items is not None  # see `batch_completion`
        num_items = self.model.config.num_items
        size = min(num_items, len(named_items) + negatives.numel() + self.args.num_scored_items)
        keys = torch.rand(num_items + 1, device=negatives.device)
        keys[PADDING_ITEM_ID] = -1
        keys[named_items], keys[negatives.flatten()] = 2, 2
        return keys.topk(size).indices.sort().values

    def _looked_up_items(self, negatives: torch.Tensor, teacher_items: torch.Tensor) -> torch.Tensor:
        """(positions, negatives + k) item ids whose scores the ranking distillation reads; item 1 replaces padding."""
        return torch.cat([negatives, teacher_items[:, : self.args.top_k].clamp(min=1)], dim=1)

    def _looked_up_parts(
        self,
        outputs: NextItemOutput,
        targets: torch.Tensor,
        negatives: torch.Tensor,
        teacher_items: torch.Tensor | None,
        distances: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """As `_parts`, from the scores of `_looked_up_items` and the student's best items."""
        loss, top_k, scores = self.distillation_loss, self.args.top_k, outputs.logits
        assert scores is not None
        if not len(targets) or not loss.lam:
            return {"ranking_loss": scores.sum() * 0.0}  # with a gradient of zeros
        assert teacher_items is not None and distances is not None
        labels = teacher_items[:, :top_k].masked_fill(teacher_items[:, :top_k].eq(PADDING_ITEM_ID), NO_LABEL)
        weights = label_weights(labels, distances[:, :top_k], outputs.best_items, *loss.gammas)  # (positions, k)
        negative_scores, label_scores = scores.tensor_split([negatives.shape[1]], dim=1)
        of = (negative_scores, label_scores, negatives, targets.unsqueeze(1), labels)
        return {"ranking_loss": loss.ranking_loss(*of, weights)}

    def _embedding_loss(self, outputs: NextItemOutput, targets: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        """The mean distance between users and the teacher's embeddings of their targets, a scalar."""
        assert self._target_embeddings is not None and outputs.last_hidden_state is not None
        users = outputs.last_hidden_state.flatten(0, 1)[scored]  # (positions, hidden)
        wanted = self._target_embeddings[targets]  # (positions, hidden)
        return embedding_loss(users, wanted, self.args.embedding_loss).mean()

    def _parts(
        self,
        outputs: NextItemOutput,
        targets: torch.Tensor,
        negatives: torch.Tensor,
        teacher_items: torch.Tensor | None,
        distances: torch.Tensor | None,
        sample: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The parts of the loss on scores except the student's own: scalars, means over the scored positions."""
        scores = outputs.logits
        assert scores is not None
        if not len(targets):
            return {"ranking_loss": scores.sum()}  # the sum of no numbers: 0, with a gradient of zeros
        assert teacher_items is not None and distances is not None
        arguments = self.args
        columns, propensity = [targets, negatives, teacher_items], None
        if sample is not None:
            columns = [torch.searchsorted(sample, ids) for ids in columns]
            if arguments.alpha:
                assert self.distillation_loss.propensity is not None
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
        if arguments.kl_weight and teacher_scores is not None:
            divergence = distribution_loss(scores, teacher_scores, arguments.kl_temperature, arguments.kl_direction)
            parts["kl_loss"] = (divergence * sample_weights).mean()
        return parts

    def _sample_weights(
        self,
        scores: torch.Tensor,
        teacher_scores: torch.Tensor | None,
        target: torch.Tensor,
        teacher_columns: torch.Tensor,
    ) -> torch.Tensor:
        """How much each position's teacher labels count, (positions,): 0 where the policy leaves them out."""
        with torch.no_grad():
            weights = teacher_columns[:, 0].ne(NO_LABEL).float()
            if not isinstance(self.policy, AllSamplesPolicy):
                weights = weights * self.policy.select(scores, teacher_scores, target)
            if self.args.rank_gap_weighting:
                student_ranks = scores.ge(scores.gather(1, target.unsqueeze(1))).sum(1)  # (positions,)
                found = teacher_columns.eq(target.unsqueeze(1))  # (positions, k)
                teacher_ranks = found.int().argmax(1) + 1  # where the teacher names the truth at all
                weights = weights * found.any(1) * rank_gap_weights(student_ranks, teacher_ranks)
        return weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._logged_at is not None:
            # All processes reduce the same parts, even one that met no teacher label.
            steps = max(1, self.state.global_step - self._logged_at)
            means = self.accelerator.reduce(self._logged, reduction="sum") / steps
            if not self.args.average_tokens_across_devices:  # each process's parts are means of their own
                means = means / self.accelerator.num_processes
            logs |= dict(zip(self._weights, means.tolist(), strict=True))
            self._logged, self._logged_at = torch.zeros_like(self._logged), self.state.global_step
        super().log(logs, start_time)


class _TeacherWasMetCallback(TrainerCallback):
    """Ends a run whose first epoch met no teacher label: it would train without a teacher."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer, self.is_checked = trainer, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_checked:
            return
        self.is_checked = True
        met = torch.tensor(self.trainer._labels_met, device=args.device)
        if not self.trainer.accelerator.reduce(met, reduction="sum"):
            raise ValueError(
                "no batch of the first epoch had a teacher label: expected labels of the rows and positions that the "
                f"windows show (windows={args.windows!r}, distilled_positions={args.distilled_positions!r}); label "
                "all positions, or pass the split that was labelled as train_dataset"
            )


def _spread(length: int, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (asked, k) put at `places` (asked,): (length, k), zero elsewhere."""
    return rows.new_zeros(length, rows.shape[1]).index_copy(0, places, rows)


__all__ = ["DistillationTrainer"]
