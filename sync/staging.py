"""The staging store: one version on its way into the shadow, chunk by chunk, believed only when complete.

    staging = Staging(version, specs, layouts, shadow)
    staging.land(rank, header, body)           # checks the body, brings its pieces to their places
    staging.seal(digests)                      # the sources' digests, which may come before or after the last chunk
    tensors = staging.finish()                 # every tensor complete and its digest right, or an error

Nothing here touches the network or the engine.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from weightcast.sync.chunk_delta import read_changes
from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_codec import apply_parsed
from weightcast.sync.delta_format import ByteArray, Delta, ElementArray
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.digest import copy_bytes_with_digest, copy_with_digest, region_digest
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.host_bytes import ChunkBytes, bytes_of, check_hash, check_size, elements_of, find_bytes, writable
from weightcast.sync.landing import Body, Landing
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey, Ledger, plan_ledger
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.piece_views import view_piece
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.stopwatch import Stopwatch
from weightcast.sync.version import Version


class Staging:
    """See the module; `device_staging` has the one whose tensors are on a device."""

    run_kind = ""  # the kind of memory of which `land` takes a header of many chunks (`run_staging`)

    def __init__(
        self, version: Version, specs: Sequence[TensorSpec], layouts: Mapping[int, SourceLayout], shadow: Shadow
    ) -> None:
        self.version, self.specs, self.layouts = version, tuple(specs), layouts
        self.num_bytes = self._num_hashes = 0
        self.checking = Stopwatch()  # passes over bytes that only check them
        self._shadow = shadow
        self.device = shadow.device
        self._tensors = shadow.open(layouts, self._kept_specs())
        self._raws: dict[str, ByteArray] = {}
        self.order: Mapping[int, Sequence[int]] = self._list_chunks()
        """By source rank, the chunks to ask for."""
        self.late_keys: Sequence[ChunkKey] = ()
        """What is asked for once the sources' digests are known."""
        self.asked_bytes = sum(layout.start_bytes[-1] for layout in layouts.values())
        """Bytes of the chunks that are asked for, as they are without deltas."""
        self._ledger = self._open_ledger()

    # What is staged: all of it, here; `part_staging` has the one that keeps some boxes

    def _kept_specs(self) -> Sequence[TensorSpec]:
        return self.specs

    def _list_chunks(self) -> Mapping[int, Sequence[int]]:
        return {rank: range(len(layout.chunks)) for rank, layout in self.layouts.items()}

    def _open_ledger(self) -> Ledger:
        plan = self._shadow.ledger_plan
        if plan is None:
            plan = plan_ledger([spec.name for spec in self.specs], self.layouts, self.order)
            self._shadow.ledger_plan = plan
        return Ledger(plan)

    def find_spans(self, rank: int, index: int) -> list[tuple[int, int]]:
        """(first byte, end) of what is needed of a chunk's bytes."""
        return [(0, self.layouts[rank].chunks[index].num_bytes)]

    # What is still to come

    @property
    def num_missing(self) -> int:
        """Chunks that have not landed."""
        return len(self._ledger.missing)

    @property
    def checksums_checked(self) -> int:
        """Hashes of chunks, and digests of tensors, that were right."""
        return self._num_hashes + self._ledger.num_checked

    @property
    def is_sealed(self) -> bool:
        """Whether the sources' digests are known."""
        return self._ledger.is_sealed

    def is_missing(self, rank: int, index: int) -> bool:
        """Whether this chunk is still wanted; duplicates are not."""
        return (rank, index) in self._ledger.missing

    def base(self, rank: int, index: int) -> Version | None:
        """The version from which a delta of this chunk may begin."""
        return self._shadow.base((rank, index))

    # What comes

    def open_landing(self, rank: int, header: ChunkHeader, num_bytes: int, scratch: ByteArray) -> Landing | None:
        """Where a whole chunk that is wanted may be received step by step, to be landed then; None where it may not."""
        chunk = self.layouts[rank].chunks[header.index]
        if header.encoding != "dense" or num_bytes != chunk.num_bytes or not self.is_missing(rank, header.index):
            return None
        self._shadow.forget([(rank, header.index)])
        return Landing(self, chunk, self._tensors, self._raw_of, self._land_piece, scratch)

    def land(self, rank: int, header: ChunkHeader, body: Body | None, *, is_hashed: bool = True) -> None:
        """Check a chunk's body and bring its pieces to their places; a duplicate is ignored.

        `is_hashed` is false for a body that was read out of a source's memory. For what comes whole, without a hash,
        the tensors' digests vouch. Raises `WireError` when size, hash or contents are wrong: it is then still missing.
        """
        assert not isinstance(body, RunLanding), "chunks come one by one"
        key = (rank, header.index)
        if not self.is_missing(*key):
            return
        chunk = self.layouts[rank].chunks[header.index]
        try:
            if isinstance(body, Landing):
                assert body.owner is self and not is_hashed and header.encoding == "dense"
                digests = body.digests
                self.checking.seconds += body.checking.seconds
            else:
                self._check_hash(header, body, is_hashed)
                is_dense = header.encoding == "dense"
                digests = self._land_dense(key, chunk, body) if is_dense else self._land_change(key, header, body)
        except WireError as error:
            raise WireError(f"{self._describe(rank, chunk)} {error}") from None
        self._shadow.note(key, self.version)
        if body is not None:
            is_read = not is_hashed and header.encoding == "dense"
            self.num_bytes += sum(end - start for start, end in self.find_spans(*key)) if is_read else len(body)
        self._ledger.add([key], (0, len(digests)), self._ledger.plan.owners_of[key], digests)

    def _check_hash(self, header: ChunkHeader, body: ChunkBytes | None, is_hashed: bool) -> None:
        if body is None or not is_hashed or (header.encoding == "dense" and not header.hash):
            return
        assert not isinstance(body, torch.Tensor), "what was read from a device has no hash"
        with self.checking:
            check_hash(body, header.hash)
        self._num_hashes += 1

    def _land_dense(self, key: ChunkKey, chunk: Chunk, body: ChunkBytes | None) -> tuple[int, ...]:
        body = check_size(chunk, body)
        assert not isinstance(body, torch.Tensor), "host memory is staged from host memory"
        self._shadow.forget([key])
        return tuple(self._land_piece(piece, body) for piece in chunk.pieces)

    def _land_piece(self, piece: Piece, body: ByteArray) -> int:
        return self._land_at(piece, body, piece.region.name, piece.region.offset)

    def _land_at(self, piece: Piece, body: ByteArray, key: str, offset: tuple[int, ...]) -> int:
        """Bring a piece to its place in the staged tensor `key`, where it may be already; its digest."""
        region = piece.region
        tensor = self._tensors[key]
        start_byte = find_bytes(tensor, offset, region.shape)
        if start_byte is None:
            place = tensor[Region(key, offset, region.shape).slices]
            return copy_with_digest(place, view_piece(piece, tensor.dtype, writable(body)), region)
        target = self._raw_of(key)[start_byte : start_byte + piece.num_bytes]
        source = body[piece.start_byte : piece.start_byte + piece.num_bytes]
        return copy_bytes_with_digest(target, source, region, tensor.dtype)

    def _raw_of(self, name: str) -> ByteArray:
        raw = self._raws.get(name)
        if raw is None:
            raw = self._raws[name] = bytes_of(self._tensors[name])
        return raw

    def _land_change(self, key: ChunkKey, header: ChunkHeader, body: ChunkBytes | None) -> tuple[int, ...]:
        """What changed since the bits that lie there."""
        base = self.base(*key)
        if header.base is None or header.base != base:
            raise WireError(f"changes version {header.base}, this engine has {base}; not used")
        parts, places = self.layouts[key[0]].parts[key[1]], self._places(key)
        flats = {number: target.contiguous() for number, (_, target) in places.items()}
        assert not isinstance(body, torch.Tensor), "what changed is sent"
        changes = read_changes(
            header.encoding, body, parts, lambda n: self._host_elements(flats[n]) if n in flats else None
        )
        self._shadow.forget([key])
        for number, (_, target) in places.items():
            change, flat = changes[number], flats[number]
            if change is not None:
                self._apply(change, flat)
                if flat.data_ptr() != target.data_ptr():
                    target.copy_(flat)
        with self.checking:
            digests = self._digest_all(list(flats.values()), [piece for piece, _ in places.values()])
        found = dict(zip(places, digests, strict=True))
        return tuple(found.get(number, 0) for number in range(len(parts)))

    def _places(self, key: ChunkKey) -> Mapping[int, tuple[Piece, torch.Tensor]]:
        """By number, the pieces of a chunk that are staged, and where."""
        pieces = self.layouts[key[0]].chunks[key[1]].pieces
        return {number: (piece, self._target(piece)) for number, piece in enumerate(pieces)}

    def _host_elements(self, flat: torch.Tensor) -> ElementArray:
        """A staged piece's elements, to be read."""
        return elements_of(flat)

    def _apply(self, change: Delta, flat: torch.Tensor) -> None:
        apply_parsed(change, elements_of(flat))

    def _digest_all(self, flats: Sequence[torch.Tensor], pieces: Sequence[Piece]) -> tuple[int, ...]:
        return tuple(region_digest(flat, piece.region) for flat, piece in zip(flats, pieces, strict=True))

    def _target(self, piece: Piece) -> torch.Tensor:
        return self._tensors[piece.region.name][piece.region.slices]

    def _describe(self, rank: int, chunk: Chunk) -> str:
        names = ", ".join(dict.fromkeys(piece.region.name for piece in chunk.pieces[:3]))
        return f"chunk {chunk.index} of version {self.version} from source rank {rank} ({names}, ...)"

    # Whether it is right

    def seal(self, digests: bytes) -> None:
        """The digest that each tensor must have, 8 bytes a tensor; `WireError` when their number is wrong."""
        if len(digests) != 8 * len(self.specs):
            raise WireError(f"version {self.version} carries {len(digests) // 8} digests for {len(self.specs)} tensors")
        self._ledger.seal(np.frombuffer(digests, "<u8").tolist())

    def take_wrong(self) -> list[str]:
        """Tensors that are complete and have another digest than announced, each named once."""
        return self._ledger.take_wrong()

    def describe_wrong(self, name: str) -> str:
        """What is wrong with such a tensor."""
        got, wanted = self._ledger.digests_of(name)
        return (
            f"tensor {name!r} of version {self.version} has the digest {got:#x} after assembly, "
            f"{wanted:#x} was announced; the version is refused"
        )

    def reopen(self, names: Iterable[str]) -> list[ChunkKey]:
        """Want the chunks of these tensors again, whole; those that are wanted already are not named once more."""
        keys = self._ledger.reopen(names)
        self._shadow.forget(keys)
        return keys

    @property
    def is_whole(self) -> bool:
        """Whether every chunk landed and every digest was right."""
        return self._ledger.is_whole

    def finish(self) -> Mapping[str, torch.Tensor]:
        """All tensors, in HF order. `SourceError` unless `is_whole`."""
        if not self.is_whole:
            missing = self._ledger.missing
            if not missing:
                raise SourceError(f"version {self.version} is incomplete: the digests are not there, or not right")
            rank, index = min(missing)
            raise SourceError(
                f"version {self.version} is incomplete: {len(missing)} chunks are missing, "
                f"the first is chunk {index} of source rank {rank}"
            )
        tensors, self._tensors = self._tensors, {}
        self._raws.clear()
        return tensors
