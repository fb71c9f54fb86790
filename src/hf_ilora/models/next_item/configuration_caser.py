"""Configuration of Caser."""

from huggingface_hub.dataclasses import strict

from .configuration_next_item import NextItemConfig


@strict
class CaserConfig(NextItemConfig):
    r"""Architecture and training loss of a Caser model; the fields of `NextItemConfig` come first.

    `max_length` is the L of the paper: there are filters of every height up to it, so its default is short.
    `hidden_dropout` applies to the output of the filters, as in the paper. The paper scores with a table and biases of
    their own: `tie_word_embeddings=False, head_bias=True`.

    Args:
        num_horizontal_filters: filters of each height 1..max_length, which see whole items.
        num_vertical_filters: filters that weigh the positions, the same for each number of the embeddings.

    Source: Caser (WSDM 2018).
    """

    model_type = "caser"

    max_length: int = 5
    num_horizontal_filters: int = 16
    num_vertical_filters: int = 4

    def validate_architecture(self):
        """Check the ranges of all fields; `@strict` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        super().validate_architecture()
        self.check_at_least_one("num_horizontal_filters", "num_vertical_filters")


CaserConfig.register_for_auto_class()

__all__ = ["CaserConfig"]
