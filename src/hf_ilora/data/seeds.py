"""The range of random seeds that every generator accepts."""

# numpy's older generators refuse larger seeds, and all of its generators refuse negative ones.
SEEDS = range(2**32)


def check_seed(name: str, seed: int | None) -> None:
    """Raise a ValueError for a random seed that a generator would refuse later; None, for no seed, is accepted."""
    if seed is not None and seed not in SEEDS:
        raise ValueError(f"{name} is {seed}: expected a whole number from 0 to {SEEDS[-1]}")


__all__ = ["SEEDS", "check_seed"]
