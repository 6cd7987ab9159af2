"""Messages: everything that crosses a control or data socket, and nothing else.

Three roles speak: engines (subscribers), the coordinator (the publisher's rank 0) and the other sources. Each
message is a frozen dataclass with a checked schema; `encode` and `decode` are the only way on and off the wire.

    engine -> coordinator       Hello, Ping, Staged, Serving, Failed, Bye
    coordinator -> engine       Welcome, Layout, Announce, Sealed, Release, Pong, Goodbye
    source -> coordinator       SourceHello, Packing, Packed, Ping
    coordinator -> source       Assigned, Published, Pong, Goodbye
    engine -> source            ChunkRequest         (data socket)
    source -> engine            ChunkHeader + bytes  (data socket)
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from weightcast.sync import schema
from weightcast.sync.records import (
    CHUNK_HASH_BYTES,
    MAX_CHUNKS,
    MAX_SOURCES,
    OFFER,
    REGION,
    REPORT,
    SOURCE_REPORT,
    SPANS,
    SPEC,
    TICKETS,
    VERSION,
    EngineReport,
    Offer,
    SourceReport,
    Span,
    Ticket,
)
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.schema import checked, many, optional, positive, real, text, uint
from weightcast.sync.version import Version

PROTOCOL = 5
ENCODINGS = ("dense", "delta", "zdelta", "same", "absent")
DELTA_MODES = ("off", "on", "zstd")
# Chunks that one request or header may stand for, where no bytes travel.
MAX_RUN_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class Hello:
    """An engine makes itself known; `serving` is the version it has now."""

    protocol: int = checked(uint())
    engine: str = checked(text)
    role: str = checked(schema.choice("receiver", "observer"))
    serving: Version | None = checked(optional(VERSION))


@dataclass(frozen=True, slots=True)
class Ping:
    """A peer is alive; an unknown peer's ping is answered by a Pong that does not know it."""


@dataclass(frozen=True, slots=True)
class Staged:
    """An engine holds all of a version, checked."""

    version: Version = checked(VERSION)
    num_bytes: int = checked(uint())
    stage_s: float = checked(real)
    checksums_checked: int = checked(uint())
    spans: tuple[Span, ...] = checked(SPANS)
    transport: str = checked(text)
    num_repeats: int = checked(uint())
    asked_bytes: int = checked(uint())


@dataclass(frozen=True, slots=True)
class Serving:
    """An engine serves a version now; `pause_s` is how long it answered nobody."""

    version: Version = checked(VERSION)
    pause_s: float = checked(real)
    spans: tuple[Span, ...] = checked(SPANS)


@dataclass(frozen=True, slots=True)
class Failed:
    """An engine refuses a version and goes on with the one it has."""

    version: Version = checked(VERSION)
    reason: str = checked(text)


@dataclass(frozen=True, slots=True)
class Bye:
    """An engine leaves."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """The model that this publisher publishes."""

    protocol: int = checked(uint())
    epoch: int = checked(uint())
    specs: tuple[TensorSpec, ...] = checked(many(SPEC))


@dataclass(frozen=True, slots=True)
class Layout:
    """Who serves what, in chunks of which size: of every version that is announced after it.

    `tickets` are to ways that take a while to prepare, so that the first version may come over them.
    """

    epoch: int = checked(uint())
    chunk_bytes: int = checked(uint(1 << 40))
    offers: tuple[Offer, ...] = checked(many(OFFER, MAX_SOURCES))
    tickets: tuple[Ticket, ...] = checked(TICKETS, default=())


@dataclass(frozen=True, slots=True)
class Announce:
    """A version is being packed: its chunks may be asked for, and come as they are ready.

    Of the source ranks `ready` all are there: who reads such a source's memory need not ask.
    """

    version: Version = checked(VERSION)
    tickets: tuple[Ticket, ...] = checked(TICKETS)
    ready: tuple[int, ...] = checked(many(uint(MAX_SOURCES), MAX_SOURCES), default=())


@dataclass(frozen=True, slots=True)
class Sealed:
    """Every source has packed a version. `digests` holds one 8-byte little-endian digest a tensor."""

    version: Version = checked(VERSION)
    digests: bytes = checked(schema.binary(8 * schema.MAX_ITEMS))


@dataclass(frozen=True, slots=True)
class Release:
    """The fleet's policy is met: engines that hold this version may serve it."""

    version: Version = checked(VERSION)


