"""What lies in a store of versions besides tensors: small sealed records, checked before they are believed. Pure.

A record is a frozen dataclass as msgpack, behind a seal: a magic word, its length, and a hash of it. A record that was
cut short is *unfinished* (its writer died, or is still writing); one that is whole but fails its seal, its schema or
its sense is *damaged*.

    raw = seal(manifest, hashing)
    manifest = unseal(raw, VersionManifest, hashing)     # Unfinished, or WireError

With a key, seals and the hashes of all files are keyed BLAKE2b: nobody without the key can make or alter a version.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import xxhash

from weightcast.sync import schema
from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.records import REGION, SIZES, SPEC, VERSION
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.schema import checked, many, optional, record, show, text, uint
from weightcast.sync.version import Version

FORMAT = 1
HASH_BYTES = 16
MAX_FILES = 1 << 20
MAX_TENSORS = 1_000_000
MAX_RANKS = 1 << 16
MAX_FILE_BYTES = 1 << 44
MAX_RECORD_BYTES = schema.MAX_MESSAGE_BYTES
KEY_BYTES = (16, 64)
Encoding = Literal["dense", "delta", "zdelta"]
"""Bytes as they are; a delta of `delta_codec`; the same, entropy-coded by `delta_wire`."""

_SEAL = struct.Struct("<16sQ16s")
_MAGIC = b"weightcast disk1"
_Record = TypeVar("_Record")


class Unfinished(Exception):
    """A record that is cut short: whoever writes it has not finished, or never will."""


class Hasher(Protocol):
    """What `hashlib` and `xxhash` give."""

    def update(self, data: Any, /) -> Any: ...

    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Hashing:
    """How files are hashed: xxh3-128 (29 GB/s, finds accidents) or with a key BLAKE2b (1 GB/s, stops forgers)."""

    key: bytes | None = None

    def __post_init__(self) -> None:
        if self.key is not None and not KEY_BYTES[0] <= len(self.key) <= KEY_BYTES[1]:
            raise ConfigError(
                f"the key of a folder of versions must have {KEY_BYTES[0]} to {KEY_BYTES[1]} bytes, got "
                f"{len(self.key)}; make one with `secrets.token_bytes(32)`"
            )

    @property
    def name(self) -> str:
        """As records say it."""
        return "xxh3_128" if self.key is None else "blake2b_keyed"

    def start(self) -> Hasher:
        """A hasher of `HASH_BYTES`."""
        return xxhash.xxh3_128() if self.key is None else hashlib.blake2b(key=self.key, digest_size=HASH_BYTES)

    def of(self, data: bytes | memoryview) -> bytes:
        """The hash of one buffer."""
        hasher = self.start()
        hasher.update(data)
        return hasher.digest()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a version: its plain name, size and hash."""

    name: str
    num_bytes: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A box of tensor number `tensor` (of the specs) and where its bytes lie: `num_bytes` of file number `file`."""

    tensor: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    encoding: Encoding
    file: int
    start_byte: int
    num_bytes: int

    def region(self, specs: tuple[TensorSpec, ...]) -> Region:
        """The box in words."""
        return Region(specs[self.tensor].name, self.offset, self.shape)


@dataclass(frozen=True, slots=True)
class Base:
    """The version whose bits a delta was made against, and the hash of that version's own manifest file."""

    version: Version
    seal: bytes


def file_name(value: Any) -> str:
    """A plain name: no folders, no leading dot, nothing that a shell or a file system takes for more."""
    plain = isinstance(value, str) and 0 < len(value) <= 128 and value.isascii() and not value.startswith(".")
    if not plain or not all(letter.isalnum() or letter in "._-" for letter in value):
        raise WireError(f"a plain file name was expected, got {show(value)}")
    return str(value)


FILE = record(StoredFile, file_name, uint(MAX_FILE_BYTES), schema.binary(HASH_BYTES))
PIECE = record(
    StoredPiece,
    *(uint(MAX_TENSORS), SIZES, SIZES, schema.choice("dense", "delta", "zdelta")),
    *(uint(MAX_FILES), uint(MAX_FILE_BYTES), uint(MAX_FILE_BYTES)),
)
BASE = record(Base, VERSION, schema.binary(HASH_BYTES))
_FORMAT = checked(uint(FORMAT))
_HASHING = schema.choice("xxh3_128", "blake2b_keyed")


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """A whole version; it is the last file that is written, and what makes the version exist.

    An anchor has every tensor in `dense`; with a `base`, `delta` leads from it to this version, and a region that is
    in no delta piece did not change. An anchor may have both. `digests` has 8 bytes a tensor (see `sync.digest`).
    """

    format: int = _FORMAT
    hashing: str = checked(_HASHING)
    version: Version = checked(VERSION)
    is_anchor: bool = checked(schema.boolean)
    base: Base | None = checked(optional(BASE))
    created_s: float = checked(schema.real)
    specs: tuple[TensorSpec, ...] = checked(many(SPEC, MAX_TENSORS))
    digests: bytes = checked(schema.binary(8 * MAX_TENSORS))
    files: tuple[StoredFile, ...] = checked(many(FILE, MAX_FILES))
    dense: tuple[StoredPiece, ...] = checked(many(PIECE))
    delta: tuple[StoredPiece, ...] = checked(many(PIECE))

    def find_extra_files(self) -> list[int]:
        """The numbers of the files that hold no tensors: configuration, tokenizer, index."""
        used = {piece.file for piece in (*self.dense, *self.delta)}
        return [number for number in range(len(self.files)) if number not in used]


