"""The curriculum of LLaRA and iLoRA: item embeddings enter the prompts gradually."""

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback


class CurriculumCallback(TrainerCallback):
    """Raises the share of training examples that carry item embeddings from 0 to 1; the others have plain placeholders.

    Args:
        num_steps: optimizer steps after which every example carries item embeddings; the share grows linearly.

    Raises:
        ValueError: for fewer than one step.

    Source: LLaRA (SIGIR 2024), section 3.3, which iLoRA takes over.
    """

    def __init__(self, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}: expected at least 1")
        self.num_steps = num_steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        extract_model_from_parallel(model).item_embedding_probability = min(1.0, state.global_step / self.num_steps)


__all__ = ["CurriculumCallback"]
