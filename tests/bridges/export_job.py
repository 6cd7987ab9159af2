"""The ranks' part of the export benchmark: `export_hf_weights` against a gather by parameter, on one model.

torchrun --nproc-per-node 4 -m tests.bridges.export_job --case moe --rounds 5 --out moe.json

Both give every tensor to every rank, in turns within each round. A round of its own, which is not timed, counts
collectives and memory of both and compares the tensors bit for bit.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.bridges.gather_baseline import gather_by_parameter
from tests.traffic import TrafficMeter, resident_peak
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.plan import Plan
from weightcast.bridges.shards import unwrap_chunks


@dataclass(frozen=True)
class Case:
    """A model, its layout and the limit of bytes in flight."""

    config: PretrainedConfig
    layout: dict[str, int]
    limit_bytes: int


def _dense(layers: int, hidden: int, vocab: int, limit_bytes: int) -> Case:
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=hidden // 16,
        vocab_size=vocab,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    return Case(config, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, limit_bytes)


def _moe(layers: int, hidden: int, vocab: int, limit_bytes: int) -> Case:
    config = Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        num_hidden_layers=layers,
        hidden_size=hidden,
        moe_intermediate_size=hidden // 2,
        num_experts=64,
        num_experts_per_tok=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        vocab_size=vocab,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    return Case(config, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, limit_bytes)


CASES = {
    "dense": lambda: _dense(24, 1024, 32_000, 256 * 2**20),
    "moe": lambda: _moe(8, 512, 32_000, 256 * 2**20),
    "dense-tiny": lambda: _dense(24, 128, 1024, 8 * 2**20),
    "moe-tiny": lambda: _moe(4, 64, 1024, 8 * 2**20),
}


def build(case: Case) -> tuple[AutoBridge, list[Any]]:
    """The model, with values that tell a place in an HF tensor from its neighbours and are alike on replicas."""
    bridge = AutoBridge.from_hf_config(case.config)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, size in case.layout.items():
        setattr(provider, name, size)
    provider.perform_initialization = False
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    fill(bridge.plan(model))
    return bridge, model


@torch.no_grad()
def fill(plan: Plan) -> None:
    """Set every element from its coordinates and its tensor's number."""
    numbers = {spec.name: number for number, spec in enumerate(plan.specs)}
    for held in plan.regions:
        value = torch.full((), numbers[held.region.name], dtype=torch.int32)
        for factor, part in zip((31, 7), held.region.slices, strict=False):
            value = value.unsqueeze(-1) + torch.arange(part.start, part.stop, dtype=torch.int32) * factor
        held.live().copy_(value % 251)


def drain(items: Iterable[tuple[str, torch.Tensor]]) -> float:
    """Seconds until all ranks have gone through `items`, each tensor dropped at once."""
    dist.barrier()
    start_s = time.perf_counter()
    for _, tensor in items:
        del tensor
    dist.barrier()
    return time.perf_counter() - start_s


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Counts, bytes and seconds of one case, on this rank. Every rank must call it."""
    case = CASES[name]()
    bridge, model = build(case)

    def ours() -> Iterable[tuple[str, torch.Tensor]]:
        return bridge.export_hf_weights(model, show_progress=False, max_in_flight_bytes=case.limit_bytes)

    def theirs() -> Iterable[tuple[str, torch.Tensor]]:
        return gather_by_parameter(unwrap_chunks(model)[0], case.config)

    outcome: dict[str, Any] = {"limit_bytes": case.limit_bytes, "layout": case.layout}
    sums: dict[str, dict[str, int]] = {}
    for who, items in (("ours", ours), ("theirs", theirs)):
        with TrafficMeter() as meter:
            for _, tensor in items():
                del tensor
        with resident_peak() as peak:
            drain(items())
            outcome[f"{who}_resident_bytes"] = peak()
        sums[who] = {key: digest(tensor) for key, tensor in items()}
        outcome |= {f"{who}_calls": dict(meter.calls), f"{who}_peak_bytes": meter.peak_bytes}
    assert list(sums["ours"].values()) and sums["ours"] == sums["theirs"]
    outcome |= {"num_tensors": len(sums["ours"]), "num_bytes": sum(s.num_bytes for s in bridge.plan(model).specs)}
    times = [(drain(ours()), drain(theirs())) for _ in range(rounds)]
    if times:
        outcome |= {
            f"{who}_s": statistics.median(column)
            for who, column in zip(("ours", "theirs"), zip(*times, strict=True), strict=True)
        }
        outcome["time_ratio"] = statistics.median(theirs_s / ours_s for ours_s, theirs_s in times)
    return outcome


def digest(tensor: torch.Tensor) -> int:
    """A number of a tensor's bits that depends on their order."""
    rows = tensor.contiguous().view(torch.int16).flatten().to(torch.int64)
    weights = torch.arange(1, 1025).repeat(-(-len(rows) // 1024))[: len(rows)]
    return int((rows * weights).sum()) + tensor.numel()


def main() -> None:
    """Measure one case under torchrun; rank 0 writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    outcome = measure(options.case, options.rounds)
    if dist.get_rank() == 0:
        options.out.write_text(json.dumps(outcome, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
