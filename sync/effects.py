"""What an engine's side of the protocol wants done: effects, which a thread carries out (`subscriber_loop`)."""

from dataclasses import dataclass

from weightcast.sync.messages import ChunkRequest, Message


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


Effect = Request | Tell
