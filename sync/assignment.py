"""Assignment: which source serves which region. Pure.

Sources offer every region that they hold, replicas included (norms under tensor parallelism, everything under data
parallelism, tied embeddings on two pipeline stages). Each distinct region gets one server, the holder with the
fewest bytes so far, and what is left must tile every tensor exactly.
"""

from collections.abc import Mapping, Sequence

from weightcast.sync.errors import SourceError
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault

MAX_FAULTS_SHOWN = 5


def assign_regions(
    specs: Sequence[TensorSpec], holdings: Mapping[int, Sequence[Region]]
) -> dict[int, tuple[Region, ...]]:
    """For each source rank, the regions it serves, in HF order; every element of every tensor exactly once.

    `holdings` maps a rank to the regions it holds. Raises `SourceError` when a region names no tensor of the
    model, or when the regions overlap or leave a gap.
    """
    order = {spec.name: index for index, spec in enumerate(specs)}
    holders = _find_holders(order, holdings)
    _check_tiling(specs, holders)
    itemsizes = {spec.name: spec.dtype.itemsize for spec in specs}
    load_bytes = dict.fromkeys(sorted(holdings), 0)
    served: dict[int, list[Region]] = {rank: [] for rank in load_bytes}
    # Large regions first: the small ones then level what is left uneven.
    for region in sorted(holders, key=lambda r: (-r.numel * itemsizes[r.name], order[r.name], r.offset)):
        rank = min(holders[region], key=lambda r: (load_bytes[r], r))
        load_bytes[rank] += region.numel * itemsizes[region.name]
        served[rank].append(region)
    return {rank: tuple(sorted(rows, key=lambda r: (order[r.name], r.offset))) for rank, rows in served.items()}


def _find_holders(order: Mapping[str, int], holdings: Mapping[int, Sequence[Region]]) -> dict[Region, list[int]]:
    holders: dict[Region, list[int]] = {}
    for rank in sorted(holdings):
        for region in dict.fromkeys(holdings[rank]):
            if region.name not in order:
                raise SourceError(
                    f"source rank {rank} holds {region}, which is no tensor of the model; "
                    "list the tensor in specs() on every rank, or do not offer it"
                )
            holders.setdefault(region, []).append(rank)
    return holders


def _check_tiling(specs: Sequence[TensorSpec], holders: Mapping[Region, Sequence[int]]) -> None:
    by_name: dict[str, list[Region]] = {spec.name: [] for spec in specs}
    for region in holders:
        by_name[region.name].append(region)
    faults = [
        f"{spec.name}: {fault}" for spec in specs if (fault := find_tiling_fault(spec, by_name[spec.name])) is not None
    ]
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS_SHOWN} more" if len(faults) > MAX_FAULTS_SHOWN else ""
        raise SourceError(
            f"the sources' regions do not make a whole model: {'; '.join(faults[:MAX_FAULTS_SHOWN])}{more}. "
            "Every rank of the model must take part, each with the same specs()"
        )
