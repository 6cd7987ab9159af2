"""A source's side without sockets, for tests of what lies between: layouts, packed snapshots, a receiver's staging."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tests.sync.parts import TensorSource, make_specs

from weightcast.sync import Region, TensorSpec, Version
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_packer import DevicePacker
from weightcast.sync.device_staging import make_staging
from weightcast.sync.digest import add_digests
from weightcast.sync.layout import SourceLayout, read_layout
from weightcast.sync.messages import ChunkHeader, Layout
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.records import Offer
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Body, Snapshot, allocate_arena
from weightcast.sync.staging import Staging

CHUNK_BYTES = 4096


@dataclass
class Packed:
    """One source that packs `tensors`, which a test changes in place."""

    tensors: dict[str, torch.Tensor]
    specs: list[TensorSpec]
    layouts: Mapping[int, SourceLayout]
    packer: Packer
    regions: tuple[Region, ...]

    def pack(self, number: int, mode: PackMode = "on") -> Snapshot:
        """A version of the tensors as they are."""
        snapshot = self.packer.begin(Version(1, number), mode)
        while snapshot.num_ready < len(snapshot):
            self.packer.pack_run(snapshot)
        return snapshot

    def digests(self) -> bytes:
        """Of the version that was packed last, one a tensor."""
        sums = {spec.name: 0 for spec in self.specs}
        for region, digest in zip(self.regions, self.packer.digests(), strict=True):
            sums[region.name] = add_digests(sums[region.name], digest)
        return np.array(list(sums.values()), "<u8").tobytes()

    def stage(self, snapshot: Snapshot, shadow: Shadow) -> Staging:
        """A receiver's staging, sealed."""
        staging = make_staging(snapshot.version, self.specs, self.layouts, shadow)
        staging.seal(self.digests())
        return staging

    def send(self, snapshot: Snapshot, shadow: Shadow) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Everything, as the receiver asks for it: the tensors, and the encodings of the chunks."""
        staging = self.stage(snapshot, shadow)
        encodings = []
        for index in range(len(snapshot)):
            header, body = answer(snapshot, index, staging.base(0, index))
            staging.land(0, header, body)
            encodings.append(header.encoding)
        assert staging.take_wrong() == []
        return dict(staging.finish()), encodings


def make_packed(
    tensors: dict[str, torch.Tensor],
    specs: Sequence[TensorSpec] | None = None,
    regions: Sequence[Region] | None = None,
    *,
    history: int = 4,
    chunk_bytes: int = CHUNK_BYTES,
    device: str | None = None,
    host_is_read: bool = False,
) -> Packed:
    """A source with all of `tensors`, cut into `regions` (whole by default); with `device` it packs there."""
    listed = make_specs(tensors) if specs is None else list(specs)
    cut = tuple(spec.whole() for spec in listed) if regions is None else tuple(regions)
    chunks = lay_out_chunks(cut, {spec.name: spec.dtype for spec in listed}, chunk_bytes)
    held = {held.region: held for held in TensorSource(tensors, regions=cut).held()}
    arena = allocate_arena(sum(chunk.num_bytes for chunk in chunks))
    arguments = (held, {spec.name: spec for spec in listed}, cut, chunks, arena, history)
    there = torch.zeros(len(arena), dtype=torch.uint8, device=device)
    packer = Packer(*arguments) if device is None else DevicePacker(*arguments, there, host_is_read=host_is_read)
    layout = Layout(1, chunk_bytes, (Offer(0, "tcp://127.0.0.1:1", cut),))
    return Packed(tensors, listed, read_layout(layout, listed), packer, cut)


def answer(snapshot: Snapshot, index: int, base: Version | None = None) -> tuple[ChunkHeader, ByteArray | None]:
    """A server's answer to a request for a chunk; the body is a copy."""
    body = snapshot.body(index, base)
    return head(snapshot, index, body), None if body.data is None else np.frombuffer(body.data, np.uint8).copy()


def head(snapshot: Snapshot, index: int, body: Body) -> ChunkHeader:
    """The header that goes before a body."""
    return ChunkHeader(snapshot.version, index, body.encoding, body.base, snapshot.hash(index, body))
