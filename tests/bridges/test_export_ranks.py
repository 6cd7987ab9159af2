"""`export_hf_weights` on real ranks: who gets what, in which dtype, in how many collectives and bytes in flight."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.bridges.no_collectives import no_collectives
from tests.ranks import run_ranks
from tests.traffic import TrafficMeter

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_export import HFWeightTuple
from weightcast.bridges.hf_options import read_dtype
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import WeightcastError

LIMIT_BYTES = 2**16


def build(folder: Path, layout: dict[str, int]) -> tuple[AutoBridge, list[Any]]:
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for name, size in layout.items():
        setattr(provider, name, size)
    provider.finalize()
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except WeightcastError as error:
        return str(error)
    return "not refused"


def read(items: Iterator[HFWeightTuple], reference: dict[str, torch.Tensor]) -> tuple[int, bool]:
    """The number of tensors, and whether each has the bits of `reference`, which has them in the same dtype."""
    count, equal = 0, True
    for name, weight in items:
        count, equal = count + 1, equal and torch.equal(weight, reference[name])
        del weight
    return count, equal


def export_in_every_way(models: str, name: str, layout: dict[str, int]) -> dict[str, Any]:
    bridge, model = build(Path(models, name), layout)
    full = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))
    outcome: dict[str, Any] = {"tensors": len(full)}
    cases: dict[str, dict[str, Any]] = {
        "all": {"max_in_flight_bytes": LIMIT_BYTES},
        "last": {"ranks": [dist.get_world_size() - 1], "max_in_flight_bytes": LIMIT_BYTES},
        "two": {"ranks": (3, 0), "dtype": "bfloat16", "max_in_flight_bytes": LIMIT_BYTES},
        "at once": {"dtype": torch.float16},
    }
    for case, options in cases.items():
        dtype = read_dtype(options.get("dtype", torch.float32))
        reference = {name: tensor.to(dtype) for name, tensor in full.items()}
        with TrafficMeter() as meter:
            count, equal = read(bridge.export_hf_weights(model, show_progress=False, **options), reference)
        outcome[case] = [count, equal, dict(meter.calls)]
        outcome[f"{case} peak"] = meter.peak_bytes
    dtypes = {weight.dtype for _, weight in bridge.export_hf_weights(model, dtype="bfloat16", ranks=[0])}
    outcome["dtypes"] = sorted(str(dtype) for dtype in dtypes)

    mine = [0] if dist.get_rank() == 1 else None
    outcome["other ranks"] = message(lambda: list(bridge.export_hf_weights(model, ranks=mine)))
    outcome["no such rank"] = message(lambda: list(bridge.export_hf_weights(model, ranks=[0, 9])))
    outcome["no rank"] = message(lambda: list(bridge.export_hf_weights(model, ranks=[])))
    outcome["dtype"] = message(lambda: list(bridge.export_hf_weights(model, dtype=torch.int8)))
    outcome["limit"] = message(lambda: list(bridge.export_hf_weights(model, max_in_flight_bytes=5)))
    other = bridge if dist.get_rank() else AutoBridge.from_hf_pretrained(Path(models, "llama3.2"))
    outcome["other model"] = message(lambda: list(other.export_hf_weights(model)))
    return outcome


def export_all_layouts(models: str) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = []
    for name, layout in (
        ("qwen3", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        ("qwen3-moe", {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ):
        outcomes.append(export_in_every_way(models, name, layout))
        destroy_model_parallel()
    return outcomes


def test_full_tensors_on_the_ranks_that_want_them(tiny_models: Path) -> None:
    by_rank = run_ranks(export_all_layouts, 4, str(tiny_models))
    for rank, outcomes in enumerate(by_rank):
        for outcome in outcomes:
            count = outcome["tensors"]
            for case, wanted in {"all": True, "last": rank == 3, "two": rank in (0, 3), "at once": True}.items():
                got, equal, calls = outcome[case]
                assert (got, equal) == (count if wanted else 0, True), (rank, case)
                # Ranks agree on a plan and tell each other what they hold: three collectives, whatever follows.
                assert calls.pop("allreduce_") == 1 and calls.pop("allgather_") == 2
                assert calls.keys() <= {"send", "recv_"}
            largest = 131 * 32 * 4  # the embedding
            for case in ("all", "last", "two"):
                assert 0 < outcome[f"{case} peak"] <= max(LIMIT_BYTES, largest + LIMIT_BYTES // 4)
            # One batch: at most a message to and from each other rank, each parcel once. Only the last rank receives.
            assert sum(outcome["at once"][2].values()) <= 6
            assert outcome["last"][2].keys() <= ({"recv_"} if rank == 3 else {"send"})
            assert outcome["dtypes"] == (["torch.bfloat16"] if rank == 0 else [])
            assert "rank 1 asks for another export than rank 0 (its settings here: ranks " in outcome["other ranks"]
            assert outcome["no such rank"] == (
                "ranks=[0, 9] names no rank, or one that does not exist; give ranks of 0 to 3, or None for all"
            )
            assert "ranks=[] names no rank" in outcome["no rank"]
            assert "dtype torch.int8 is none of float32, float16, bfloat16" in outcome["dtype"]
            assert "give at least 65536" in outcome["limit"]
            expected = "failed on another rank" if rank else "Megatron tensor"
            assert expected in outcome["other model"], outcome["other model"]


def export_alone(models: str) -> tuple[int, bool]:
    bridge, model = build(Path(models, "qwen2-moe"), {})
    with no_collectives():
        full = dict(bridge.export_hf_weights(model))
        return read(bridge.export_hf_weights(model, ranks=[0], max_in_flight_bytes=2**16), full)


def test_one_rank_needs_no_collective(tiny_models: Path) -> None:
    ((count, equal),) = run_ranks(export_alone, 1, str(tiny_models), process_group=False)
    assert count > 60 and equal
