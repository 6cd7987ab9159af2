"""Qwen2.5-VL: logits, losses and gradients of transformers from images, a video and text, in every layout.

Two gloo processes compute the whole matrix; fp32, random small models. Rows are padded on either side; what is compared
are the tokens that are not padding.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_qwen25_vl import SEQUENCE, VL_MODELS, batches, labels_and_mask, write_vl_model
from tests.ranks import run_ranks

UNTIED = "qwen2.5-vl"
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
# A change of the provider under which parity must fail, or the test sees nothing.
SABOTAGE: dict[str, dict[str, Any]] = {
    "sections-in-another-order": {"mrope_section": [3, 3, 2]},
    "another-base": {"rotary_base": 400.0},
}
CASES = [(model, layout) for layout in LAYOUTS for model in VL_MODELS if model == UNTIED or "pp2" in layout]


def forward_step(inputs: Iterator[Any], chunk: Any) -> Any:
    """One case through one chunk, as Megatron's schedules call it; gives the logits."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def whole_vocabulary(output: torch.Tensor, non_loss_data: bool = True) -> Any:
        return gather_from_tensor_model_parallel_region(output)

    return chunk(**next(inputs)), whole_vocabulary


def loss_step(inputs: Iterator[Any], chunk: Any) -> Any:
    """The same for the loss of the next tokens that are not padding."""
    batch = next(inputs)
    labels, mask = labels_and_mask(batch)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses[mask].mean()
        return loss, {"loss": loss.detach().clone()}  # Megatron divides the first in place

    return chunk(**batch, labels=labels), mean


def run_schedule(step: Any, model: list[Any], **options: Any) -> list[Any]:
    """All cases, one a microbatch, through Megatron's schedule for the layout."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    inputs = [iter(batches().values()) for _ in model]
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=inputs if len(model) > 1 else inputs[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches()),
        seq_length=SEQUENCE,
        micro_batch_size=2,
        **options,
    )
    return outputs


def logits_difference(folder: Path, settings: dict[str, Any]) -> float:
    """The largest of all cases, on tokens that are not padding; the same value on every rank."""
    from megatron.core import parallel_state
    from safetensors.torch import load_file
    from tests.bridges.parity_job import build, largest_on_any_rank

    provider, model, _ = build(folder, settings)
    with torch.no_grad():
        outputs = run_schedule(forward_step, model, forward_only=True, collect_non_loss_data=True)
    difference = 0.0
    if parallel_state.is_pipeline_last_stage():
        expected = load_file(folder / "expected.safetensors")
        for (case, batch), logits in zip(batches().items(), outputs, strict=True):
            seen = batch["attention_mask"].bool()
            apart = (logits[..., : provider.vocab_size] - expected[case])[seen].abs().max().item()
            difference = max(difference, apart if apart == apart else float("inf"))
    return largest_on_any_rank(difference)


def gradient_difference(folder: Path, settings: dict[str, Any]) -> float:
    """The largest difference of the loss, and of a gradient in relation to the largest of its tensor."""
    from megatron.core.distributed import finalize_model_grads
    from safetensors.torch import load_file
    from tests.bridges.parity_job import build, largest_on_any_rank

    provider, model, plan = build(folder, settings, with_ddp=True)
    provider.finalize_model_grads_func = finalize_model_grads
    outputs = run_schedule(loss_step, model, forward_only=False)
    differences = [0.0]
    if outputs:
        loss = torch.stack([output["loss"] for output in outputs]).mean()
        differences.append((loss - load_file(folder / "expected.safetensors")["loss"]).abs().item())
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    gradients = load_file(folder / "gradients" / "model.safetensors")
    for held in plan.regions:
        gradient = gradients[held.region.name]
        assert gradient.abs().max() > 1e-4, held.region.name
        difference = (held.live() - gradient[held.region.slices]).abs().max() / gradient.abs().max()
        differences.append(difference.item())
    return largest_on_any_rank(max(differences))


def compute_differences(out: str) -> dict[str, float]:
    """The largest differences by case, the same on every rank."""
    from weightcast.bridges.process_groups import destroy_model_parallel

    if dist.get_rank() == 0:
        for name in VL_MODELS:
            Path(out, name).mkdir()
            write_vl_model(name, Path(out, name))
    dist.barrier()
    differences = {}
    for layout, sizes in LAYOUTS.items():
        for model, _ in [case for case in CASES if case[1] == layout]:
            differences[f"{model} {layout}"] = logits_difference(Path(out, model), sizes)
            differences[f"gradients {model} {layout}"] = gradient_difference(Path(out, model), sizes)
        destroy_model_parallel()
    for name, settings in SABOTAGE.items():
        differences[name] = logits_difference(Path(out, UNTIED), settings)
    destroy_model_parallel()
    return differences


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    result: dict[str, float] = run_ranks(compute_differences, 2, str(tmp_path_factory.mktemp("vl")), timeout_s=300)[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"{model} {layout}"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_loss_and_gradients_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"gradients {model} {layout}"] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("change", SABOTAGE)
def test_a_wrong_setting_shows(differences: dict[str, float], change: str) -> None:
    assert differences[change] > 100 * TOLERANCE
