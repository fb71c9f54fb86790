"""Which random seeds there are."""

# numpy's older generators take no others, and no generator of numpy takes a negative one.
SEEDS = range(2**32)


def check_seed(name: str, seed: int | None) -> None:
    """Raise a ValueError for a random seed that a generator would refuse later; None means no seed."""
    if seed is not None and seed not in SEEDS:
        raise ValueError(f"{name} is {seed}: expected a whole number from 0 to {SEEDS[-1]}")


__all__ = ["SEEDS", "check_seed"]
