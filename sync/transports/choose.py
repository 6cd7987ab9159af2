"""Which way the bytes of a version take, by where the peers are and by what was measured. Pure; one line says why.

    choice = choose_reach(Offers(tickets={"shared_memory"}, usable={"shared_memory", "mooncake"}), context)
    choice.kind, choice.reason       # "shared_memory", "same host and user; not tried yet"

Places come first: memory of the same GPU, then of the same host, then the network. Within a place each way is tried
once, the likeliest first; then the fastest is kept, and left only for one that is 20 % faster, so that two ways of
about the same speed do not take turns. Whether a version goes as a delta is `choose_delta.py`'s question.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from weightcast.sync.errors import ReachError

Kind: TypeAlias = Literal["cuda_ipc", "shared_memory", "tcp", "collective", "mooncake", "zmq"]
Link: TypeAlias = Literal["unknown", "ethernet", "rdma"]
KINDS: tuple[Kind, ...] = ("cuda_ipc", "shared_memory", "tcp", "collective", "mooncake", "zmq")
MIN_ENGINES = 2  # of a source, for broadcasts that nobody insists on
HYSTERESIS = 1.2
MIN_SAMPLE_BYTES = 1 << 20  # of fewer bytes, the time is that of asking
NEWEST_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Offers:
    """What the two sides have: kinds of memory that the source gave tickets for, and kinds that the receiver can use.

    `zmq` needs neither: the source's server is always there.
    """

    tickets: Set[str] = frozenset()
    usable: Set[str] = frozenset(KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where a receiver and a source are, and what was seen so far."""

    same_host: bool
    same_uid: bool = False
    """The receiver's user may open what the source's user made (the same one, or root)."""
    same_gpu: bool = False
    """The receiver's tensors are on the GPU that holds the source's."""
    link: Link = "unknown"
    """What is between two hosts; `rdma` where both have a NIC for it."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Measured bytes per second by kind; see `blend_rate`."""
    current: str | None = None
    """The kind in use, if any."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Kinds that were tried and cannot be used here, with the reason."""
    num_engines: int = 0
    """How many engines could take part in the source's broadcasts, the receiver among them."""
    wanted: str = "auto"
    """What the user asked for: `auto`, or a kind."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind, and why, in one line."""

    kind: Kind
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


def blend_rate(rate: float | None, num_bytes: int, seconds: float) -> float | None:
    """The moving average of bytes per second after one more transfer; small transfers say nothing of it."""
    if num_bytes < MIN_SAMPLE_BYTES or seconds <= 0:
        return rate
    newest = num_bytes / seconds
    return newest if rate is None else NEWEST_SHARE * newest + (1 - NEWEST_SHARE) * rate


def choose_reach(offers: Offers, context: Context) -> Choice:
    """The kind to take for the next transfer.

    Raises `ReachError` when the kind that the user wants cannot be had here.
    """
    refusals = {kind: why for kind in KINDS if (why := refusal(kind, offers, context))}
    if context.wanted != "auto":
        return _as_wanted(context.wanted, refusals)
    allowed = [kind for kind in KINDS if kind not in refusals]
    nearest = min(_distance(kind, context) for kind in allowed)
    near = sorted(
        (kind for kind in allowed if _distance(kind, context) == nearest), key=lambda kind: _order(kind, context)
    )
    untried = [kind for kind in near if kind not in context.rates]
    if untried:
        return Choice(untried[0], f"{_place(untried[0], context)}; not tried yet")
    # A way over the network that was measured, because it was once the only one, may be the faster one after all.
    measured = [*near, *(kind for kind in allowed if kind not in near and kind in context.rates)]
    return _fastest(measured, context)


def refusal(kind: Kind, offers: Offers, context: Context) -> str:
    """Why `kind` cannot be used; empty when it can."""
    if kind == "zmq":
        return ""
    if kind not in offers.tickets:
        return "the source does not expose it"
    if kind in context.failed:
        return context.failed[kind]
    if kind not in offers.usable:
        return "this process cannot use it"
    if kind == "collective" and context.wanted == "auto" and context.num_engines < MIN_ENGINES:
        return f"{context.num_engines} engines can take part, broadcasts pay from {MIN_ENGINES} on"
    if kind in ("cuda_ipc", "shared_memory") and not context.same_host:
        return "the source is on another host"
    if kind == "shared_memory" and not context.same_uid:
        return "the source belongs to another user"
    return ""


def _as_wanted(wanted: str, refusals: Mapping[Kind, str]) -> Choice:
    for kind in KINDS:
        if kind == wanted and kind not in refusals:
            return Choice(kind, "as asked for")
    why = next((why for kind, why in refusals.items() if kind == wanted), f"there is no such kind; {KINDS} are")
    raise ReachError(f"transport={wanted!r} cannot be had: {why}. Mend that, or use transport='auto'")


def _distance(kind: Kind, context: Context) -> int:
    """0: the same GPU; 1: the same host; 2: the network."""
    if kind == "cuda_ipc":
        return 0 if context.same_gpu else 1
    return 1 if kind == "shared_memory" else 2


def _order(kind: Kind, context: Context) -> int:
    """What to try first in one place: over TCP links were measured the fastest, and Mooncake's engine the slowest."""
    others: tuple[Kind, ...] = ("tcp", "collective", "zmq")
    network: tuple[Kind, ...] = ("mooncake", *others) if context.link == "rdma" else (*others, "mooncake")
    return ("cuda_ipc", "shared_memory", *network).index(kind)


def _place(kind: Kind, context: Context) -> str:
    if kind == "cuda_ipc":
        return "same GPU" if context.same_gpu else "another GPU of the same host"
    if kind == "shared_memory":
        return "same host and user"
    where = "same host, no memory of the source to read" if context.same_host else "another host"
    where = f"{where}, RDMA link" if context.link == "rdma" and not context.same_host else where
    return f"{where}, {context.num_engines} engines" if kind == "collective" else where


def _fastest(kinds: list[Kind], context: Context) -> Choice:
    rates = context.rates
    best = max(kinds, key=lambda kind: rates[kind])
    current = next((kind for kind in kinds if kind == context.current), None)
    others = ", ".join(f"{kind} {rates[kind] / 1e9:.3g}" for kind in kinds if kind != best)
    if current is None or best == current:
        than = f", against {others}" if others else ""
        return Choice(best, f"{_place(best, context)}; {rates[best] / 1e9:.3g} GB/s measured{than}")
    gain = rates[best] / rates[current]
    if gain < HYSTERESIS:
        what = f"{rates[current] / 1e9:.3g} GB/s; {best} is {gain:.2f} times as fast, {HYSTERESIS:g} would be reason"
        return Choice(current, f"kept at {what}")
    return Choice(best, f"{gain:.2f} times as fast as {current}: {rates[best] / 1e9:.3g} GB/s measured")
