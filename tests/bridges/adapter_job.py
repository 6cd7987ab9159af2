"""What ranks do with adapters: load a PEFT folder in a layout, compare with `peft`, save it again."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from safetensors.torch import load_file
from tests.bridges.parity_job import SMALLEST_GRADIENT, largest_on_any_rank, logits_step, loss_step, run_schedule

from weightcast.bridges import AutoBridge
from weightcast.bridges.peft import merged_adapters
from weightcast.bridges.peft.names import LORA_A


def build_adapted(folder: Path, sizes: dict[str, Any], with_ddp: bool = True) -> tuple[AutoBridge, Any, list[Any]]:
    """The bridge, provider and this rank's chunks of `folder/model` with the adapters of `folder/adapter`."""
    bridge = AutoBridge.from_hf_pretrained(folder / "model")
    provider = bridge.to_megatron_provider()
    for name, value in sizes.items():
        setattr(provider, name, value)
    provider.register_pre_wrap_hook(partial(bridge.load_hf_adapter, path=folder / "adapter"))
    model = provider.provide_distributed_model(wrap_with_ddp=with_ddp)
    return bridge, provider, [chunk.eval() for chunk in model]


def logits_difference(provider: Any, model: list[Any], expected: torch.Tensor) -> float:
    """The largest difference on the last stage; the same value on every rank."""
    with torch.no_grad():
        outputs = run_schedule(logits_step, model, forward_only=True, collect_non_loss_data=True)
    difference = 0.0
    if parallel_state.is_pipeline_last_stage():
        difference = (torch.cat(outputs)[..., : provider.vocab_size] - expected).abs().max().item()
    return largest_on_any_rank(difference)


def run_backward(provider: Any, model: list[Any]) -> list[Any]:
    """Megatron's schedule; gradients are laid where the parameters are, so that the plan says which are whose."""
    provider.finalize_model_grads_func = finalize_model_grads
    outputs = run_schedule(loss_step, model, forward_only=False)
    for chunk in model:
        for parameter in chunk.parameters():
            assert parameter.requires_grad == hasattr(parameter, "main_grad")
            if parameter.requires_grad:
                parameter.data.copy_(parameter.main_grad)
    return outputs


def gradient_difference(bridge: AutoBridge, provider: Any, model: list[Any], folder: Path) -> float:
    """The largest difference of the loss, and of an adapter's gradient in relation to the largest of its tensor.

    An A that several HF modules share has the sum of their gradients.
    """
    outputs = run_backward(provider, model)
    differences = [0.0]
    if outputs:
        expected_loss = load_file(folder / "expected.safetensors")["loss"]
        loss = torch.stack([output["loss"] for output in outputs]).mean()
        differences.append((loss - expected_loss).abs().item())
    gradients = load_file(folder / "gradients" / "adapter_model.safetensors")
    for task in bridge.adapter_plan(model).tasks:
        for held in task.held:
            names = task.hf_names if held.region.name.endswith(LORA_A) else (held.region.name,)
            gradient = torch.stack([gradients[name] for name in names]).sum(0)
            difference = (held.live() - gradient[held.region.slices]).abs().max()
            differences.append((difference / gradient.abs().max().clamp_min(SMALLEST_GRADIENT)).item())
    return largest_on_any_rank(max(differences))


def merged_difference(bridge: AutoBridge, provider: Any, model: list[Any], folder: Path, layout: str) -> float:
    """As `logits_difference`, with merged weights, which are saved; then all weights have their own bits again."""
    before = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    expected = load_file(folder / "expected.safetensors")["merged_logits"]
    with merged_adapters(model):
        difference = logits_difference(provider, model, expected)
        bridge.save_hf_pretrained(model, folder / f"merged-{layout}", show_progress=False)
    after = [parameter for chunk in model for parameter in chunk.parameters()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))
    return difference
