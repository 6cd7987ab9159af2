"""What an engine's side of the protocol wants done: effects, which a thread carries out (`subscriber_loop`)."""

from dataclasses import dataclass
from itertools import accumulate

from weightcast.sync.limits import cut_runs
from weightcast.sync.messages import ChunkHeader, ChunkRequest, Message
from weightcast.sync.version import Version


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the source `rank` at `address` for a chunk; its chunks have at most `chunk_bytes`."""

    rank: int
    address: str
    chunk_bytes: int
    message: ChunkRequest


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the coordinator."""

    message: Message


@dataclass(frozen=True, slots=True)
class Read:
    """Read the chunks that `header` stands for out of the memory of the source `rank`, as if it had answered so."""

    rank: int
    header: ChunkHeader


def list_reads(rank: int, version: Version, num_chunks: int, chunk_bytes: int) -> list[Read]:
    """All chunks of a source, in runs that are landed at once."""
    counts = cut_runs(num_chunks, chunk_bytes)
    starts = accumulate(counts, initial=0)
    return [
        Read(rank, ChunkHeader(version, start, "dense", None, b"", count))
        for start, count in zip(starts, counts, strict=False)
    ]


Effect = Request | Tell | Read