@dataclass(frozen=True, slots=True)
class Pong:
    """The coordinator is alive; `known` is false when it has not met this peer (it was restarted)."""

    epoch: int = checked(uint())
    known: bool = checked(schema.boolean)


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The coordinator ends, or refuses this peer for the reason given; `final` when it need not come back."""

    reason: str = checked(text)
    final: bool = checked(schema.boolean)


@dataclass(frozen=True, slots=True)
class SourceHello:
    """A source makes itself known to the coordinator, with all that it holds, and what `Layout` says of tickets."""

    protocol: int = checked(uint())
    rank: int = checked(uint(MAX_SOURCES))
    world_size: int = checked(uint(MAX_SOURCES))
    model: str = checked(text)
    address: str = checked(text)
    regions: tuple[Region, ...] = checked(many(REGION))
    tickets: tuple[Ticket, ...] = checked(TICKETS, default=())


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a source is to serve from now on."""

    epoch: int = checked(uint())
    chunk_bytes: int = checked(uint(1 << 40))
    regions: tuple[Region, ...] = checked(many(REGION))


@dataclass(frozen=True, slots=True)
class Packing:
    """A source begins to pack a version: it takes requests for its chunks from now on.

    With `is_ready` all chunks are there, for those that read its memory.
    """

    number: int = checked(uint())
    tickets: tuple[Ticket, ...] = checked(TICKETS)
    is_ready: bool = checked(schema.boolean, default=False)


@dataclass(frozen=True, slots=True)
class Packed:
    """A source has its part of a version ready. `digests` has 8 bytes for each of its regions, in order."""

    number: int = checked(uint())
    digests: bytes = checked(schema.binary(8 * schema.MAX_ITEMS))
    report: SourceReport = checked(SOURCE_REPORT)
    spans: tuple[Span, ...] = checked(SPANS)


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a version; `error` is empty when the fleet's policy was met.

    `delta` is what sources that choose by themselves do for the next version, and `why` says why in one line.
    """

    version: Version = checked(VERSION)
    engines: tuple[EngineReport, ...] = checked(many(REPORT, 1 << 20))
    sources: tuple[SourceReport, ...] = checked(many(SOURCE_REPORT, MAX_SOURCES))
    num_bytes: int = checked(uint())
    spans: tuple[Span, ...] = checked(SPANS)
    error: str = checked(text)
    delta: str = checked(schema.choice(*DELTA_MODES))
    why: str = checked(text)


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """An engine grants credit for one chunk, of which it has the bits of `base`.

    With `reached` it reads the chunk's bytes by itself and only asks to be told when they are there. It may then ask
    for `count` chunks from `index` on at once, all of one `base`, and is told when the last of them is there. Unless
    `hashed`, a chunk that comes whole needs no hash: the digests of its tensors are checked.
    """

    version: Version = checked(VERSION)
    index: int = checked(uint(MAX_CHUNKS))
    base: Version | None = checked(optional(VERSION))
    reached: bool = checked(schema.boolean)
    count: int = checked(positive(MAX_RUN_CHUNKS), default=1)
    hashed: bool = checked(schema.boolean, default=True)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Goes before a chunk's bytes, which are those of `encoding`; `hash` is the xxh3-128 of what follows, or empty.

    Nothing follows `same` (the bits of the request's base), `absent` (the source has another version), and what the
    engine reads by itself; then one header may stand for `count` chunks from `index` on.
    """

    version: Version = checked(VERSION)
    index: int = checked(uint(MAX_CHUNKS))
    encoding: str = checked(schema.choice(*ENCODINGS))
    base: Version | None = checked(optional(VERSION))
    hash: bytes = checked(schema.binary(CHUNK_HASH_BYTES))
    count: int = checked(positive(MAX_RUN_CHUNKS), default=1)


Message: TypeAlias = (
    Hello
    | Ping
    | Staged
    | Serving
    | Failed
    | Bye
    | Welcome
    | Layout
    | Announce
    | Sealed
    | Release
    | Pong
    | Goodbye
    | SourceHello
    | Assigned
    | Packing
    | Packed
    | Published
    | ChunkRequest
    | ChunkHeader
)
KINDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(Hello, Ping, Staged, Serving, Failed, Bye, Welcome, Layout, Announce, Sealed, Release, Pong, Goodbye),
        *(SourceHello, Assigned, Packing, Packed, Published, ChunkRequest, ChunkHeader),
    )
}


def encode(message: Message) -> bytes:
    """A message as one frame."""
    return schema.pack(type(message).__name__, message)


def decode(raw: bytes | memoryview) -> Message:
    """The message in one frame; `WireError` when it is malformed."""
    message: Message = schema.unpack(raw, KINDS)
    return message
