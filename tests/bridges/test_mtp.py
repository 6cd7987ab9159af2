"""Layers for multi-token prediction: logits, losses and gradients, and the bits of checkpoints that store them.

Also the logits of Kimi K2, DeepSeek V3's architecture with other numbers (`test_kimi` has the rest of it).

Two gloo processes compute the whole matrix; `tiny_mtp` has the random models, and says what such a layer computes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.bridges.tiny_mla import write_mla_model
from tests.bridges.tiny_mtp import MTP_MODELS, write_mtp_model
from tests.ranks import run_ranks

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
# The bias for the choice of experts moves after each step, which is not a gradient.
STILL = {"moe_router_bias_update_rate": 0.0}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
CASES = [(model, layout) for layout in LAYOUTS for model in (*MTP_MODELS, "kimi-k2")]
# With tensor parallelism Megatron trains experts under sequence parallelism only.
TRAINED: dict[str, dict[str, Any]] = {"tp2-sequence-parallel": TP2_SP, "pp2-vpp2": VPP2}
TRAINED_CASES = [(model, layout) for layout in TRAINED for model in MTP_MODELS]
CONTEXT_MODELS = ("deepseek-v3-mtp2", "glm4-moe-mtp")


def largest_loss_difference(folder: Path, settings: dict[str, Any]) -> float:
    """Of the mean losses of the tokens behind the next one, in order of distance; the same value on every rank."""
    from tests.bridges import parity_job

    _, model, _ = parity_job.build(folder, settings)
    losses: list[torch.Tensor] = []
    last: Any = model[-1]  # Megatron asks it for the prediction layers' losses first, then for the next token's
    compute = last.compute_language_model_loss

    def record(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = compute(labels, logits)
        losses.append(result.detach())
        return result

    last.compute_language_model_loss = record
    parity_job.run_schedule(parity_job.loss_step, model, forward_only=True)
    wanted = load_file(folder / "expected.safetensors")["prediction_losses"].tolist()
    difference = 0.0
    for number, value in enumerate(wanted if losses else []):
        mine = torch.cat(losses[number :: len(wanted) + 1])
        difference = max(difference, abs(mine[:, : -number - 1].mean().item() - value))
    return parity_job.largest_on_any_rank(difference)


def compute_differences(out: str) -> dict[str, float]:
    """The largest differences by case, the same on every rank."""
    from tests.bridges import parity_job

    from weightcast.bridges.process_groups import destroy_model_parallel

    if dist.get_rank() == 0:
        for name in MTP_MODELS:
            Path(out, name).mkdir()
            write_mtp_model(name, Path(out, name), parity_job.tokens())
        Path(out, "kimi-k2").mkdir()
        write_mla_model("kimi-k2", Path(out, "kimi-k2"), parity_job.tokens())
    dist.barrier()
    differences = {}
    for layout, sizes in LAYOUTS.items():
        for model in (*MTP_MODELS, "kimi-k2"):
            differences[f"{model} {layout}"] = parity_job.largest_difference(Path(out, model), sizes)
        destroy_model_parallel()
    for layout, sizes in TRAINED.items():
        for model in MTP_MODELS:
            differences[f"losses {model} {layout}"] = largest_loss_difference(Path(out, model), sizes)
            worst = parity_job.largest_gradient_difference(Path(out, model), sizes | STILL)
            differences[f"gradients {model} {layout}"] = worst
        destroy_model_parallel()
    for model in CONTEXT_MODELS:
        settings = {"context_parallel_size": 2} | STILL
        differences[f"context {model}"] = parity_job.largest_gradient_difference(Path(out, model), settings)
    destroy_model_parallel()
    half = {"mtp_loss_scaling_factor": 0.05} | STILL
    differences["sabotage"] = parity_job.largest_gradient_difference(Path(out, "glm4-moe-mtp"), half)
    destroy_model_parallel()
    return differences


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    result: dict[str, float] = run_ranks(compute_differences, 2, str(tmp_path_factory.mktemp("mtp")), timeout_s=500)[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"{model} {layout}"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), TRAINED_CASES)
def test_losses_and_gradients_are_those_of_the_report(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"losses {model} {layout}"] <= TOLERANCE
    assert differences[f"gradients {model} {layout}"] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("model", CONTEXT_MODELS)
def test_each_token_counts_alike_where_ranks_share_a_sequence(differences: dict[str, float], model: str) -> None:
    assert differences[f"context {model}"] <= GRADIENT_TOLERANCE


@pytest.mark.slow
def test_a_wrong_share_of_the_losses_shows(differences: dict[str, float]) -> None:
    assert differences["sabotage"] > 100 * GRADIENT_TOLERANCE


def move_bits(out: str) -> list[str]:
    """Import without a collective, stream, export, save; in every layout the file's bits. Returns what was done."""
    from tests.bridges.no_collectives import no_collectives
    from tests.bridges.parity_job import tokens
    from tests.bridges.test_bits import build, check_export, check_regions, check_same_files

    from weightcast.bridges import AutoBridge
    from weightcast.bridges.process_groups import destroy_model_parallel
    from weightcast.sync.checkpoint_files import open_checkpoint

    if dist.get_rank() == 0:
        for name in MTP_MODELS:
            Path(out, name).mkdir()
            write_mtp_model(name, Path(out, name), tokens(), dtype=torch.bfloat16)
    dist.barrier()
    done = []
    for layout, sizes in (LAYOUTS | {"vpp2": VPP2}).items():
        for name in MTP_MODELS:
            folder = Path(out, name, "model")
            bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
            model = build(bridge, sizes)
            with no_collectives():
                bridge.load_hf_weights(model)
                source = bridge.weight_source(model)
                check_regions(list(source.held()), checkpoint)
            assert list(source.specs()) == list(checkpoint.specs)
            check_export(bridge, model, checkpoint)
            bridge.save_hf_pretrained(model, Path(out, f"{name}-{layout}"), show_progress=False)
            check_same_files(Path(out, f"{name}-{layout}"), checkpoint)
            done.append(f"{name} in {layout}")
        destroy_model_parallel()
    return done


@pytest.mark.slow
def test_checkpoints_keep_their_bits_and_their_copies_in_every_layout(tmp_path: Path) -> None:
    done = run_ranks(move_bits, 2, str(tmp_path), timeout_s=300)
    assert done == [[f"{name} in {layout}" for layout in (*LAYOUTS, "vpp2") for name in MTP_MODELS]] * 2
