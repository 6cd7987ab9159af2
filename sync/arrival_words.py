"""What an engine says of a version on its way: to the fleet when it is staged, in a sentence until then. Pure."""

from weightcast.sync.arrival import Arrival
from weightcast.sync.messages import Staged
from weightcast.sync.records import Span


def make_staged(arrival: Arrival, wall_offset_s: float) -> Staged:
    """The message that says all is here and checked."""
    end_s = arrival.staged_s + wall_offset_s
    stage_s = arrival.staged_s - arrival.started_s
    span = Span("stage", arrival.started_s + wall_offset_s, end_s)
    # Passes that do nothing but check, put together; where bytes are copied they are digested in the same pass.
    check_s = 0.0 if arrival.staging is None else min(arrival.staging.checking.seconds, stage_s)
    return Staged(
        arrival.announce.version,
        arrival.num_bytes,
        stage_s,
        arrival.checksums_checked,
        (span, Span("check", end_s - check_s, end_s)),
        arrival.transport,
        arrival.num_repeats,
        arrival.asked_bytes,
    )


def describe_arrival(arrival: Arrival) -> str:
    """In one sentence, where it is."""
    version = arrival.announce.version
    if arrival.is_staged and arrival.waits_for_engine:
        return f"version {version} is staged, and the engine prepares for it"
    if arrival.staging is None or arrival.is_staged:
        return f"version {version} is staged, and waits for the fleet's policy to release it"
    num_missing, broadcast = arrival.staging.num_missing, arrival.offer.describe_waiting()
    if not num_missing:
        return f"version {version} has come whole, and waits for the digests of the publisher's rank 0"
    silent = sorted({rank for rank, _ in arrival.asked_s})
    return f"version {version} lacks {num_missing} chunks, asked of the source ranks {silent}{broadcast}"
