"""Configurations of the recommenders that only count: popularity and transition counts."""

from transformers import PreTrainedConfig

from .configuration_next_item import PADDING_ITEM_ID, check_finite, strict_config


@strict_config
class PopularityConfig(PreTrainedConfig):
    r"""Recommends the items that occur most often in the training rows, regardless of the history.

    Args:
        num_items: size of the catalogue; item ids run 1..num_items and 0 is padding.
        max_length: number of newest items that are passed to the model, which ignores them.
    """

    model_type = "popularity"

    num_items: int | None = None
    max_length: int = 1
    pad_token_id: int | None = PADDING_ITEM_ID

    def validate_architecture(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        check_finite(self)
        _check_sizes(num_items=self.num_items, max_length=self.max_length)


@strict_config
class TransitionCountsConfig(PreTrainedConfig):
    r"""Decayed skip-transition counts: which items follow, a few steps later, the newest items of the history.

    Args:
        num_items: size of the catalogue; item ids run 1..num_items and 0 is padding.
        num_transitions: number of item pairs that the model stores; `fit` sets it.
        max_gap: largest distance, in steps, of two items of a training row that count as a pair.
        gap_decay: a pair at distance g counts gap_decay ** (g - 1).
        backward_weight: how much a pair also counts in reverse order: 0 keeps the order of time, 1 ignores it.
        source_power: counts are divided by the total count of the earlier item ** source_power.
        target_power: counts are divided by the popularity of the later item ** target_power.
        max_length: number of newest items of a history that the scores are read from.
        history_decay: the newest item weighs 1, the m-th newest history_decay ** (m - 1).
        popularity_weight: weight of popularity, scaled to at most 1, which is added to the transition scores. It orders
            the items that no transition reaches.
    """

    model_type = "transition_counts"

    num_items: int | None = None
    num_transitions: int = 0
    max_gap: int = 5
    gap_decay: float | int = 0.7
    backward_weight: float | int = 0.3
    source_power: float | int = 0.5
    target_power: float | int = 0.25
    max_length: int = 5
    history_decay: float | int = 0.7
    popularity_weight: float | int = 1e-4
    pad_token_id: int | None = PADDING_ITEM_ID

    def validate_architecture(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        check_finite(self)
        _check_sizes(num_items=self.num_items, max_length=self.max_length, max_gap=self.max_gap)
        if self.num_transitions < 0:
            raise ValueError(f"num_transitions is {self.num_transitions}: expected at least 0; `fit` sets it")
        for name, value in (("gap_decay", self.gap_decay), ("history_decay", self.history_decay)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}: expected a number in (0, 1]")
        for name, value in (
            ("backward_weight", self.backward_weight),
            ("source_power", self.source_power),
            ("target_power", self.target_power),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}: expected a number in [0, 1]")
        if self.popularity_weight < 0:
            raise ValueError(f"popularity_weight is {self.popularity_weight}: expected at least 0")


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")


PopularityConfig.register_for_auto_class()
TransitionCountsConfig.register_for_auto_class()

__all__ = ["PopularityConfig", "TransitionCountsConfig"]
