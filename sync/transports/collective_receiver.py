"""An engine's side of bucketed broadcasts: every chunk is checked before anybody sees it.

    receiver = BucketReceiver(group, source_rank=0, generation=1)
    received = receiver.receive(plan, take, deadline, watch)   # take(rank, index, hash, buffer) for each good chunk
    received.damaged                                           # chunks whose bytes were altered: fetch them elsewhere

The payload of a bucket is received while the one before it is checked and taken: two buffers, whatever the model. What
`take` does not get it can still have from its source over another transport; a broadcast is an offer, not a promise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.transports.collective_backend import BroadcastGroup, Watch
from weightcast.sync.transports.collective_buckets import Bucket, BucketPlan
from weightcast.sync.transports.collective_header import HEADER_BYTES, Header, Kind, decode_header
from weightcast.sync.version import Version

TakeChunk = Callable[[int, int, bytes, npt.NDArray[np.uint8]], None]
"""`take(rank, index, hash, buffer)`: a chunk whose bytes have this xxh3-128; `buffer` is valid during the call."""

NUM_BUFFERS = 2
MAX_SEAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Received:
    """What came of one source's part of a version. `damaged` are the chunks whose bytes were not believed."""

    version: Version
    num_bytes: int
    damaged: tuple[int, ...]
    seal: bytes


