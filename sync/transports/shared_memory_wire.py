"""What is said at the door of a source's shared memory: its ticket, and the messages that go with descriptors."""

from dataclasses import dataclass

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.host.arena import MAX_ARENA_BYTES
from weightcast.sync.host.doors import TOKEN_BYTES, check_door
from weightcast.sync.schema import binary, checked, text, uint

KIND = "shared_memory"
MAX_TICKET_BYTES = 1024
MAX_STORAGES = 4096


@dataclass(frozen=True, slots=True)
class SharedMemoryTicket:
    """Where a source hands out its memory, and what to say there. `host` names a boot of a machine."""

    host: str = checked(text)
    path: str = checked(text)
    token: bytes = checked(binary(TOKEN_BYTES))
    num_bytes: int = checked(uint(MAX_ARENA_BYTES))


@dataclass(frozen=True, slots=True)
class Opened:
    """The answer of a source that packs; a descriptor comes with it."""

    num_bytes: int = checked(uint(MAX_ARENA_BYTES))


@dataclass(frozen=True, slots=True)
class Ask:
    """An engine asks for the memory of a storage, by its number in the table of a source that packs nothing."""

    number: int = checked(uint(MAX_STORAGES))


@dataclass(frozen=True, slots=True)
class Storage:
    """The answer; a read-only descriptor comes with it."""

    num_bytes: int = checked(uint(MAX_ARENA_BYTES))


def read_ticket(ticket: bytes) -> SharedMemoryTicket:
    """The ticket, or `WireError` when it cannot be one of `expose`."""
    if len(ticket) > MAX_TICKET_BYTES:
        raise WireError(f"a ticket of {len(ticket)} bytes exceeds the limit of {MAX_TICKET_BYTES}")
    read: SharedMemoryTicket = schema.unpack(ticket, {KIND: SharedMemoryTicket})
    check_door(read.path)
    if len(read.token) != TOKEN_BYTES or not read.num_bytes:
        raise WireError(f"a ticket with a token of {len(read.token)} bytes for {read.num_bytes} bytes of memory")
    return read
