"""How tests of shared memory reach it, and alter its tickets."""

from collections.abc import Collection
from dataclasses import replace

from weightcast.sync import schema
from weightcast.sync.transports.shared_memory import ReachedMemory
from weightcast.sync.transports.shared_memory import reach as reach_any
from weightcast.sync.transports.shared_memory_wire import SharedMemoryTicket

NUM_BYTES = (3 << 20) + 5


def reach(ticket: bytes, timeout_s: float, allowed_uids: Collection[int] = ()) -> ReachedMemory:
    """The memory of a source that packs."""
    reached = reach_any(ticket, timeout_s, allowed_uids=allowed_uids)
    assert isinstance(reached, ReachedMemory)
    return reached


def altered(ticket: bytes, **changes: object) -> bytes:
    """A ticket with other fields."""
    read = schema.unpack(ticket, {"shared_memory": SharedMemoryTicket})
    return schema.pack("shared_memory", replace(read, **changes))
