"""Configuration of GRU4Rec."""

from huggingface_hub.dataclasses import strict

from .configuration_next_item import NextItemConfig


@strict
class GRU4RecConfig(NextItemConfig):
    r"""Architecture and training loss of a GRU4Rec model; the fields of `NextItemConfig` come first.

    `hidden_dropout` applies to the embeddings, between the layers and to their output. The paper scores with a table
    and biases of their own: `tie_word_embeddings=False, head_bias=True`.

    Args:
        num_hidden_layers: layers of the GRU.

    Source: GRU4Rec (ICLR 2016).
    """

    model_type = "gru4rec"

    num_hidden_layers: int = 1

    def validate_architecture(self):
        """Check the ranges of all fields; `@strict` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        super().validate_architecture()
        self.check_at_least_one("num_hidden_layers")


GRU4RecConfig.register_for_auto_class()

__all__ = ["GRU4RecConfig"]
