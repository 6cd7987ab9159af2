"""The small interfaces that transports have.

A server holds one snapshot and answers requests for its chunks; a client asks sources for chunks and receives them.
Both are driven by a loop that waits on their sockets, neither has a thread, and neither decides anything: what to
ask, and whether to believe what came, is the protocol's business.

Some memory can be read without its owner's help: on the same host, by RDMA, on the same GPU. A source then packs into
`Exposed` memory, gives out tickets to it, and only says when a chunk is there; an engine that has a `Reach` reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import zmq

from weightcast.sync.device_landing import RunLanding
from weightcast.sync.effects import Request
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.landing import Landing
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.scattered import ScatteredBytes
from weightcast.sync.snapshot import Snapshot

ByteArray: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ReceivedChunk:
    """A chunk as it came; `buffer` is valid until the client receives again. None where no bytes followed.

    A landing where it was received step by step, and digested (`landing.py`), or where a device copies a whole run.
    """

    rank: int
    header: ChunkHeader
    buffer: ByteArray | Landing | RunLanding | None

    def one_by_one(self) -> "Iterator[ReceivedChunk]":
        """The chunks that a header stands for."""
        if self.header.count == 1:
            yield self
            return
        for number in range(self.header.count):
            header = replace(self.header, index=self.header.index + number, count=1)
            yield ReceivedChunk(self.rank, header, None)


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

    @property
    def has_sent(self) -> bool:
        """Whether bytes of chunks were sent since `hold`, and not only read by engines of this host."""
        ...

    @property
    def awaited_index(self) -> int | None:
        """The first chunk that somebody waits for, if anybody does; other threads may ask."""
        ...

    def hold(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on, and no other."""
        ...

    def drop(self) -> None:
        """Serve nothing until the next `hold`."""
        ...

    def answer(self) -> None:
        """Answer the requests that are there, and earlier ones whose chunks became ready, without waiting for more."""
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


class Exposed(Protocol):
    """Memory of this process that receivers may read. Each kind's module makes it by `expose(num_bytes)`."""

    @property
    def kind(self) -> str:
        """The kind's name, as in tickets."""
        ...

    @property
    def memory(self) -> ByteArray:
        """The memory, writable here, zeroed when made."""
        ...

    @property
    def device_memory(self) -> torch.Tensor | None:
        """As many bytes on a device, where it is these that receivers read; `memory` is then this process's own."""
        ...

    @property
    def ticket(self) -> bytes:
        """What a receiver needs to reach it, at most `MAX_TICKET_BYTES`, in a checked form."""
        ...

    def close(self) -> None:
        """Give out no more; receivers that have it open keep what they have."""
        ...


class Reach(Protocol):
    """Memory of a source as a receiver has it. Each kind's module makes it by `reach(ticket, timeout_s)`."""

    @property
    def kind(self) -> str:
        """The kind's name, as in tickets."""
        ...

    @property
    def num_bytes(self) -> int:
        """How many bytes may be read."""
        ...

    @property
    def scattered(self) -> ScatteredBytes | HostPieces | None:
        """Where the bytes lie, if not in one piece of memory; `device_view` or `read` then copies them together."""
        ...

    def view(self, start_byte: int, num_bytes: int) -> ByteArray | None:
        """A read-only view, where the memory is mapped into this process; otherwise None."""
        ...

    def device_view(self, start_byte: int, num_bytes: int) -> torch.Tensor | None:
        """The bytes on a device of this process, which may change under it, where they lie on one; otherwise None."""
        ...

    def read(self, start_byte: int, into: ByteArray) -> None:
        """Copy bytes from there; at most as long as the deadline with which the reach was made."""
        ...

    def close(self) -> None:
        """Let go."""
        ...
