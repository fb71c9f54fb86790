"""Policies that select which rows of a batch to distil, and weights of the rows.

A policy's `select` takes the scores of student and teacher, (batch, items), and the targets, (batch,), as columns of
both. It returns a bool mask (batch,) to pass to `DLLM2RecLoss` as `sample_weights`, alone or times `rank_gap_weights`.
"""

from dataclasses import dataclass

import torch

from hf_ilora.distillation.losses import check_temperature, distribution_loss
from hf_ilora.models.next_item.padding import lowest_and_highest


@dataclass(frozen=True)
class AllSamplesPolicy:
    """Distil every row. The teacher's scores are not read."""

    def select(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) bool, all true."""
        return torch.ones(len(student_scores), dtype=torch.bool, device=student_scores.device)


@dataclass(frozen=True)
class GroundTruthErrorPolicy:
    """Distil the rows whose target the student scores below a threshold. The teacher's scores are not read.

    Args:
        threshold: limit of the target's score, in the units of the student's scores.
    """

    threshold: float

    def select(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) bool, true where the student's score of the target is below the threshold."""
        return student_scores.gather(1, target.unsqueeze(1)).squeeze(1) < self.threshold


@dataclass(frozen=True)
class KLDivergencePolicy:
    """Distil the rows in which the student diverges from the teacher.

    Args:
        threshold: limit of KL(teacher || student), in nats.
        temperature: divides both scores.

    Raises:
        ValueError: for a negative threshold, which would select every row, and a temperature that is not positive.
    """

    threshold: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(
                f"threshold is {self.threshold}: expected 0 or more nats; AllSamplesPolicy selects every row"
            )
        check_temperature(self.temperature)

    @torch.no_grad()
    def select(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) bool, true where the divergence is above the threshold.

        Raises:
            ValueError: without the teacher's scores, and for shapes that differ.
        """
        if teacher_scores is None:
            raise ValueError(
                "teacher_scores is None: expected the teacher's scores, (batch, items); without them, use "
                "AllSamplesPolicy or GroundTruthErrorPolicy"
            )
        scaled = distribution_loss(student_scores, teacher_scores, self.temperature)  # (batch,)
        return scaled / self.temperature**2 > self.threshold


SamplePolicy = AllSamplesPolicy | GroundTruthErrorPolicy | KLDivergencePolicy

SAMPLE_POLICIES = {
    "all": AllSamplesPolicy,
    "ground_truth_error": GroundTruthErrorPolicy,
    "kl_divergence": KLDivergencePolicy,
}


def sample_policy(name: str, threshold: float = 0.0) -> SamplePolicy:
    """Create a policy by its name.

    Args:
        name: "all", "ground_truth_error" or "kl_divergence".
        threshold: the policy's threshold, see its class; ignored by "all".

    Raises:
        ValueError: for another name, and for a threshold that the policy's class rejects.
    """
    if name not in SAMPLE_POLICIES:
        raise ValueError(f"policy is {name!r}: expected one of {', '.join(SAMPLE_POLICIES)}")
    return AllSamplesPolicy() if name == "all" else SAMPLE_POLICIES[name](threshold)


def rank_gap_weights(
    student_ranks: torch.Tensor, teacher_ranks: torch.Tensor, sharpness: float = 0.1, floor: float = 0.0
) -> torch.Tensor:
    """Weights that grow with how much higher the teacher ranks the target than the student does.

    Args:
        student_ranks: (batch,) ranks of the target; 1 is the best.
        teacher_ranks: (batch,); if the target is not among the teacher's items, one more than their number.
        sharpness: how fast the weight grows per rank of difference. At 0.1, a difference of 10 ranks gives a weight of
            0.76, a difference of 30 nearly 1.
        floor: weight of the rows in which the student ranks the target at least as high as the teacher does.

    Returns:
        (batch,) float32 in [floor, 1].

    Raises:
        ValueError: for shapes that differ, ranks below 1, and settings outside their range.

    Source: the discrepancy-aware weight of Ranking Distillation (KDD 2018), which weights each of the teacher's items;
    this one weights the target. The floor is an addition.
    """
    if student_ranks.dim() != 1 or student_ranks.shape != teacher_ranks.shape:
        raise ValueError(
            f"student_ranks have shape {tuple(student_ranks.shape)} and teacher_ranks {tuple(teacher_ranks.shape)}: "
            "expected the same (batch,)"
        )
    for name, ranks in (("student_ranks", student_ranks), ("teacher_ranks", teacher_ranks)):
        found = lowest_and_highest(ranks)
        if found is not None and found[0] < 1:
            raise ValueError(f"{name} contain {found[0]}: expected ranks of at least 1, the best")
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}: expected a positive number")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}: expected a number in [0, 1]")
    gap = (student_ranks - teacher_ranks).float().clamp(min=0)  # (batch,) ranks
    return floor + (1 - floor) * torch.tanh(sharpness * gap)
