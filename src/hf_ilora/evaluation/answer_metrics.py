"""The share of valid answers as `evaluate.Metric`."""

from typing import Any

import datasets
import evaluate

from hf_ilora.evaluation.named_candidates import is_valid


class ValidRatio(evaluate.Metric):
    """Fraction of generated answers that name exactly one of their candidates.

    `ValidRatio().compute(predictions=["Heat", "I like films"], references=[["Heat", "Alien"]] * 2)` is 0.5. It takes
    texts instead of flags, so that the same rule, `is_valid`, applies everywhere.

    Args:
        first_line_only: ignore what follows the first line of an answer, as the programs of LLaRA and iLoRA do.
        keep_in_memory, kwargs: as in `evaluate.Metric`.
    """

    description = "Fraction of generated answers that contain exactly one candidate title, ignoring case."
    inputs = (
        "- `predictions`: (users,) texts, the generated answers.\n"
        "- `references`: (users, candidates of the user) texts, the titles of each answer's candidates."
    )

    def __init__(self, first_line_only: bool = False, keep_in_memory: bool = True, **kwargs: Any):
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)
        self.first_line_only = first_line_only

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.inputs,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """Fraction of valid answers, as {"valid_ratio": 0.5}.

        Args:
            predictions: (users,) texts.
            references: (users, candidates) titles.

        Raises:
            ValueError: for no predictions, no candidates, and blank titles.
        """
        if not len(predictions):
            raise ValueError("valid_ratio of no answers: expected predictions, the generated text of at least one user")
        valid = [
            is_valid(answer, titles, self.first_line_only)
            for answer, titles in zip(predictions, references, strict=True)
        ]
        return {"valid_ratio": sum(valid) / len(valid)}
