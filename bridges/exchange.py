"""Exchange: the few collectives of an export, over all ranks of the job and only here.

Ranks tell each other once which regions they hold; after that, parcels travel in batches, either to everybody
(`broadcast_parcels`) or each to the one rank that writes it (`send_parcels`). Without a process group the same
functions do what one rank alone needs. Every rank must call each of them, in the same order.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from weightcast.bridges.parcels import Parcel
from weightcast.sync.errors import BridgeError
from weightcast.sync.regions import Region, TensorSpec

Live = Mapping[Region, Callable[[], torch.Tensor]]


def get_rank() -> int:
    """This process among all ranks of the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of ranks of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def communication_device() -> torch.device:
    """Where tensors must lie for the job's process group: NCCL takes CUDA memory, everything else the host's."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_holdings(specs: Sequence[TensorSpec], regions: Sequence[Region]) -> dict[int, tuple[Region, ...]]:
    """The regions that every rank holds, by rank; `specs` must be the same on all of them."""
    if get_world_size() == 1:
        return {0: tuple(regions)}
    device = communication_device()
    mine = torch.tensor(_encode(specs, regions), dtype=torch.int64, device=device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)], dtype=torch.int64, device=device))
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    everyones = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(everyones, padded)
    return {
        rank: _decode(specs, numbers[: int(length)].tolist())
        for rank, (numbers, length) in enumerate(zip(everyones, lengths, strict=True))
    }


def broadcast_parcels(parcels: Sequence[Parcel], live: Live, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill full `tensors` on every rank from the parcels of all of them."""
    device = communication_device()
    buffers = [
        parcel.pack(live, device)
        if parcel.source == get_rank()
        else torch.empty(parcel.num_bytes, dtype=torch.uint8, device=device)
        for parcel in parcels
    ]
    if get_world_size() > 1:
        for parcel, buffer in zip(parcels, buffers, strict=True):
            dist.broadcast(buffer, src=parcel.source)
    for parcel, buffer in zip(parcels, buffers, strict=True):
        parcel.unpack(buffer, tensors)


def send_parcels(parcels_to: Mapping[int, Sequence[Parcel]], live: Live, tensors: Mapping[str, torch.Tensor]) -> None:
    """Deliver to each rank in `parcels_to` its parcels; the receiver's go into its full `tensors`."""
    device, rank = communication_device(), get_rank()
    operations: list[dist.P2POp] = []
    received: list[tuple[Parcel, torch.Tensor]] = []
    for receiver, parcels in parcels_to.items():
        for parcel in parcels:
            if parcel.source == rank == receiver:
                received.append((parcel, parcel.pack(live, device)))
            elif parcel.source == rank:
                operations.append(dist.P2POp(dist.isend, parcel.pack(live, device), receiver))
            elif receiver == rank:
                buffer = torch.empty(parcel.num_bytes, dtype=torch.uint8, device=device)
                operations.append(dist.P2POp(dist.irecv, buffer, parcel.source))
                received.append((parcel, buffer))
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    for parcel, buffer in received:
        parcel.unpack(buffer, tensors)


def agree(error: Exception | None, what: str) -> None:
    """Raise on every rank when a step failed on any: the error itself where it happened, a pointer to it elsewhere.

    A rank that raised alone would leave the others waiting for it until the process group's time is up.
    """
    failed = torch.tensor([error is not None], dtype=torch.int32, device=communication_device())
    if get_world_size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    if error is not None:
        raise error
    if failed.item():
        raise BridgeError(f"{what} failed on another rank; its own message says why")


def _encode(specs: Sequence[TensorSpec], regions: Sequence[Region]) -> list[int]:
    """Regions as numbers: the tensor's index, then its offset and shape, whose lengths the spec tells."""
    index = {spec.name: number for number, spec in enumerate(specs)}
    return [number for region in regions for number in (index[region.name], *region.offset, *region.shape)]


def _decode(specs: Sequence[TensorSpec], numbers: Sequence[int]) -> tuple[Region, ...]:
    regions: list[Region] = []
    place = 0
    while place < len(numbers):
        spec = specs[numbers[place]]
        middle, end = place + 1 + len(spec.shape), place + 1 + 2 * len(spec.shape)
        regions.append(Region(spec.name, tuple(numbers[place + 1 : middle]), tuple(numbers[middle:end])))
        place = end
    return tuple(regions)
