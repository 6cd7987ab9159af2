"""The export benchmark's claims that do not need a clock, on tiny models: bits, collectives and bytes in flight."""

from typing import Any

from tests.bridges.export_job import measure
from tests.ranks import run_ranks

from weightcast.bridges.process_groups import destroy_model_parallel


def measure_tiny(rounds: int) -> dict[str, Any]:
    outcome = {}
    for name in ("dense-tiny", "moe-tiny"):
        outcome[name] = measure(name, rounds)
        destroy_model_parallel()
    return outcome


def test_fewer_collectives_than_a_gather_by_parameter_and_no_more_memory_than_allowed() -> None:
    for outcome in run_ranks(measure_tiny, 4, 0):
        for name, ratio in (("dense-tiny", 5), ("moe-tiny", 50)):
            case = outcome[name]
            # Messages between two ranks count as much as collectives of all.
            assert sum(case["theirs_calls"].values()) >= ratio * sum(case["ours_calls"].values()), case
            assert 0 < case["ours_peak_bytes"] <= case["limit_bytes"], case
