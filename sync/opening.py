"""An engine opens an arrival: memory for a version that it fetches, or the reason why it cannot be."""

from collections.abc import Mapping

from weightcast.sync.arrival import ON_DEVICE, Arrival
from weightcast.sync.errors import WireError
from weightcast.sync.limits import Limits
from weightcast.sync.messages import Announce
from weightcast.sync.model_view import ModelView
from weightcast.sync.part_staging import open_staging
from weightcast.sync.shadow import Shadow


def open_arrival(
    engine: str,
    announce: Announce,
    model: ModelView,
    shadow: Shadow,
    limits: Limits,
    reached: Mapping[int, str],
    started_s: float,
) -> Arrival:
    """An arrival of a version that this engine fetches, whose memory is taken here.

    Raises `WireError` when there is too little of it, or when the publisher's layout cannot be.
    """
    assert model.specs is not None
    kinds = [reached.get(rank) for rank in range(model.num_sources)]
    shadow.reads_all = shadow.device is not None and all(kind == ON_DEVICE for kind in kinds)
    try:
        staging = open_staging(announce.version, model, shadow)
    except MemoryError:
        num_bytes = sum(spec.num_bytes for spec in model.staged_specs)
        raise WireError(
            f"engine {engine!r} has no memory for the {num_bytes} bytes of version {announce.version}"
        ) from None
    return Arrival(announce, staging, model.chunk_bytes, limits, started_s, dict(reached), specs=model.specs)
