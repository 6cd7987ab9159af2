"""Shares of training, validation and test as Megatron writes them: `9999,8,2`. Pure.

split_ranges("8,1,1", 20)  # [(0, 16), (16, 18), (18, 20)]
"""

from itertools import accumulate, pairwise

from weightcast.sync.errors import ConfigError

NUM_SPLITS = 3


def parse_split(split: str) -> list[float]:
    """Three shares that sum to 1. Raises `ConfigError`."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= NUM_SPLITS or min(shares) < 0 or shares[0] == 0 or not sum(shares) < float("inf"):
        raise ConfigError(
            f"dataset.split={split!r} must be up to three numbers, of training, validation and test, such as 9999,8,2"
        )
    return [share / sum(shares) for share in (*shares, *[0.0] * (NUM_SPLITS - len(shares)))]


def split_ranges(split: str, num_items: int) -> list[tuple[int, int]]:
    """From where to where each split goes, in items; rounded as Megatron rounds."""
    bounds = [0.0, *accumulate(parse_split(split))]
    places = [round(bound * num_items) for bound in bounds]
    return list(pairwise(places))