class BucketReceiver:
    """Receives versions of one source over one group. Used by one thread; a failed receive leaves the group broken.

    Raises what `BroadcastGroup.wait` and the `watch` raise, and `WireError` for headers that do not fit the plan.
    """

    def __init__(self, group: BroadcastGroup, source_rank: int, generation: int) -> None:
        if group.rank == 0:
            raise ConfigError("a receiver is rank 1 or more of its group, this is rank 0; use a BucketSender")
        self._group = group
        self._source_rank = source_rank
        self._generation = generation
        self._buffers: list[torch.Tensor] = []
        self._host = torch.empty(0, dtype=torch.uint8)

    def receive(
        self, plan: BucketPlan, take: TakeChunk, deadline: float, watch: Watch, version: Version | None = None
    ) -> Received:
        """The next version, or `version` and no other. Returns when its seal has come and all chunks were taken."""
        try:
            return self._receive(plan, take, deadline, watch, version)
        except BaseException:
            self.abandon()
            raise

    def _receive(
        self, plan: BucketPlan, take: TakeChunk, deadline: float, watch: Watch, version: Version | None
    ) -> Received:
        opened = self._await_header(Kind.OPEN, plan, deadline, watch, version)
        if opened.index != len(plan.buckets) or opened.num_bytes != plan.num_bytes:
            raise self._refuse(opened, f"{len(plan.buckets)} buckets of {plan.num_bytes} bytes were planned")
        damaged: list[int] = []
        num_bytes = 0
        self._allocate(plan)
        under_way = [self._post_bucket(bucket, deadline) for bucket in plan.buckets[:1]]
        for bucket in plan.buckets:
            header, data = self._finish_bucket(under_way.pop(), bucket, plan, deadline, watch, opened.version)
            if bucket.index + 1 < len(plan.buckets):
                under_way.append(self._post_bucket(plan.buckets[bucket.index + 1], deadline))
            damaged += self._take(bucket, header, data, take)
            num_bytes += bucket.num_bytes
        seal = self._await_header(Kind.SEAL, plan, deadline, watch, opened.version)
        return Received(opened.version, num_bytes, tuple(damaged), self._receive_seal(seal, deadline, watch))

    def _allocate(self, plan: BucketPlan) -> None:
        if not self._buffers or len(self._buffers[0]) < plan.largest_bytes:
            device = self._group.device
            self._buffers = [
                torch.empty(plan.largest_bytes, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)
            ]
            if device.type != "cpu":
                self._host = torch.empty(plan.largest_bytes, dtype=torch.uint8, pin_memory=True)

    def _post_bucket(self, bucket: Bucket, deadline: float) -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
        """Begin to receive a bucket's header and payload."""
        raw = self._empty(HEADER_BYTES)
        data = self._buffers[bucket.index % NUM_BUFFERS][: bucket.num_bytes]
        return self._group.broadcast(raw, deadline), raw, self._group.broadcast(data, deadline), data

    def _finish_bucket(
        self,
        under_way: tuple[Any, torch.Tensor, Any, torch.Tensor],
        bucket: Bucket,
        plan: BucketPlan,
        deadline: float,
        watch: Watch,
        version: Version,
    ) -> tuple[Header, npt.NDArray[np.uint8]]:
        header_work, raw, data_work, data = under_way
        self._group.wait(header_work, deadline, watch)
        header = self._check(raw, Kind.BUCKET, plan, version)
        expected = (bucket.index, bucket.num_bytes, len(bucket.slots))
        if (header.index, header.num_bytes, len(header.hashes)) != expected:
            raise self._refuse(header, f"bucket {bucket.index} of {bucket.num_bytes} bytes was planned")
        self._group.wait(data_work, deadline, watch)
        if self._group.device.type == "cpu":
            return header, data.numpy()
        host = self._host[: bucket.num_bytes]
        host.copy_(data)
        return header, host.numpy()

    def _take(self, bucket: Bucket, header: Header, data: npt.NDArray[np.uint8], take: TakeChunk) -> list[int]:
        """Hand out the chunks that have their hashes; the indices of the others."""
        damaged = []
        for slot, expected in zip(bucket.slots, header.hashes, strict=True):
            buffer = data[slot.start_byte : slot.start_byte + slot.num_bytes]
            if xxhash.xxh3_128_digest(buffer.data) == expected:
                take(self._source_rank, slot.index, expected, buffer)
            else:
                damaged.append(slot.index)
        return damaged

    def _receive_seal(self, header: Header, deadline: float, watch: Watch) -> bytes:
        if header.num_bytes > MAX_SEAL_BYTES or len(header.hashes) != 1:
            raise self._refuse(header, f"a seal has one hash and at most {MAX_SEAL_BYTES} bytes")
        seal = b""
        if header.num_bytes:
            raw = self._empty(header.num_bytes)
            self._group.wait(self._group.broadcast(raw, deadline), deadline, watch)
            seal = raw.cpu().numpy().tobytes()
        if xxhash.xxh3_128_digest(seal) != header.hashes[0]:
            raise self._refuse(header, "the seal does not have the hash that was announced: its bytes were altered")
        return seal

    def _await_header(
        self, kind: Kind, plan: BucketPlan, deadline: float, watch: Watch, version: Version | None
    ) -> Header:
        raw = self._empty(HEADER_BYTES)
        self._group.wait(self._group.broadcast(raw, deadline), deadline, watch)
        return self._check(raw, kind, plan, version)

    def _check(self, raw: torch.Tensor, kind: Kind, plan: BucketPlan, version: Version | None) -> Header:
        header = decode_header(raw.cpu().numpy().data)
        if (header.rank, header.generation) != (self._source_rank, self._generation):
            raise self._refuse(header, f"source rank {self._source_rank} in generation {self._generation} was expected")
        if header.kind is not kind or header.version != (version if version is not None else header.version):
            raise self._refuse(header, f"{kind.name} of version {version if version is not None else 'any'} is due")
        if header.fingerprint != plan.fingerprint:
            raise self._refuse(header, "its chunks have other sizes than planned: the two sides have other layouts")
        return header

    def _refuse(self, header: Header, why: str) -> WireError:
        return WireError(
            f"source rank {header.rank} broadcast {header.kind.name} {header.index} ({header.num_bytes} bytes) of "
            f"version {header.version} in generation {header.generation}: {why}. Nothing of it is used"
        )

    def _empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._group.device)

    def abandon(self) -> None:
        """Close the group."""
        self._group.close()
