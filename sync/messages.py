"""Messages: everything that crosses a control or data socket, and nothing else.

Three roles speak: engines (subscribers), the coordinator (the publisher's rank 0) and the other sources. Each
message is a frozen dataclass with a checked schema; `encode` and `decode` are the only way on and off the wire.

    engine -> coordinator       Hello, Ping, Staged, Serving, Failed, Bye
    coordinator -> engine       Welcome, Announce, Release, Pong, Goodbye
    source -> coordinator       SourceHello, Packed, Ping
    coordinator -> source       Assigned, Published, Pong, Goodbye
    engine -> source            ChunkRequest         (data socket)
    source -> engine            ChunkHeader + bytes  (data socket)
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.regions import DTYPES, Region, TensorSpec
from weightcast.sync.schema import checked, many, optional, real, record, show, text, uint
from weightcast.sync.version import Version

PROTOCOL = 1
MAX_SOURCES = 1 << 16
MAX_CHUNKS = 1 << 22
CHUNK_HASH_BYTES = 16
MAX_SPANS = 10_000


@dataclass(frozen=True, slots=True)
class Span:
    """When a phase of a version ran, in seconds since 1970."""

    phase: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """A source's part of a version: where to ask, which regions it serves, and the hash of each chunk.

    `hashes` holds `CHUNK_HASH_BYTES` (xxh3-128) a chunk, in the order of `lay_out_chunks(regions, ...)`.
    """

    rank: int
    address: str
    regions: tuple[Region, ...]
    hashes: bytes


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What became of a version on one engine. `state` is one of `weightcast.sync.fleet.STATES`."""

    engine: str
    state: str
    stage_s: float
    pause_s: float
    num_bytes: int
    checksums_checked: int
    spans: tuple[Span, ...]
    reason: str
    transport: str = "zmq"
    num_repeats: int = 0


def known_dtype(value: Any) -> torch.dtype:
    """A dtype by its name, from the allow-list `DTYPES`."""
    if not isinstance(value, str) or value not in DTYPES:
        raise WireError(f"one of the dtypes {sorted(DTYPES)} was expected, got {show(value)}")
    return DTYPES[value]


VERSION = record(Version, uint(), uint())
SIZES = many(uint(1 << 48), schema.MAX_DIMENSIONS)
SPEC = record(TensorSpec, text, known_dtype, SIZES)
_REGION_FIELDS = record(Region, text, SIZES, SIZES)


def known_region(value: Any) -> Region:
    """A region with one offset and one size a dimension."""
    region: Region = _REGION_FIELDS(value)
    if len(region.offset) != len(region.shape):
        raise WireError(f"{region} was expected to have as many offsets as sizes")
    return region


REGION = known_region
SPAN = record(Span, text, real, real)
SPANS = many(SPAN, MAX_SPANS)
HASHES = schema.binary(MAX_CHUNKS * CHUNK_HASH_BYTES)
OFFER = record(Offer, uint(MAX_SOURCES), text, many(REGION), HASHES)
REPORT = record(EngineReport, text, text, real, real, uint(), uint(), SPANS, text, text, uint())


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
class Announce:
    """A version is there to be fetched. `digests` holds one 8-byte little-endian digest a tensor."""

    version: Version = checked(VERSION)
    chunk_bytes: int = checked(uint(1 << 40))
    digests: bytes = checked(schema.binary(8 * schema.MAX_ITEMS))
    offers: tuple[Offer, ...] = checked(many(OFFER, MAX_SOURCES))


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
    """A source makes itself known to the coordinator, with all that it holds."""

    protocol: int = checked(uint())
    rank: int = checked(uint(MAX_SOURCES))
    world_size: int = checked(uint(MAX_SOURCES))
    model: str = checked(text)
    address: str = checked(text)
    regions: tuple[Region, ...] = checked(many(REGION))


@dataclass(frozen=True, slots=True)
class Assigned:
    """What a source is to serve from now on."""

    epoch: int = checked(uint())
    chunk_bytes: int = checked(uint(1 << 40))
    regions: tuple[Region, ...] = checked(many(REGION))


@dataclass(frozen=True, slots=True)
class Packed:
    """A source has its part of a version ready. `digests` has 8 bytes for each of its regions, in order."""

    number: int = checked(uint())
    hashes: bytes = checked(HASHES)
    digests: bytes = checked(schema.binary(8 * schema.MAX_ITEMS))
    spans: tuple[Span, ...] = checked(SPANS)


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a version; `error` is empty when the fleet's policy was met."""

    version: Version = checked(VERSION)
    engines: tuple[EngineReport, ...] = checked(many(REPORT, 1 << 20))
    num_bytes: int = checked(uint())
    num_chunks: int = checked(uint())
    spans: tuple[Span, ...] = checked(SPANS)
    error: str = checked(text)


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """An engine grants credit for one chunk."""

    version: Version = checked(VERSION)
    index: int = checked(uint(MAX_CHUNKS))


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Goes before a chunk's bytes; `held` is false, and no bytes follow, when the source has another version."""

    version: Version = checked(VERSION)
    index: int = checked(uint(MAX_CHUNKS))
    held: bool = checked(schema.boolean)


Message: TypeAlias = (
    Hello
    | Ping
    | Staged
    | Serving
    | Failed
    | Bye
    | Welcome
    | Announce
    | Release
    | Pong
    | Goodbye
    | SourceHello
    | Assigned
    | Packed
    | Published
    | ChunkRequest
    | ChunkHeader
)
KINDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(Hello, Ping, Staged, Serving, Failed, Bye, Welcome, Announce, Release, Pong, Goodbye),
        *(SourceHello, Assigned, Packed, Published, ChunkRequest, ChunkHeader),
    )
}


def encode(message: Message) -> bytes:
    """A message as one frame."""
    return schema.pack(type(message).__name__, message)


def decode(raw: bytes | memoryview) -> Message:
    """The message in one frame; `WireError` when it is malformed."""
    message: Message = schema.unpack(raw, KINDS)
    return message
