"""Records that messages and reports are made of, with the checks that they pass on their way off a wire.

They are plain frozen dataclasses: a span of time, a source's offer, a ticket to memory, what became of a version.
"""

from dataclasses import dataclass
from typing import Any

import torch

from weightcast.sync import schema
from weightcast.sync.errors import WireError
from weightcast.sync.regions import DTYPES, Region, TensorSpec
from weightcast.sync.schema import many, optional, real, record, show, text, uint
from weightcast.sync.version import Version

MAX_SOURCES = 1 << 16
MAX_CHUNKS = 1 << 22
CHUNK_HASH_BYTES = 16
MAX_SPANS = 10_000
MAX_TICKET_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """When a phase of a version ran, in seconds since 1970."""

    phase: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """A source's part of every version: where to ask, and which regions it serves, in `lay_out_chunks`' order."""

    rank: int
    address: str
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Ticket:
    """How the memory in which a source packs may be reached without its help; see `transports/base.py`."""

    rank: int
    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One trainer rank's part of a version.

    `pack_s` is how long its training stood still, `dense_bytes` what it serves of the model, in `num_chunks`.
    `delta_bytes` is what of it an engine with the version before has to receive, and `changed_elements` how many
    elements are others than in that version; None where the source did not compare.
    """

    rank: int
    pack_s: float
    dense_bytes: int
    delta_bytes: int
    changed_elements: int | None
    num_chunks: int = 0


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What became of a version on one engine. `state` is one of `weightcast.sync.fleet.STATES`.

    `num_bytes` counts bodies as they were received, `num_repeats` chunks that were asked for again, and `asked_bytes`
    the bytes of all chunks that it wants, as they are without deltas: of an engine that wants some boxes, less than the
    model has.
    """

    engine: str
    state: str
    stage_s: float
    pause_s: float
    num_bytes: int
    checksums_checked: int
    spans: tuple[Span, ...]
    reason: str
    transport: str = ""
    num_repeats: int = 0
    asked_bytes: int = 0


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
OFFER = record(Offer, uint(MAX_SOURCES), text, many(REGION))
TICKET = record(Ticket, uint(MAX_SOURCES), text, schema.binary(MAX_TICKET_BYTES))
# More kinds of memory than one a source are few.
TICKETS = many(TICKET, 4 * MAX_SOURCES)
SOURCE_REPORT = record(SourceReport, uint(MAX_SOURCES), real, uint(), uint(), optional(uint()), uint(MAX_CHUNKS))
REPORT = record(EngineReport, text, text, real, real, uint(), uint(), SPANS, text, text, uint(), uint())
