"""Whether a version goes as whole chunks, as deltas, or as compressed deltas. Pure; one line says why.

    choice = choose_delta(DeltaRates(link=125e6, encode=11e9, apply=16e9), ratio=0.0087, has_base=True)
    choice.mode, choice.reason

Making, sending and applying run at the same time, so a way costs what its slowest part costs. Seconds a dense byte, at
r delta bytes a dense byte, z compressed bytes a delta byte:

    dense      1 / link
    delta      max(1 / encode, r / link, 1 / apply)
    zdelta     max(1 / encode + r / compress, r z / link, 1 / apply + r / decompress)

A way is left for one that is a fifth cheaper; from dense that means encode and apply above 1.25 link. So zstandard
pays below a link of about 0.8 r / (1 / encode + r / compress). What was not measured yet counts nothing, so that each
way is tried once where it may pay. A delta needs a base that the receiver has acknowledged.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from weightcast.sync.errors import ConfigError

Mode: TypeAlias = Literal["dense", "delta", "zdelta"]
WANTED = ("auto", "on", "off", "zstd")
MAX_RATIO = 0.5  # above it a delta is no gain worth its work, and tensors fall back to dense by themselves
MAX_CHAIN = 0.5
GAIN = 0.8  # a way must cost less than this share of the one in use
RETRY_AFTER = 25  # versions without a delta, after which its ratio is no longer known


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRates:
    """Measured speeds, bytes per second, over all that work at once; None where there is no measurement yet."""

    link: float | None = None
    """To the slowest receiver: bytes on the wire a second, as dense versions show it. A delta's bytes come no faster
    than they are made, so they say little of the link."""
    encode: float | None = None
    """Dense bytes that are compared and encoded."""
    apply: float | None = None
    """Dense bytes that deltas are applied to, on the slowest receiver."""
    compress: float | None = None
    """Delta bytes that zstandard compresses."""
    decompress: float | None = None
    """Delta bytes that it gives back."""
    compressed_share: float | None = None
    """z: compressed bytes over delta bytes, when last seen."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; a measured speed is above 0 and finite, and None if unknown")


@dataclass(frozen=True, slots=True)
class DeltaChoice:
    """A mode, and why, in one line."""

    mode: Mode
    reason: str

    def __str__(self) -> str:
        return f"{self.mode}: {self.reason}"


def choose_delta(
    rates: DeltaRates,
    ratio: float | None,
    *,
    has_base: bool,
    same_host: bool = False,
    wanted: str = "auto",
    current: Mode = "dense",
    chain: float = 0.0,
    num_dense: int = 0,
) -> DeltaChoice:
    """How the next version goes.

    `ratio` is the last version's delta bytes over its dense bytes (None before the first), `chain` the bytes of all
    deltas since the last dense version over dense bytes, `num_dense` how many versions went dense since the last
    delta. `wanted` is the user's word: auto, on, off or zstd. Raises `ConfigError` for another one.
    """
    if wanted not in WANTED:
        raise ConfigError(f"delta={wanted!r} is no choice; use one of {WANTED}")
    if must := _why_dense(wanted, has_base, same_host, chain):
        return DeltaChoice("dense", must)
    if wanted != "auto":
        return DeltaChoice("zdelta" if wanted == "zstd" else "delta", "as asked for")
    if ratio is not None and num_dense >= RETRY_AFTER:
        ratio = None
    if ratio is not None and ratio >= MAX_RATIO:
        return DeltaChoice("dense", f"deltas are {ratio:.0%} of dense, {MAX_RATIO:.0%} and more do not pay")
    choice = _cheapest(_costs(rates, ratio), current)
    if choice.mode != "dense" and ratio is None:
        return DeltaChoice(choice.mode, f"{choice.reason}; how much changes is to be measured")
    if choice.mode == "zdelta" and rates.compress is None:
        return DeltaChoice(choice.mode, f"{choice.reason}; zstandard is to be measured")
    return choice


def _why_dense(wanted: str, has_base: bool, same_host: bool, chain: float) -> str:
    if wanted == "off":
        return "as asked for"
    if not has_base:
        return "the receiver has acknowledged no base"
    if wanted == "auto" and same_host:
        return "same host, where copying is faster than comparing"
    if chain > MAX_CHAIN:
        return f"an anchor: deltas since the last one are {chain:.0%} of dense, more than {MAX_CHAIN:.0%}"
    return ""


def _costs(rates: DeltaRates, ratio: float | None) -> dict[Mode, float]:
    """Seconds a dense byte of each mode; nothing is known to cost nothing."""

    def cost(rate: float | None, num_bytes: float = 1.0) -> float:
        return 0.0 if rate is None else num_bytes / rate

    r = 0.0 if ratio is None else ratio
    z = 0.0 if rates.compressed_share is None else rates.compressed_share
    encode, apply = cost(rates.encode), cost(rates.apply)
    return {
        "dense": cost(rates.link),
        "delta": max(encode, cost(rates.link, r), apply),
        "zdelta": max(encode + cost(rates.compress, r), cost(rates.link, r * z), apply + cost(rates.decompress, r)),
    }


def _cheapest(costs: dict[Mode, float], current: Mode) -> DeltaChoice:
    """Dense, or the better of the two sparse modes: a fast link makes the one pay, a slow one the other."""
    sparse: Mode = "zdelta" if _is_cheaper("zdelta", "delta", costs, current) else "delta"
    if not costs["dense"]:
        return DeltaChoice("dense", "the link was not measured yet")
    if not costs[sparse]:
        return DeltaChoice(sparse, "not tried yet")
    gain = costs["dense"] / costs[sparse]
    if _is_cheaper(sparse, "dense", costs, current):
        kept = f", and {1 / GAIN:g} times would be reason to go back" if gain < 1 else ""
        return DeltaChoice(sparse, f"{gain:.3g} times as fast as dense{kept}")
    return DeltaChoice("dense", f"{sparse} is {gain:.3g} times as fast, {1 / GAIN:g} would be reason")


def _is_cheaper(mode: Mode, than: Mode, costs: dict[Mode, float], current: Mode) -> bool:
    """Whether to take `mode` rather than `than`: a change must gain a fifth, in whichever direction."""
    in_use = current == mode or (than == "dense" and current != "dense")
    return GAIN * costs[mode] < costs[than] if in_use else costs[mode] < GAIN * costs[than]
