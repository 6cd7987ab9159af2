"""How patient a subscription is, and how much it asks for at once. Pure.

WeightSubscriber(address, limits=Limits(credit_chunks=16, links=2))
"""

from dataclasses import dataclass

from weightcast.sync.errors import ConfigError
from weightcast.sync.messages import MAX_RUN_CHUNKS

# A source leaves an engine that wants more at once unanswered.
MAX_CREDIT_CHUNKS = 64
# Of chunks that are read and not sent so much is asked for at once: a message costs more than reading a chunk.
_RUN_BYTES = 32 << 20
# So much is packed by one call: few enough for an engine that is sent chunks not to wait.
_PACKING_RUN_BYTES = 16 << 20
# Of memory that is read on the host all is read at once where it is no more: in a second or two.
MAX_AT_ONCE_BYTES = 8 << 30
# On a device a hand-over takes as long as to copy this much there,
_DEVICE_RUN_BYTES = 512 << 20
# and this much is enough to make it nothing.
_MAX_DEVICE_RUN_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a subscription is, and how much it asks for at once."""

    credit_chunks: int = 8
    """Chunks asked for and not yet received, a source that sends them (it answers at most 64 at once)."""
    links: int = 1
    """Connections to each source, over which its chunks come in turn (one of TCP carries some 30 Gb/s)."""
    under_way_chunks: int = 64
    """The same over all sources: times the chunk's size, what may be on its way to this engine."""
    chunk_timeout_s: float = 10.0
    """A chunk that has not come after this is asked for again."""
    chunk_attempts: int = 3
    """How often a chunk may arrive damaged before the version is refused."""
    ping_every_s: float = 0.5
    lost_after_s: float = 10.0
    """A coordinator that was silent for this long is lost."""

    def __post_init__(self) -> None:
        if not 1 <= self.credit_chunks <= MAX_CREDIT_CHUNKS or self.under_way_chunks < 1 or not 1 <= self.links <= 64:
            raise ConfigError(
                f"credit_chunks={self.credit_chunks}, under_way_chunks={self.under_way_chunks} and "
                f"links={self.links} grant no sound credit; use 1 to {MAX_CREDIT_CHUNKS} for the first, at least 1 for "
                "the second, and 1 to 64 for the last"
            )


def size_run(num_asked: int, num_left: int, chunk_bytes: int) -> int:
    """How many chunks that are read, and not sent, to ask for at once, when so many were asked for and are left.

    At least one. Few at first and at the end: an engine is told of a run when its last chunk is packed, and the end of
    a version waits until the last run is read.
    """
    return max(1, min(MAX_RUN_CHUNKS, _RUN_BYTES // chunk_bytes, num_asked + 1, num_left // 4))


def size_packing_run(num_done: int, num_left: int, chunk_bytes: int) -> int:
    """How many chunks a source packs at once in host memory, when so many are done and are left; at least one.

    In step with the runs that engines ask for.
    """
    return min(size_run(num_done, num_left, chunk_bytes), max(1, _PACKING_RUN_BYTES // max(1, chunk_bytes)))


def cut_runs(num_chunks: int, chunk_bytes: int) -> list[int]:
    """How many chunks a device lands at once, of those that are all there: as few runs as may be, of like sizes.

    Host memory notes one while the next is landed, and nothing else is heard until all are.
    """
    num_runs = -(-num_chunks // max(1, _MAX_DEVICE_RUN_BYTES // chunk_bytes))
    return [num_chunks * (n + 1) // num_runs - num_chunks * n // num_runs for n in range(num_runs)]


def size_device_run(num_done: int, num_left: int, chunk_bytes: int) -> int:
    """How many chunks a device packs, or lands, at once, when so many are done and are left; at least one.

    As `size_run`, for memory that is a hundred times as fast.
    """
    few = max(1, _DEVICE_RUN_BYTES // chunk_bytes)
    many = min(MAX_RUN_CHUNKS, _MAX_DEVICE_RUN_BYTES // chunk_bytes)
    return max(1, min(many, num_left, max(few, min(num_done + few, num_left // 2))))
