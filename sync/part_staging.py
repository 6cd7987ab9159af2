"""Staging of some boxes of a model: of each chunk the wanted parts are kept, and all of them are checked.

    staging = make_part_staging(version, specs, layouts, shadow, plan)
    staging.finish()                        # a `WantedTensors`

See `part_plan` for what is kept and how it is checked. What is staged takes the memory of the wanted boxes.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_bits import aligned, view_on_device
from weightcast.sync.device_landing import RunLanding
from weightcast.sync.device_staging import DeviceStaging, make_staging
from weightcast.sync.digest import MASK, copy_with_digest, region_digest
from weightcast.sync.digest_pages import read_page
from weightcast.sync.digest_torch import as_digests, region_sum
from weightcast.sync.errors import WireError
from weightcast.sync.host_bytes import ChunkBytes, check_size, writable
from weightcast.sync.landing import Body, Landing
from weightcast.sync.layout import SourceLayout
from weightcast.sync.ledger import ChunkKey, Ledger, plan_ledger
from weightcast.sync.messages import ChunkHeader
from weightcast.sync.model_view import ModelView
from weightcast.sync.part_plan import KeptPart, KeptPiece, PartPlan
from weightcast.sync.piece_views import slices_within, view_piece
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.staging import Staging
from weightcast.sync.version import Version
from weightcast.sync.wanted_tensors import WantedTensors


class PartStaging(Staging):
    """See the module. In host memory."""

    def __init__(
        self,
        version: Version,
        specs: Sequence[TensorSpec],
        layouts: Mapping[int, SourceLayout],
        shadow: Shadow,
        plan: PartPlan,
    ) -> None:
        self._plan = plan
        super().__init__(version, specs, layouts, shadow)
        self.late_keys = tuple(plan.pages)
        self.asked_bytes = plan.asked_bytes
        self._gathered: dict[int, torch.Tensor] = {}
        self._came_whole: set[ChunkKey] = set()
        if plan.kept and len(plan.cut) == len(plan.kept):
            # Nothing else could tell that the sources send what changed.
            shadow.keeps_rests = True

    def _kept_specs(self) -> Sequence[TensorSpec]:
        return self._plan.kept_specs

    def _list_chunks(self) -> Mapping[int, Sequence[int]]:
        return self._plan.order

    def _open_ledger(self) -> Ledger:
        plan = self._plan
        waits_for = {key: dict.fromkeys(kept.piece.region.name for kept in plan.kept[key]) for key in plan.kept}
        waits_for |= {key: dict.fromkeys(name for _, name in page.places) for key, page in plan.pages.items()}
        names = [spec.name for spec in self.specs]
        unwanted = (name for name, boxes in plan.boxes.items() if not boxes)
        return Ledger(plan_ledger(names, self.layouts, self.order, waits_for), plan.pages, unwanted)

    def find_spans(self, rank: int, index: int) -> list[tuple[int, int]]:
        """See `Staging`."""
        if (rank, index) in self._came_whole:
            return super().find_spans(rank, index)
        return self._plan.spans((rank, index))

    def base(self, rank: int, index: int) -> Version | None:
        """See `Staging`; none for a cut chunk of which the rest is not there."""
        key = (rank, index)
        is_there = key not in self._plan.cut or all(
            not kept.dropped or (key, kept.number) in self._shadow.rests for kept in self._plan.kept[key]
        )
        return super().base(rank, index) if is_there else None

    def seal(self, digests: bytes) -> None:
        """See `Staging`; from now on the pages are missing."""
        self._ledger.open_late(self._plan.pages)
        super().seal(digests)

    def open_landing(self, rank: int, header: ChunkHeader, num_bytes: int, scratch: ByteArray) -> None:
        """Nowhere: a chunk of which parts are kept comes to scratch memory, whole."""
        self._came_whole.add((rank, header.index))

    def land(self, rank: int, header: ChunkHeader, body: Body | None, *, is_hashed: bool = True) -> None:
        """See `Staging`; also for pages."""
        assert not isinstance(body, Landing | RunLanding), "`open_landing` opens none"
        if (rank, header.index) not in self._plan.pages:
            super().land(rank, header, body, is_hashed=is_hashed)
            if header.encoding != "dense":
                self._shadow.keeps_rests = True
        elif self.is_missing(rank, header.index):
            self._land_page((rank, header.index), header, body)

    def _land_page(self, key: ChunkKey, header: ChunkHeader, body: ChunkBytes | None) -> None:
        page = self._plan.pages[key]
        try:
            if header.encoding != "dense" or body is None or len(body) != page.num_bytes:
                got = f"is {header.encoding!r} and has {0 if body is None else len(body)} bytes"
                raise WireError(f"{got} instead of {page.num_bytes}; not used")
            self._check_hash(header, body, is_hashed=True)
        except WireError as error:
            what = f"page {key[1]} of digests of version {self.version} from source rank {key[0]}"
            raise WireError(f"{what} {error}") from None
        assert not isinstance(body, torch.Tensor)
        self.num_bytes += len(body)
        digests = read_page(body)
        owners = [self._ledger.plan.numbers[name] for _, name in page.places]
        self._ledger.add([key], (0, len(owners)), owners, [digests[place] for place, _ in page.places])

    def _land_dense(self, key: ChunkKey, chunk: Chunk, body: ChunkBytes | None) -> tuple[int, ...]:
        body = check_size(chunk, body)
        assert not isinstance(body, torch.Tensor), "host memory is staged from host memory"
        self._shadow.forget([key])
        digests = [0] * len(chunk.pieces)
        for kept in self._plan.kept[key]:
            digests[kept.number] = self._land_kept(key, kept, body)
        return tuple(digests)

    def _land_kept(self, key: ChunkKey, kept: KeptPiece, body: ByteArray) -> int:
        """Bring what is kept of a piece to its places; the digest of all of it."""
        whole, piece = kept.whole, kept.piece
        if whole is not None:
            return self._land_at(piece, body, whole.key, tuple(at.start for at in whole.slices))
        source = view_piece(piece, self._place(kept.parts[0]).dtype, writable(body))
        total = 0
        for part in kept.parts:
            total += copy_with_digest(self._place(part), _cut(source, part.region, piece), part.region)
        for region in kept.dropped:
            total += region_digest(_cut(source, region, piece), region)
        self._keep_rests(key, kept, source)
        return total & MASK

    def _keep_rests(self, key: ChunkKey, kept: KeptPiece, source: torch.Tensor) -> None:
        """Keep what is dropped of a piece, where its source sends what changes: a delta covers all of it."""
        if not self._shadow.keeps_rests or not kept.dropped:
            return
        found = [_cut(source, region, kept.piece) for region in kept.dropped]
        there = self._shadow.rests.setdefault((key, kept.number), [torch.empty_like(rest) for rest in found])
        for target, rest in zip(there, found, strict=True):
            target.copy_(rest)

    def _gather(self, key: ChunkKey, kept: KeptPiece) -> torch.Tensor:
        """A cut piece, put together."""
        first = self._place(kept.parts[0])
        piece = torch.empty(kept.piece.region.shape, dtype=first.dtype, device=first.device)
        for region, part in self._list_shares(key, kept):
            _cut(piece, region, kept.piece).copy_(part)
        return piece

    def _list_shares(self, key: ChunkKey, kept: KeptPiece) -> Iterable[tuple[Region, torch.Tensor]]:
        """All of a cut piece: what is staged and what is kept besides."""
        for part in kept.parts:
            yield part.region, self._place(part)
        yield from zip(kept.dropped, self._shadow.rests[key, kept.number], strict=True) if kept.dropped else ()

    def _land_change(self, key: ChunkKey, header: ChunkHeader, body: ChunkBytes | None) -> tuple[int, ...]:
        digests = super()._land_change(key, header, body)
        for kept in self._plan.kept[key]:
            if (piece := self._gathered.pop(kept.number, None)) is not None and header.encoding != "same":
                for region, part in self._list_shares(key, kept):
                    part.copy_(_cut(piece, region, kept.piece))
        return digests

    def _place(self, part: KeptPart) -> torch.Tensor:
        return self._tensors[part.key][part.slices]

    def _places(self, key: ChunkKey) -> Mapping[int, tuple[Piece, torch.Tensor]]:
        self._gathered = {kept.number: self._gather(key, kept) for kept in self._plan.kept[key] if kept.whole is None}
        return {
            kept.number: (
                kept.piece,
                self._gathered[kept.number] if kept.whole is None else self._place(kept.whole),
            )
            for kept in self._plan.kept[key]
        }

    def finish(self) -> WantedTensors:
        """What was wanted. `SourceError` unless `is_whole`."""
        return WantedTensors(self.specs, self._plan.boxes, super().finish())


class DevicePartStaging(PartStaging, DeviceStaging):
    """The same in a device's memory; chunk by chunk, of which parts are kept."""

    run_kind = ""

    def _land_dense(self, key: ChunkKey, chunk: Chunk, body: ChunkBytes | None) -> tuple[int, ...]:
        body = check_size(chunk, body)
        self._shadow.forget([key])
        came = body if isinstance(body, torch.Tensor) else torch.from_numpy(writable(body))
        came = aligned(came.to(self.device))
        sums = {}
        for kept in self._plan.kept[key]:
            source = view_on_device(kept.piece, self._place(kept.parts[0]).dtype, came)
            for part in kept.parts:
                self._place(part).copy_(_cut(source, part.region, kept.piece))
            landed = [region_sum(self._place(part), part.region) for part in kept.parts]
            left = [region_sum(_cut(source, region, kept.piece), region) for region in kept.dropped]
            sums[kept.number] = torch.stack(landed + left).sum()
            self._keep_rests(key, kept, source)
        digests = dict(zip(sums, as_digests(list(sums.values())), strict=True))
        return tuple(digests.get(number, 0) for number in range(len(chunk.pieces)))


def _cut(source: torch.Tensor, region: Region, piece: Piece) -> torch.Tensor:
    """A box of a piece."""
    return source[slices_within(region, piece.region)]


def make_part_staging(
    version: Version,
    specs: Sequence[TensorSpec],
    layouts: Mapping[int, SourceLayout],
    shadow: Shadow,
    plan: PartPlan,
) -> PartStaging:
    """A staging of what `plan` keeps of `version`, where the shadow's tensors lie."""
    return (PartStaging if shadow.device is None else DevicePartStaging)(version, specs, layouts, shadow, plan)


def open_staging(version: Version, model: ModelView, shadow: Shadow) -> Staging:
    """A staging of what an engine wants of `version`: some boxes, or all of it.

    Raises `WireError` when the publisher's layout cannot be, `MemoryError` where there is too little.
    """
    assert model.specs is not None
    if model.plan is None:
        return make_staging(version, model.specs, model.layouts, shadow)
    return make_part_staging(version, model.specs, model.layouts, shadow, model.plan)
