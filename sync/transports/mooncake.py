"""Mooncake's transfer engine as a reach: receivers pull bytes out of a source's memory, over RDMA or TCP.

    exposed = expose(num_bytes, host="10.0.0.5", protocol="rdma", device="mlx5_0")     # source
    exposed.memory[:] = ...
    with reach(exposed.ticket, timeout_s=30.0, device="mlx5_0") as reached:             # receiver
        reached.read(0, into)

The way to RDMA where there is a NIC; over TCP it is slower than our ZeroMQ. It needs the extra `mooncake` and, of
Debian, libibverbs1, libcurl4 and libnuma1.

Seen in 0.3.13.post1, and why this file is as it is:

- The engine listens on every interface, whatever host it is told and whatever MC_TCP_BIND_ADDRESS says, and asks
  nobody who he is: whoever reaches its ports may read the memory, and write to it. Digests find what was altered;
  nothing keeps a reader out. Expose to networks that you trust.
- A transfer that was given up goes on: its bytes come whenever the source wakes up. So they go to a buffer of our
  own first, which nobody else writes to and which is not touched again after a deadline was missed.
- A read outside of what was registered is refused by the source, and a source that is gone fails at once; one that
  is stopped does not, so deadlines are kept here, over the asynchronous call.
"""

import logging
import mmap
import re
import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from weightcast.sync import schema
from weightcast.sync.errors import ConfigError, ReachError, WireError
from weightcast.sync.schema import MAX_UINT, checked, choice, uint

logger = logging.getLogger(__name__)

KIND = "mooncake"
PROTOCOLS = ("tcp", "rdma")
MAX_TICKET_BYTES = 1024
PIECE_BYTES = 16 << 20
NUM_PIECES = 4  # in flight at once, so that copying out of one hides behind the others
_POLL_S = 100e-6
_WAITING, _DONE = 0, 1  # transfer_check_status; anything below is an error
_SESSION = re.compile(r"(\[[0-9a-fA-F:]{2,45}\]|[A-Za-z0-9._-]{1,253}):([1-9]\d{0,4})")


def known_session(value: Any) -> str:
    """`host:port` of an engine."""
    match = _SESSION.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise WireError(f"the host:port of a transfer engine was expected, got {schema.show(value)}")
    return match[0]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where the memory is: the engine that serves it, and the addresses in its process."""

    protocol: str = checked(choice(*PROTOCOLS))
    session: str = checked(known_session)
    address: int = checked(uint())
    num_bytes: int = checked(uint(1 << 48))


def unavailable_reason() -> str:
    """Why the engine cannot be used in this process; empty when it can."""
    try:
        _engine_class()
    except ConfigError as error:
        return str(error)
    return ""


def expose(num_bytes: int, *, host: str = "127.0.0.1", protocol: str = "tcp", device: str = "") -> "ExposedMemory":
    """Memory that receivers may read at `host`, the address by which they reach this machine.

    `protocol` is tcp or rdma, `device` the NICs for it (names with commas; empty takes all). Raises `ConfigError`
    where the engine is not installed or cannot start. See the module for who else may read and write it.
    """
    return ExposedMemory(num_bytes, host, protocol, device)


def reach(ticket: bytes, timeout_s: float, *, device: str = "") -> "MooncakeReach":
    """The memory that a ticket of `expose` names. `timeout_s` bounds this call and each read of what it returns.

    Raises `WireError` for a malformed ticket and `ReachError` when the memory cannot be read from here.
    """
    return MooncakeReach(parse_ticket(ticket), timeout_s, device)


def parse_ticket(raw: bytes) -> Ticket:
    """A ticket, checked. Raises `WireError`."""
    if len(raw) > MAX_TICKET_BYTES:
        raise WireError(f"a ticket of {len(raw)} bytes; at most {MAX_TICKET_BYTES} are allowed")
    ticket: Ticket = schema.unpack(raw, {KIND: Ticket})
    if not 0 < ticket.num_bytes <= MAX_UINT - ticket.address:
        raise WireError(f"a ticket for {ticket.num_bytes} bytes at {ticket.address}, which is no range of addresses")
    return ticket


class ExposedMemory:
    """A source's side: `memory` is page-aligned and writable here. See `expose`."""

    kind = KIND
    device_memory = None

    def __init__(self, num_bytes: int, host: str, protocol: str, device: str) -> None:
        if num_bytes <= 0 or protocol not in PROTOCOLS:
            raise ConfigError(
                f"cannot expose {num_bytes} bytes over {protocol!r}; 1 byte or more, and one of {PROTOCOLS}"
            )
        self._engine: Any | None = _start_engine(host, protocol, device)
        # Receivers that have it open read it for as long as the array lives, which is for longer than this object.
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self._address = self.memory.ctypes.data
        if self._engine.register_memory(self._address, num_bytes) != 0:
            raise ConfigError(f"mooncake could not register {num_bytes} bytes for {protocol}; see its log on stderr")
        session = _join(host, self._engine.get_rpc_port())
        self.ticket = schema.pack(KIND, Ticket(protocol, known_session(session), self._address, num_bytes))
        logger.warning(
            "mooncake listens on every interface of this machine (port %d and one more) and lets whoever reaches it "
            "read and write %d bytes of weights; expose them to networks that you trust",
            self._engine.get_rpc_port(),
            num_bytes,
        )

    def close(self) -> None:
        """Stop serving. The array stays valid here."""
        if self._engine is not None:
            self._engine.unregister_memory(self._address)
            self._engine = None


