"""Slices: how the streams of many ranks reach every rank that wants them, without one of them sending it all.

In a batch each source has a stream of bytes (its parcel). Sent as they are, the streams of a batch that lies on one
pipeline stage would leave that stage's ranks once for every receiver. So the bytes are first levelled: each of the m
receivers gets one slot of a m-th of them, keeping what is its own and taking what others have too much of; then the
receivers exchange their slots, which are all of one size. Two collectives a batch, whatever the number of ranks; one
where a single rank receives or where nothing has to be levelled. (A broadcast as scatter and all-gather: van de Geijn.)

    slices = slice_streams({0: 96, 1: 96}, receivers=(0, 1, 2))
    slices.slot_bytes, slices.read(gathered, source=0, start=0, num_bytes=96)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Places in streams and slots are multiples of this, so that a view of any dtype is aligned.
ALIGNMENT_BYTES = 16


def round_up(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `start` to `stop` of the stream of `source`, which lie in the slot of `receiver` from byte `place` on."""

    source: int
    start: int
    stop: int
    receiver: int
    place: int

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Slices:
    """Where every byte of every stream lies once the receivers' slots are joined in the order of `receivers`."""

    receivers: tuple[int, ...]
    slot_bytes: int
    segments: Mapping[int, tuple[Segment, ...]]
    """By source, in the order of its stream; the first of a receiver's own stays with it."""

    @property
    def total_bytes(self) -> int:
        """The joined slots, their padding included."""
        return self.slot_bytes * len(self.receivers)

    @property
    def are_level(self) -> bool:
        """Whether every byte already is where its slot is, so that nothing has to be levelled."""
        return all(segment.receiver == source for source, parts in self.segments.items() for segment in parts)

    def kept_bytes(self, rank: int) -> int:
        """How much of its own stream a rank keeps."""
        return sum(part.num_bytes for part in self.segments.get(rank, ()) if part.receiver == rank)

    def sent_bytes(self, rank: int, world_size: int) -> list[int]:
        """What a rank sends to each rank when the streams are levelled: the rest of its stream, in order."""
        sizes = [0] * world_size
        for part in self.segments.get(rank, ()):
            if part.receiver != rank:
                sizes[part.receiver] += part.num_bytes
        return sizes

    def received_bytes(self, rank: int, world_size: int) -> list[int]:
        """What a rank gets from each rank when the streams are levelled: it follows what it keeps, in order."""
        sizes = [0] * world_size
        for source, parts in self.segments.items():
            sizes[source] += sum(part.num_bytes for part in parts if part.receiver == rank != source)
        return sizes

    def read(self, joined: torch.Tensor, source: int, start: int, num_bytes: int) -> torch.Tensor:
        """Bytes of a source's stream from the joined slots: a view, or a copy where they lie in several places."""
        stop = start + num_bytes
        parts = []
        for segment in self.segments[source]:
            first, last = max(start, segment.start), min(stop, segment.stop)
            if first < last:
                place = self.receivers.index(segment.receiver) * self.slot_bytes + segment.place - segment.start
                parts.append(joined[place + first : place + last])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def slice_streams(stream_bytes: Mapping[int, int], receivers: Sequence[int]) -> Slices:
    """Level streams of `stream_bytes`, by rank, over the slots of `receivers`. Pure.

    Streams are multiples of `ALIGNMENT_BYTES` long. Each rank's excess goes to the receivers that have room, both in
    the order of ranks, so that what one rank sends another, and what it gets, is in one piece.
    """
    receivers = tuple(sorted(receivers))
    slot_bytes = round_up(-(-sum(stream_bytes.values()) // len(receivers)))
    segments: dict[int, list[Segment]] = {source: [] for source in sorted(stream_bytes)}
    filled = dict.fromkeys(receivers, 0)
    for source, size in stream_bytes.items():
        if source in filled and size:
            filled[source] = min(size, slot_bytes)
            segments[source].append(Segment(source, 0, filled[source], source, 0))
    for source, parts in segments.items():
        start = parts[0].stop if parts else 0
        for receiver in receivers:
            count = min(stream_bytes[source] - start, slot_bytes - filled[receiver])
            if count > 0:
                parts.append(Segment(source, start, start + count, receiver, filled[receiver]))
                filled[receiver] += count
                start += count
    return Slices(receivers, slot_bytes, {source: tuple(parts) for source, parts in segments.items()})
