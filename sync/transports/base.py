"""The one small interface that every transport has.

A server holds one snapshot and answers requests for its chunks; a client asks sources for chunks and receives them.
Both are driven by a loop that waits on their sockets, neither has a thread, and neither decides anything: what to
ask, and whether to believe what came, is the protocol's business.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import zmq

from weightcast.sync.arrival import Request
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class ReceivedChunk:
    """A chunk as it came; `buffer` is valid until the client receives again."""

    rank: int
    header: ChunkHeader
    buffer: npt.NDArray[np.uint8]


class ChunkServer(Protocol):
    """A source's side."""

    @property
    def address(self) -> str:
        """Where engines ask for chunks."""
        ...

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """Readable when `answer` has something to do."""
        ...

    @property
    def is_sending(self) -> bool:
        """Whether bytes of the snapshot are still on their way out."""
        ...

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on, and no other."""
        ...

    def drop(self) -> None:
        """Serve nothing until the next `hold`."""
        ...

    def answer(self) -> None:
        """Answer the requests that are there, without waiting for more."""
        ...

    def close(self) -> None:
        """Stop serving."""
        ...


class ChunkClient(Protocol):
    """An engine's side."""

    def ask(self, request: Request) -> None:
        """Send a request; larger chunks than it allows will be refused."""
        ...

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """Readable when `receive` has something to give."""
        ...

    def receive(self, socket: zmq.Socket[bytes]) -> ReceivedChunk | None:
        """One chunk that is there, or None. `WireError` when it is malformed."""
        ...

    def close(self) -> None:
        """Stop asking."""
        ...
