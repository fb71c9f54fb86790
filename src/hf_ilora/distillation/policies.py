"""Which rows of a batch to distil, and how much each counts.

A policy's `select` reads scores of student and teacher (batch, items) and the target (batch,), a column of both, and
returns a bool mask (batch,), which goes into `DLLM2RecLoss` as `sample_weights`, alone or times `rank_gap_weights`.
"""

from dataclasses import dataclass

import torch

from hf_ilora.distillation.losses import check_temperature, distribution_loss


@dataclass(frozen=True)
class AllSamplesPolicy:
    """Distil every row; no scores of the teacher are needed."""

    def select(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) bool, all true."""
        return torch.ones(len(student_scores), dtype=torch.bool, device=student_scores.device)


@dataclass(frozen=True)
class GroundTruthErrorPolicy:
    """Distil the rows whose true item the student scores below a threshold; no scores of the teacher are needed.

    Args:
        threshold: in the units of the student's scores.
    """

    threshold: float

    def select(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        """(batch,) bool, true where the student's score of the target is below the threshold."""
        return student_scores.gather(1, target.unsqueeze(1)).squeeze(1) < self.threshold


@dataclass(frozen=True)
class KLDivergencePolicy:
    """Distil the rows in which the student is far from the teacher.

    Args:
        threshold: of KL(teacher || student), in nats.
        temperature: divides both scores.

    Raises:
        ValueError: for a negative threshold, which would take every row, and a temperature that is not positive.
    """

    threshold: float
    temperature: float = 1.0

    def __post_init__(self):
        if not self.threshold >= 0:
            raise ValueError(
                f"threshold is {self.threshold}: expected 0 or more nats; AllSamplesPolicy takes every row"
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
                "teacher_scores are None: expected (batch, items) scores of the teacher; without them use "
                "AllSamplesPolicy or GroundTruthErrorPolicy"
            )
        scaled = distribution_loss(student_scores, teacher_scores, self.temperature)  # (batch,)
        return scaled / self.temperature**2 > self.threshold


def rank_gap_weights(
    student_ranks: torch.Tensor, teacher_ranks: torch.Tensor, sharpness: float = 0.1, floor: float = 0.0
) -> torch.Tensor:
    """Weights that grow with how much higher the teacher ranks the true item than the student does.

    Args:
        student_ranks: (batch,) ranks of the target, 1 is the best.
        teacher_ranks: (batch,); where the target is not among the teacher's items, one more than their number.
        sharpness: per place of difference; at 0.1 a difference of 10 places weighs 0.76, one of 30 nearly 1.
        floor: weight of the rows in which the student ranks the target as high as the teacher, or higher.

    Returns:
        (batch,) float32 in [floor, 1].

    Raises:
        ValueError: for shapes that differ, ranks below 1, and settings outside their range.

    Source: the discrepancy-aware weight of Ranking Distillation (KDD 2018), there of each of the teacher's items, here
    of the true one. The floor is an addition.
    """
    if student_ranks.dim() != 1 or student_ranks.shape != teacher_ranks.shape:
        raise ValueError(
            f"student_ranks have shape {tuple(student_ranks.shape)} and teacher_ranks {tuple(teacher_ranks.shape)}: "
            "expected the same (batch,)"
        )
    for name, ranks in (("student_ranks", student_ranks), ("teacher_ranks", teacher_ranks)):
        if ranks.device.type == "cpu" and len(ranks) and ranks.min() < 1:
            raise ValueError(f"{name} hold {ranks.min().item()}: expected ranks from 1, the best")
    if not sharpness > 0:
        raise ValueError(f"sharpness is {sharpness}: expected a positive number")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}: expected a number in [0, 1]")
    gap = (student_ranks - teacher_ranks).float().clamp(min=0)  # (batch,) places
    return floor + (1 - floor) * torch.tanh(sharpness * gap)
