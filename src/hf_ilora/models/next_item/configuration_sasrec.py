"""Configuration of SASRec."""

from .configuration_next_item import NextItemConfig, strict_config

_CHOICES = {"block_type": ("pre_norm", "reference"), "position_alignment": ("newest", "oldest")}


@strict_config
class SASRecConfig(NextItemConfig):
    r"""Architecture and training loss of a SASRec model; the fields of `NextItemConfig` come first.

    Args:
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; divides `hidden_size`.
        intermediate_size: width of the feed-forward layer; `None` means 4 x `hidden_size` (`hidden_size` for the
            reference block, which has no wider layer).
        attention_dropout: dropout on the attention probabilities; `hidden_dropout` is on the embeddings and on each
            residual branch.
        layer_norm_eps: epsilon of every layer normalisation.
        block_type: "pre_norm" (pre-normalised, GELU) or "reference" (the block of LLaRA, iLoRA and DLLM2Rec).
        position_alignment: which end of the history has a fixed position: "newest" or "oldest".
        attention_decay: let each head's attention fade with distance, at a speed that it learns (ALiBi, ICLR 2022, with
            learned slopes).

    Source: SASRec (ICDM 2018); the losses are in `next_item_losses.py`.
    """

    model_type = "sasrec"

    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    attention_dropout: float | int = 0.2
    layer_norm_eps: float = 1e-5
    block_type: str = "pre_norm"
    position_alignment: str = "newest"
    attention_decay: bool = False

    def validate_architecture(self) -> None:
        """Check the ranges of all fields; `@strict_config` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        super().validate_architecture()
        self.check_at_least_one("num_hidden_layers", "num_attention_heads")
        if self.intermediate_size is not None:
            self.check_at_least_one("intermediate_size")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        self.check_probabilities("attention_dropout")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps}: expected a positive number")
        self.check_choices(_CHOICES)


SASRecConfig.register_for_auto_class()

__all__ = ["SASRecConfig"]
