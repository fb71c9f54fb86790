"""Configuration of Caser."""

from collections.abc import Sequence

from .configuration_next_item import NextItemConfig, strict_config

_CHOICES = {"block_type": ("paper", "reference")}


@strict_config
class CaserConfig(NextItemConfig):
    r"""Architecture and training loss of a Caser model; the fields of `NextItemConfig` come first.

    `max_length` is the L of the paper: there are filters of every height up to it, so its default is short.
    `hidden_dropout` applies to the output of the filters, as in the paper. The paper scores with a separate item table
    and biases: `tie_word_embeddings=False, head_bias=True`.

    Args:
        block_type: "paper" (a layer projects the output of the filters to `hidden_size`) or "reference" (the Caser of
            LLaRA and DLLM2Rec: the newest items are padded after the last one, the vertical filter has a ReLU, and the
            output of the filters is the user embedding, which needs a head with a separate item table).
        filter_heights: heights of the horizontal filters, in items; `None` means 1 to `max_length` ("paper") or 2, 3
            and 4 ("reference").
        num_horizontal_filters: filters of each height, which see whole items.
        num_vertical_filters: filters that weigh the positions, with the same weights for every embedding dimension;
            `None` means 4 ("paper") or 1 ("reference", which accepts no other number).

    Source: Caser (WSDM 2018); "reference": the published programs of LLaRA and DLLM2Rec.
    """

    model_type = "caser"

    max_length: int = 5
    block_type: str = "paper"
    filter_heights: list[int] | None = None
    num_horizontal_filters: int = 16
    num_vertical_filters: int | None = None

    @property
    def horizontal_heights(self) -> Sequence[int]:
        """The heights of the horizontal filters, `filter_heights` or its default."""
        if self.filter_heights is not None:
            return self.filter_heights
        return [2, 3, 4] if self.block_type == "reference" else range(1, self.max_length + 1)

    @property
    def vertical_filters(self) -> int:
        """`num_vertical_filters` or its default."""
        if self.num_vertical_filters is not None:
            return self.num_vertical_filters
        return 1 if self.block_type == "reference" else 4

    @property
    def num_filter_outputs(self) -> int:
        """Size of the concatenated outputs of all filters for one history."""
        horizontal = len(self.horizontal_heights) * self.num_horizontal_filters
        return horizontal + self.vertical_filters * self.hidden_size

    @property
    def user_embedding_size(self) -> int:
        """Size of the user embedding that the head scores items with."""
        return self.num_filter_outputs if self.block_type == "reference" else self.hidden_size

    def validate_architecture(self) -> None:
        """Check the ranges of all fields; `@strict_config` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        super().validate_architecture()
        self.check_choices(_CHOICES)
        self.check_at_least_one("num_horizontal_filters")
        if self.num_vertical_filters is not None:
            self.check_at_least_one("num_vertical_filters")
        heights = self.horizontal_heights
        if not isinstance(heights, range) and not self._are_heights(heights):  # a range is valid by construction
            raise ValueError(
                f"filter_heights are {heights}: expected different heights from 1 to max_length, {self.max_length}"
            )
        if self.block_type == "reference":
            if self.vertical_filters != 1:
                raise ValueError(f"num_vertical_filters is {self.vertical_filters}: expected 1 in the reference block")
            if self.tie_word_embeddings:
                raise ValueError(
                    "tie_word_embeddings is True with the reference block, whose user embedding has "
                    f"{self.user_embedding_size} numbers and an item {self.hidden_size}: pass tie_word_embeddings=False"
                )

    def _are_heights(self, heights: Sequence[int]) -> bool:
        in_range = all(1 <= height <= self.max_length for height in heights)
        return len(heights) > 0 and in_range and len(set(heights)) == len(heights)


CaserConfig.register_for_auto_class()

__all__ = ["CaserConfig"]
