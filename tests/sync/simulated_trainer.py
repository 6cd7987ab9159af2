"""A life of a simulated publisher: its coordinator, sources that pack chunk by chunk, and what their weights are."""

import numpy as np
import torch
from tests.sync.parts import TensorSource, make_specs, split_rows

from weightcast.sync import FleetPolicy, Region, Version
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.coordinator import Coordinator
from weightcast.sync.messages import PROTOCOL, Packed, Packing, Published, SourceHello
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.records import SourceReport
from weightcast.sync.roster import Outgoing
from weightcast.sync.snapshot import Snapshot, allocate_arena
from weightcast.sync.version import fingerprint

NUM_SOURCES = 2
LOST_AFTER_S = 5.0
CHUNK_BYTES = 4096


def model_of(version: Version) -> dict[str, torch.Tensor]:
    """The weights of a version: nothing else has these bits. Few elements change from one number to the next."""
    value = version.epoch * 1000 + version.number
    weights = torch.full((4, 3000), version.epoch, dtype=torch.int32)
    weights[:, :: 7 + version.number % 3] = value
    return {"w": weights, "still": torch.full((900,), version.epoch), "scale": torch.tensor(value, dtype=torch.float64)}


SPECS = tuple(make_specs(model_of(Version(0, 0))))


class Trainer:
    """One life of a publisher: a coordinator, and the packers of its sources."""

    def __init__(self, epoch: int, policy: FleetPolicy, mode: PackMode) -> None:
        self.coordinator = Coordinator(SPECS, NUM_SOURCES, epoch, CHUNK_BYTES, policy, LOST_AFTER_S, 0.0)
        self.number = 0
        self.mode: PackMode = mode
        self.snapshots: dict[int, Snapshot] = {}
        self.published: list[Published] = []
        self.tensors = model_of(Version(epoch, 0))
        rows = {spec.name: split_rows(spec, NUM_SOURCES) for spec in SPECS}
        for rank in range(NUM_SOURCES):
            regions = tuple(rows[spec.name][rank] for spec in SPECS)
            hello = SourceHello(PROTOCOL, rank, NUM_SOURCES, fingerprint(SPECS), f"at-{epoch}-{rank}", regions)
            assert all(not out.peer.startswith(b"e") for out in self.coordinator.add_source(b"s%d" % rank, hello))
        assert self.coordinator.roster.layout is not None
        self.packers = [self._make_packer(offer.regions) for offer in self.coordinator.roster.layout.offers]

    def _make_packer(self, regions: tuple[Region, ...]) -> Packer:
        held = {held.region: held for held in TensorSource(self.tensors, regions=regions).held()}
        chunks = lay_out_chunks(regions, {spec.name: spec.dtype for spec in SPECS}, CHUNK_BYTES)
        arena = allocate_arena(sum(chunk.num_bytes for chunk in chunks))
        return Packer(held, {spec.name: spec for spec in SPECS}, regions, chunks, arena, history=2)

    def begin(self, rank: int, now_s: float, timeout_s: float) -> list[Outgoing]:
        """A source begins to pack."""
        version = Version(self.coordinator.epoch, self.number)
        for name, tensor in model_of(version).items():
            self.tensors[name].copy_(tensor)
        self.snapshots[rank] = self.packers[rank].begin(version, self.mode)
        deadline_s = now_s + timeout_s if rank == 0 else None
        return self.coordinator.add_packing(b"s%d" % rank, Packing(self.number, ()), now_s, deadline_s)

    def pack(self, rank: int, count: int, now_s: float) -> list[Outgoing]:
        """A source packs some chunks more; the last one completes its part."""
        snapshot = self.snapshots.get(rank)
        if snapshot is None or snapshot.version.number != self.number or snapshot.num_ready == len(snapshot):
            return []
        for _ in range(min(count, len(snapshot) - snapshot.num_ready)):
            self.packers[rank].pack_next(snapshot)
        if snapshot.num_ready < len(snapshot):
            return []
        digests = np.array(self.packers[rank].digests(), "<u8").tobytes()
        part = Packed(self.number, digests, SourceReport(rank, 0.0, 0, 0, None), ())
        return self.coordinator.add_part(b"s%d" % rank, part, now_s)