@dataclass(frozen=True, slots=True)
class Part:
    """What one source wrote of a version; file numbers count its own files. `digests`: 8 bytes a region it serves.

    Without `has_delta` its share changed too much for a delta to pay.
    """

    version: Version = checked(VERSION)
    rank: int = checked(uint(MAX_RANKS))
    has_delta: bool = checked(schema.boolean)
    digests: bytes = checked(schema.binary(8 * schema.MAX_ITEMS))
    files: tuple[StoredFile, ...] = checked(many(FILE, MAX_FILES))
    dense: tuple[StoredPiece, ...] = checked(many(PIECE))
    delta: tuple[StoredPiece, ...] = checked(many(PIECE))
    pack_s: float = checked(schema.real)
    write_s: float = checked(schema.real)
    changed_elements: int = checked(uint())


@dataclass(frozen=True, slots=True)
class Begin:
    """Rank 0 opens a version for the parts of the others. `base` is None where no delta is wanted."""

    version: Version = checked(VERSION)
    is_anchor: bool = checked(schema.boolean)
    base: Version | None = checked(optional(VERSION))


@dataclass(frozen=True, slots=True)
class Failure:
    """A source could not write its part."""

    rank: int = checked(uint(MAX_RANKS))
    reason: str = checked(text)


@dataclass(frozen=True, slots=True)
class Run:
    """One life of a publisher. `world_size` sources, the model by its fingerprint."""

    format: int = _FORMAT
    epoch: int = checked(uint())
    world_size: int = checked(uint(MAX_RANKS))
    model: str = checked(text)


@dataclass(frozen=True, slots=True)
class Joining:
    """A source makes itself known to a run; `life` tells its process from an earlier one of the same rank."""

    rank: int = checked(uint(MAX_RANKS))
    life: str = checked(file_name)
    world_size: int = checked(uint(MAX_RANKS))
    model: str = checked(text)
    regions: tuple[Region, ...] = checked(many(REGION))


@dataclass(frozen=True, slots=True)
class Shares:
    """Who takes part in a run, and the regions that each rank serves; lists are by rank."""

    lives: tuple[str, ...] = checked(many(file_name, MAX_RANKS))
    regions: tuple[tuple[Region, ...], ...] = checked(many(many(REGION), MAX_RANKS))


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What an engine says of itself, in a file of its own."""

    engine: str = checked(text)
    serving: Version | None = checked(optional(VERSION))
    reason: str = checked(text)
    at_s: float = checked(schema.real)


def seal(rec: Any, hashing: Hashing) -> bytes:
    """A record as the bytes of a file."""
    body = schema.pack(type(rec).__name__, rec)
    return _SEAL.pack(_MAGIC, len(body), hashing.of(body)) + body


def unseal(raw: bytes, cls: type[_Record], hashing: Hashing) -> _Record:
    """The record in `raw`. Raises `Unfinished` when it is cut short, `WireError` when it is damaged or forged."""
    if len(raw) < _SEAL.size and _MAGIC.startswith(raw[: len(_MAGIC)]):
        raise Unfinished
    if len(raw) < _SEAL.size or raw[: len(_MAGIC)] != _MAGIC:
        raise WireError("it is no record of weightcast")
    _, num_bytes, expected = _SEAL.unpack(raw[: _SEAL.size])
    body = raw[_SEAL.size :]
    if len(body) < num_bytes <= MAX_RECORD_BYTES:
        raise Unfinished
    if len(body) != num_bytes:
        raise WireError(f"its body has {len(body)} bytes, its seal says {num_bytes}")
    if not hmac.compare_digest(hashing.of(body), expected):
        keyed = " or was sealed without this key" if hashing.key is not None else " or was sealed with a key: give it"
        raise WireError(f"it fails its own seal: it was altered{keyed}")
    found: _Record = schema.unpack(body, {cls.__name__: cls})
    return found