class MooncakeReach:
    """A receiver's side. One thread at a time; a context manager. See `reach`."""

    kind = KIND
    scattered = None

    def __init__(self, ticket: Ticket, timeout_s: float, device: str) -> None:
        self.num_bytes = ticket.num_bytes
        self._ticket = ticket
        self._timeout_s = timeout_s
        try:
            self._engine: Any | None = _start_engine(_local_host(ticket.session), ticket.protocol, device)
        except ConfigError as error:
            raise ReachError(f"cannot read the source at {ticket.session}: {error}") from error
        size = min(PIECE_BYTES, ticket.num_bytes)
        self._buffer: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, NUM_PIECES * size), np.uint8)
        self._pieces = [self._buffer[slot * size : (slot + 1) * size] for slot in range(NUM_PIECES)]
        try:
            # Over TCP it need not be registered, and then no stranger may write to it.
            if ticket.protocol == "rdma" and self._engine.register_memory(
                self._buffer.ctypes.data, self._buffer.nbytes
            ):
                raise self._broken("this machine's NIC could not register a buffer", "check `device` and ulimit -l")
            self.read(0, np.empty(1, np.uint8))
        except ReachError:
            self.close()
            raise

    def read(self, start_byte: int, into: npt.NDArray[np.uint8]) -> None:
        """Copy `into.size` bytes from `start_byte` on into a contiguous array.

        Raises `ReachError` when the source refuses, is gone, or took longer than the deadline. After that `into` may
        hold a part of the bytes, nothing more is written to it, and every other read is refused.
        """
        if start_byte < 0 or start_byte + into.size > self.num_bytes:
            raise ReachError(
                f"bytes {start_byte} to {start_byte + into.size} of a source's memory of {self.num_bytes} bytes; "
                "the layout is another one than the source's"
            )
        deadline_s = time.monotonic() + self._timeout_s
        size = self._pieces[0].size
        starts = range(0, into.size, size)
        batches: dict[int, int] = {}
        for number in range(len(starts) + NUM_PIECES - 1):
            if number < len(starts):
                length = min(size, into.size - starts[number])
                batches[number] = self._submit(self._pieces[number % NUM_PIECES][:length], start_byte + starts[number])
            landed = number - (NUM_PIECES - 1)
            if landed >= 0:
                self._wait(batches.pop(landed), deadline_s)
                target = into[starts[landed] : starts[landed] + size]
                target[:] = self._pieces[landed % NUM_PIECES][: target.size]

    def device_view(self, start_byte: int, num_bytes: int) -> None:
        """It lies on no device."""

    def view(self, start_byte: int, num_bytes: int) -> npt.NDArray[np.uint8] | None:
        """None: nothing is mapped here."""
        return None

    def _submit(self, piece: npt.NDArray[np.uint8], start_byte: int) -> int:
        if self._engine is None:
            raise ReachError(f"the reach to {self._ticket.session} is closed, or was given up; open it anew")
        batch: int = self._engine.batch_transfer_async_read(
            self._ticket.session, [piece.ctypes.data], [self._ticket.address + start_byte], [piece.size]
        )
        if batch == 0:
            raise self._broken("the source did not answer", "is it running, and its port open?")
        return batch

    def _wait(self, batch: int, deadline_s: float) -> None:
        assert self._engine is not None
        # Once it is over, the engine frees the batch, so nobody may ask a second time.
        while (status := self._engine.transfer_check_status(batch)) == _WAITING:
            if time.monotonic() > deadline_s:
                raise self._broken(f"the source did not answer within {self._timeout_s:g} s", "is it running?")
            time.sleep(_POLL_S)
        if status != _DONE:
            raise self._broken(f"the transfer failed (status {status})", "has the source ended, or closed its memory?")

    def _broken(self, what: str, remedy: str) -> ReachError:
        self.close()
        where = f"{self._ticket.session} over {self._ticket.protocol}"
        return ReachError(f"cannot read {self.num_bytes} bytes of the source at {where}: {what}; {remedy}")

    def close(self) -> None:
        """Give the engine up; a transfer that is still under way ends with it."""
        if self._engine is not None and self._ticket.protocol == "rdma":
            self._engine.unregister_memory(self._buffer.ctypes.data)
        self._engine = None

    def __enter__(self) -> "MooncakeReach":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _engine_class() -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise ConfigError(
            f"mooncake's transfer engine cannot be loaded ({error}); install it with "
            "`pip install 'weightcast[mooncake]'`, and its libraries (Debian, Ubuntu: apt install libibverbs1 libcurl4 "
            "libnuma1)"
        ) from error
    return TransferEngine


def _start_engine(host: str, protocol: str, device: str) -> Any:
    engine = _engine_class()()
    if engine.initialize(host, "P2PHANDSHAKE", protocol, device) != 0:
        raise ConfigError(
            f"mooncake's engine did not start at {host!r} over {protocol} with the device {device!r}; rdma needs a NIC "
            "of this machine, tcp an address of it. Its log is on stderr"
        )
    return engine


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _local_host(session: str) -> str:
    """The address by which this machine reaches the source's: engines that call themselves alike mix up their links."""
    host, _, port = session.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, number, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.connect(target)  # a datagram socket: this asks the routing table, and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ReachError(
            f"cannot find a way to the source at {session}: {error}; check its host and the network"
        ) from error
