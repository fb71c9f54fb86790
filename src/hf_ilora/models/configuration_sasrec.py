"""Configuration of SASRec."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

PADDING_ITEM_ID = 0

_CHOICES = {
    "block_type": ("pre_norm", "reference"),
    "position_alignment": ("newest", "oldest"),
    "loss_type": ("cross_entropy", "sampled_softmax", "gbce", "bce"),
    "negative_sharing": ("batch", "position"),
}


@strict
class SASRecConfig(PreTrainedConfig):
    r"""Architecture and training loss of a SASRec model.

    Args:
        num_items: size of the catalogue; item ids run 1..num_items and 0 is padding.
        hidden_size: width of the item embeddings and of every block.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; divides `hidden_size`.
        intermediate_size: width of the feed-forward layer; `None` means 4 x `hidden_size` (`hidden_size` for the
            reference block, which has no wider layer).
        max_length: number of newest items the model reads.
        hidden_dropout: dropout on the embeddings and on each residual branch.
        attention_dropout: dropout on the attention probabilities.
        layer_norm_eps: epsilon of every layer normalisation.
        initializer_range: standard deviation of the normal initialisation.
        block_type: "pre_norm" (pre-normalised, GELU) or "reference" (the block of LLaRA, iLoRA and DLLM2Rec).
        position_alignment: which end of the history has a fixed position: "newest" or "oldest".
        tie_word_embeddings: score items with the input embedding table instead of a separate one.
        head_bias: add a learned bias per item to the scores.
        attention_decay: let each head's attention fade with distance, at a speed that it learns (ALiBi, ICLR 2022, with
            learned slopes).
        repeat_bias: learn one number that is added to the scores of the items among the last `max_length`, so that the
            model need not spend its hidden states on whether users come back to an item (needs "cross_entropy").
        score_temperature: `None` scores by dot product; a number scores by cosine similarity divided by it.
        loss_type: "cross_entropy" (the whole catalogue), "sampled_softmax", "gbce" or "bce".
        num_negatives: negatives drawn per training step ("batch") or per position ("position").
        negative_sharing: whether one draw of negatives serves the whole batch or each position has its own.
        popularity_power: negatives are drawn in proportion to item count ** power; 0 draws uniformly.
        logq_correction: subtract log q(item) from the scores of the sampled softmax (Bengio and Senecal 2008), so
            that its expected gradient approaches that of the whole softmax.
        gbce_calibration: t of gBCE (gSASRec, RecSys 2023, eq. 15): 0 is plain BCE, 1 is fully calibrated.

    Source: SASRec (ICDM 2018); the losses are in `next_item_losses.py`.
    """

    model_type = "sasrec"
    keys_to_ignore_at_inference = ["last_hidden_state", "user_embedding"]

    num_items: int | None = None
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    max_length: int = 50
    hidden_dropout: float | int = 0.2
    attention_dropout: float | int = 0.2
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    block_type: str = "pre_norm"
    position_alignment: str = "newest"
    tie_word_embeddings: bool = True
    head_bias: bool = False
    attention_decay: bool = False
    repeat_bias: bool = False
    score_temperature: float | int | None = None
    loss_type: str = "cross_entropy"
    num_negatives: int = 256
    negative_sharing: str = "batch"
    popularity_power: float | int = 0.0
    logq_correction: bool = True
    gbce_calibration: float | int = 0.75
    pad_token_id: int | None = PADDING_ITEM_ID

    def validate_architecture(self):
        """Check the ranges of all fields; `@strict` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        if self.num_items is not None and self.num_items < 1:
            raise ValueError(f"num_items is {self.num_items}: expected the size of the catalogue, at least 1")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_length", "num_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
                "change one of them"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability in [0, 1)")
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"gbce_calibration is {self.gbce_calibration}: expected a number in [0, 1]")
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(f"score_temperature is {self.score_temperature}: expected a positive number or None")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.repeat_bias and self.loss_type != "cross_entropy":
            raise ValueError(
                f"repeat_bias with loss_type {self.loss_type!r}: expected cross_entropy, since sampled negatives "
                "hardly ever meet a seen item; switch one of them off"
            )
        if self.pad_token_id != PADDING_ITEM_ID:
            raise ValueError(f"pad_token_id is {self.pad_token_id}: expected {PADDING_ITEM_ID}, item ids start at 1")


__all__ = ["PADDING_ITEM_ID", "SASRecConfig"]
