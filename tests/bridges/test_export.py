"""Export: batches stay below their limit, files go round the writers, and a folder is whole or is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ranks import run_ranks

from weightcast.bridges.hf_folder import plan_files
from weightcast.bridges.parcels import LiveRegions, Parcel, Routes, split_batches
from weightcast.sync.errors import SourceError, WeightcastError
from weightcast.sync.regions import HeldRegion, Region, TensorSpec


def spec(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 60))
def test_batches_keep_the_order_and_the_limit(sizes: list[int], max_bytes: int) -> None:
    specs = [spec(f"t{index}", size, dtype=torch.uint8) for index, size in enumerate(sizes)]
    batches = split_batches(specs, max_bytes)
    assert [item for batch in batches for item in batch] == specs
    for batch in batches:
        assert len(batch) == 1 or sum(item.num_bytes for item in batch) <= max_bytes


def test_a_parcel_carries_regions_of_several_dtypes() -> None:
    regions = [Region("a", (1, 0), (1, 3)), Region("b", (0,), (5,)), Region("c", (0, 1), (2, 1))]
    dtypes = {"a": torch.bfloat16, "b": torch.int8, "c": torch.float32}
    parcel = Parcel.make(3, regions, dtypes)
    source = {"a": torch.rand(2, 3), "b": torch.arange(5), "c": torch.rand(2, 2)}  # of wider dtypes: packing casts
    live = LiveRegions(HeldRegion(region, partial(lambda r: source[r.name][r.slices], region)) for region in regions)
    target = {name: torch.zeros(tensor.shape, dtype=dtypes[name]) for name, tensor in source.items()}
    parcel.unpack(parcel.pack(live, torch.device("cpu")), target)
    for region in regions:
        want = source[region.name][region.slices].to(dtypes[region.name])
        assert torch.equal(target[region.name][region.slices], want)
    assert target["a"][0].sum() == 0 and parcel.num_bytes == 48


def test_a_writer_takes_from_itself_what_it_holds_and_the_rest_is_spread() -> None:
    specs = [spec("a", 4), spec("b", 4), spec("c", 4)]
    everything = [item.whole() for item in specs]
    routes = Routes.make(specs, {0: everything, 1: everything, 2: everything[2:]})
    assert [(p.source, len(p.regions)) for p in routes.parcels(specs)] == [(0, 1), (1, 1), (2, 1)]
    assert [(p.source, len(p.regions)) for p in routes.parcels(specs, to=1)] == [(1, 3)]
    assert [(p.source, len(p.regions)) for p in routes.parcels(specs, to=2)] == [(0, 1), (1, 1), (2, 1)]
    with pytest.raises(SourceError, match="c: 0 of 4 elements are held"):
        Routes.make(specs, {0: everything[:2]})


def test_files_are_named_as_in_hf_and_go_round_the_ranks() -> None:
    specs = [spec(f"t{index}", 10) for index in range(5)]
    assert [file.name for file in plan_files(specs, 200, 2)] == ["model.safetensors"]
    files = plan_files(specs, 80, 2)
    assert [file.name for file in files] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [file.writer for file in files] == [0, 1, 0]


@contextmanager
def refusal(outcome: dict[str, str], case: str) -> Iterator[None]:
    outcome[case] = "not refused"
    try:
        yield
    except (WeightcastError, OSError) as error:
        outcome[case] = str(error)


def fail_and_recover(models: str, out: str) -> dict[str, str]:
    """On two ranks: what every rank sees of a failure on one, and that a later save goes through."""
    from weightcast.bridges import AutoBridge
    from weightcast.bridges.hf_export import export_weights
    from weightcast.bridges.hf_folder import save_weights

    bridge = AutoBridge.from_hf_pretrained(Path(models, "qwen2"))
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    plan, folder = bridge.plan(model), Path(out, "new")
    outcome: dict[str, str] = {}

    def disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with refusal(outcome, "disk full"):
        save_weights(plan, folder, write_extras=disk_full)
    outcome["left behind"] = str(sorted(path.name for path in Path(out).iterdir()))
    with refusal(outcome, "foreign folder"):
        bridge.save_hf_weights(model, Path(out, "foreign"), show_progress=False)
    dist.barrier()

    small = dict(export_weights(plan, max_in_flight_bytes=2**16))
    large = dict(export_weights(plan))
    assert small.keys() == large.keys() == {item.name for item in plan.specs}
    assert all(torch.equal(small[name], large[name]) for name in small)
    tasks = [task for task in bridge.get_conversion_tasks(model) if "linear_qkv.bias" in task.global_param_name]
    some = [name for name, _ in bridge.export_hf_weights(model, cpu=True, conversion_tasks=tasks)]
    outcome["some"] = f"{len(tasks)} tasks, {len(some)} tensors, {some[0]}"

    bridge.save_hf_weights(model, folder, show_progress=False)
    outcome["weights only"] = str(sorted(path.name for path in folder.iterdir()))
    bridge.save_hf_pretrained(model, folder, shard_bytes=60_000)
    outcome["whole"] = str(sorted(path.name for path in folder.iterdir() if not path.name.startswith("model-")))
    outcome["all"] = str(sorted(path.name for path in Path(out).iterdir()))
    return outcome


def test_a_failure_on_one_rank_is_seen_on_all_and_leaves_no_folder(tiny_models: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    first, second = run_ranks(fail_and_recover, 2, str(tiny_models), str(tmp_path))
    assert "No space left" in first.pop("disk full")
    assert "failed on another rank" in second.pop("disk full")
    assert "foreign exists and holds thesis.tex" in first.pop("foreign folder")
    assert "failed on another rank" in second.pop("foreign folder")
    assert (foreign / "thesis.tex").exists()
    assert first.pop("left behind") == "['.new.partial', 'foreign']"
    assert second.pop("left behind") == "['.new.partial', 'foreign']"
    companions = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (
        first
        == second
        == {
            "some": "4 tasks, 12 tensors, model.layers.0.self_attn.k_proj.bias",
            "weights only": "['model.safetensors']",
            "whole": str(sorted([*companions, "model.safetensors.index.json"])),
            "all": "['foreign', 'new']",
        }
    )
    for name in companions:
        assert (tmp_path / "new" / name).read_bytes() == (tiny_models / "qwen2" / name).read_bytes()
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] > 0 and len(index["weight_map"]) == 51


DIES = """
import os, sys
from pathlib import Path
from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_folder import save_weights

models, folder = Path(sys.argv[1]), Path(sys.argv[2])
bridge = AutoBridge.from_hf_pretrained(models / "qwen2")
model = bridge.to_megatron_model(wrap_with_ddp=False)
done = 0
def die(count):
    global done
    done += count
    if done > 20:
        os._exit(9)
save_weights(
    bridge.plan(model), folder, progress=die, shard_bytes=30_000, write_extras=bridge.hf_config.save_pretrained
)
"""


def test_a_run_that_dies_leaves_nothing_that_looks_complete(tiny_models: Path, tmp_path: Path) -> None:
    env: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DIES, str(tiny_models), str(tmp_path / "export")]
    assert subprocess.run(command, env=env, timeout=120, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name == ".export.partial"
    assert not (left / "config.json").exists() and not (left / "model.safetensors.index.json").exists()
