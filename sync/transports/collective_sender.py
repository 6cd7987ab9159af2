"""A source's side of bucketed broadcasts: two buckets on their way at most, whatever the size of the model.

The next bucket is packed while the one before travels. Where the bytes lie back to back already (an arena), they are
sent from where they are; else chunks are packed straight into one of two buffers.

    sender = BucketSender(group, source_rank=0, generation=1)
    sender.send(version, plan, pack, deadline, watch)          # pack(index, into) fills a chunk, and returns its hash
    sender.send_arena(version, plan, arena, hashes, deadline, watch)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from weightcast.sync.errors import ConfigError, WireError
from weightcast.sync.transports.collective_backend import BroadcastGroup, Watch
from weightcast.sync.transports.collective_buckets import Bucket, BucketPlan
from weightcast.sync.transports.collective_header import HASH_BYTES, Header, Kind, encode_header
from weightcast.sync.version import Version

Bytes = npt.NDArray[np.uint8]
PackChunk = Callable[[int, Bytes], bytes]
"""`pack(index, into)` fills `into`, which has the size of chunk `index`, and returns its xxh3-128. Called in order."""

NUM_BUFFERS = 2
_BROADCASTS_A_BUCKET = 2  # a header and a payload


@dataclass(frozen=True, slots=True)
class _Payload:
    bucket: Bucket
    data: torch.Tensor
    hashes: tuple[bytes, ...]


class BucketSender:
    """Sends versions over one group, in which it is rank 0. Used by one thread; a failed send leaves the group broken.

    Raises what `BroadcastGroup.wait` and the `watch` raise, and lets errors of the packing through.
    """

    def __init__(self, group: BroadcastGroup, source_rank: int, generation: int) -> None:
        if group.rank != 0:
            raise ConfigError(f"a sender is rank 0 of its group, this is rank {group.rank}; use a BucketReceiver")
        self._group = group
        self._source_rank = source_rank
        self._generation = generation
        self._works: deque[Any] = deque()
        self._host: list[torch.Tensor] = []
        self._device: list[torch.Tensor] = []

    def send(
        self,
        version: Version,
        plan: BucketPlan,
        pack: PackChunk,
        deadline: float,
        watch: Watch,
        seal: Callable[[], bytes] = bytes,
    ) -> None:
        """Pack and broadcast every chunk of `plan`, then what `seal` returns (digests, known once all is packed)."""
        self._stream(version, plan, self._packed(plan, pack), deadline, watch, seal)

    def send_arena(
        self,
        version: Version,
        plan: BucketPlan,
        arena: Bytes,
        hashes: Iterable[bytes],
        deadline: float,
        watch: Watch,
        seal: Callable[[], bytes] = bytes,
    ) -> None:
        """Broadcast chunks that lie back to back in `arena`, without a copy; `hashes` yields one as each is ready."""
        if len(arena) != plan.num_bytes:
            raise ConfigError(f"the arena has {len(arena)} bytes, the plan {plan.num_bytes}; plan its own chunks")
        self._stream(version, plan, self._cut(plan, arena, iter(hashes)), deadline, watch, seal)

    def _stream(
        self,
        version: Version,
        plan: BucketPlan,
        payloads: Iterator[_Payload],
        deadline: float,
        watch: Watch,
        seal: Callable[[], bytes],
    ) -> None:
        def header(kind: Kind, index: int, num_bytes: int, hashes: tuple[bytes, ...] = ()) -> Header:
            return Header(
                kind, self._source_rank, self._generation, version, plan.fingerprint, index, num_bytes, hashes
            )

        try:
            self._post_header(header(Kind.OPEN, len(plan.buckets), plan.num_bytes), deadline)
            for payload in payloads:
                bucket = payload.bucket
                self._post_header(header(Kind.BUCKET, bucket.index, bucket.num_bytes, payload.hashes), deadline)
                self._post(payload.data, deadline)
                # The next bucket is packed into the buffer of the one before this: that one must have left.
                self._drain(_BROADCASTS_A_BUCKET, deadline, watch)
            last = seal()
            self._post_header(header(Kind.SEAL, 0, len(last), (xxhash.xxh3_128_digest(last),)), deadline)
            if last:
                self._post_bytes(last, deadline)
            self._drain(0, deadline, watch)
        except BaseException:
            self.abandon()
            raise

    def _packed(self, plan: BucketPlan, pack: PackChunk) -> Iterator[_Payload]:
        self._host = self._buffers(self._host, plan.largest_bytes, pinned=self._group.device.type == "cuda")
        for bucket in plan.buckets:
            host = self._host[bucket.index % NUM_BUFFERS][: bucket.num_bytes]
            into = host.numpy()
            hashes = [
                pack(slot.index, into[slot.start_byte : slot.start_byte + slot.num_bytes]) for slot in bucket.slots
            ]
            yield _Payload(bucket, self._to_device(bucket, host, plan), _checked(hashes))

    def _cut(self, plan: BucketPlan, arena: Bytes, hashes: Iterator[bytes]) -> Iterator[_Payload]:
        for bucket in plan.buckets:
            ready = _checked([next(hashes) for _ in bucket.slots])
            host = torch.from_numpy(arena[bucket.start_byte : bucket.start_byte + bucket.num_bytes])
            yield _Payload(bucket, self._to_device(bucket, host, plan), ready)

    def _to_device(self, bucket: Bucket, host: torch.Tensor, plan: BucketPlan) -> torch.Tensor:
        if self._group.device.type == "cpu":
            return host
        self._device = self._buffers(self._device, plan.largest_bytes, device=self._group.device)
        device = self._device[bucket.index % NUM_BUFFERS][: bucket.num_bytes]
        device.copy_(host, non_blocking=True)
        # The host buffer is packed again two buckets later, by the CPU: the copy must have left it by then.
        torch.cuda.current_stream(self._group.device).synchronize()
        return device

    @staticmethod
    def _buffers(
        held: list[torch.Tensor], num_bytes: int, pinned: bool = False, device: Any = "cpu"
    ) -> list[torch.Tensor]:
        if not held or len(held[0]) < num_bytes:
            return [
                torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned) for _ in range(NUM_BUFFERS)
            ]
        return held

    def _post_header(self, header: Header, deadline: float) -> None:
        self._post_bytes(encode_header(header), deadline)

    def _post_bytes(self, raw: bytes, deadline: float) -> None:
        self._post(torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self._group.device), deadline)

    def _post(self, data: torch.Tensor, deadline: float) -> None:
        self._works.append(self._group.broadcast(data, deadline))

    def _drain(self, num_left: int, deadline: float, watch: Watch) -> None:
        while len(self._works) > num_left:
            self._group.wait(self._works[0], deadline, watch)
            self._works.popleft()

    def abandon(self) -> None:
        """Close the group."""
        self._group.close()
        self._works.clear()


def _checked(hashes: list[bytes]) -> tuple[bytes, ...]:
    if any(len(value) != HASH_BYTES for value in hashes):
        raise WireError(f"a chunk's hash must have {HASH_BYTES} bytes (xxh3-128)")
    return tuple(hashes)
