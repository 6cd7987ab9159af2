"""The parity job: logits, loss and gradients of Megatron and of transformers for every model and layout.

One group of four processes does it all.

Started by `test_parity.py` once for the whole matrix, because starting a process and importing Megatron takes longer
than all of the arithmetic. Rank 0 writes the random checkpoints and transformers' numbers to OUT and, at the end,
`differences.json`: the largest difference by layout and model.

    RANK=.. WORLD_SIZE=4 MASTER_ADDR=.. MASTER_PORT=.. python parity_job.py OUT
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from safetensors.torch import load_file, save_file
from tests.bridges.parity_models import (
    COMMON,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    MODELS,
    MOE_GRADIENT_LAYOUTS,
    MOE_LAYOUTS,
    MOE_MODELS,
    SABOTAGE,
)
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.layers.context_parallel import positions_of_all
from weightcast.bridges.plan import Plan
from weightcast.bridges.process_groups import destroy_distributed, destroy_model_parallel, initialize_distributed
from weightcast.bridges.provider import GPTModelProvider

NUM_MICROBATCHES, MICRO_BATCH, SEQUENCE = 2, 2, 24
ROUTER_BIAS = "e_score_correction_bias"  # a buffer, which Megatron moves by itself after each step
SMALLEST_GRADIENT = 1e-4  # of an expert that no token has reached there is none


def tokens() -> torch.Tensor:
    """Inputs and, one further, labels: [microbatches * batch, sequence + 1]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, COMMON["vocab_size"], (NUM_MICROBATCHES * MICRO_BATCH, SEQUENCE + 1), generator=generator)


def write_model(name: str, folder: Path) -> None:
    """Save a random checkpoint, and transformers' logits, loss and gradients for `tokens()`."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config((MODELS | MOE_MODELS)[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:  # norms start as constants and biases as zeros, under which mistakes are invisible
                tensor.add_(torch.randn_like(tensor) * 0.3)
    write_expected(model, folder)


def write_expected(model: Any, folder: Path) -> None:
    """Save `model` to `folder`, and transformers' logits, loss and gradients for `tokens()`; its weights are lost."""
    logits = model(tokens()[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())
    torch.autograd.backward(loss)
    save_file({"logits": logits.detach(), "loss": loss.detach()}, folder / "expected.safetensors")
    model.save_pretrained(folder / "model")
    for parameter in model.parameters():  # saved as weights are, because in memory experts have other names
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    model.save_pretrained(folder / "gradients")


def build(folder: Path, settings: dict[str, Any], with_ddp: bool = False) -> tuple[GPTModelProvider, list[Any], Plan]:
    """The provider and this rank's part of the model, with the checkpoint's weights."""
    bridge = AutoBridge.from_hf_pretrained(folder / "model")
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in settings.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    model = provider.provide_distributed_model(wrap_with_ddp=with_ddp)
    plan = bridge.plan(model)
    import_weights(plan, bridge.hf_checkpoint())
    return provider, [chunk.eval() for chunk in model], plan


def on_this_context_rank(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Of each [batch, sequence] the tokens that this context parallel rank computes."""
    settings: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters:  # megatron-core 0.19
        settings["is_hybrid_cp"] = False
    cut = get_batch_on_this_cp_rank({str(number): part for number, part in enumerate(parts)}, **settings)
    return [part.contiguous() for part in cut.values()]


def over_context_ranks(logits: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, vocabulary] from this rank's tokens and those of the other context parallel ranks."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=1)[:, positions_of_all(logits.shape[1], group.size()).argsort()]


def logits_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """One microbatch through one chunk, as Megatron's schedules call it; gives the logits."""
    inputs = next(batches)[:, :-1]
    inputs, positions = on_this_context_rank(inputs, torch.arange(inputs.shape[1]).expand_as(inputs))

    def whole_vocabulary(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return over_context_ranks(gather_from_tensor_model_parallel_region(output))

    return chunk(inputs, positions, None), whole_vocabulary


def loss_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The same for the loss of the next token."""
    batch = next(batches)
    positions = torch.arange(batch.shape[1] - 1).expand_as(batch[:, 1:])
    inputs, labels, positions = on_this_context_rank(batch[:, :-1], batch[:, 1:], positions)
    context = parallel_state.get_context_parallel_group()

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of all context parallel ranks' tokens; Megatron adds up the ranks' losses."""
        share = losses.mean() / context.size()
        whole = share.detach().clone()
        dist.all_reduce(whole, group=context)
        return share, {"loss": whole}

    return chunk(inputs, positions, None, labels=labels), mean


def run_schedule(step: Callable[..., Any], model: list[Any], **options: Any) -> list[Any]:
    """All microbatches through Megatron's schedule for the layout at hand."""
    batches = [iter(torch.split(tokens(), MICRO_BATCH)) for _ in model]
    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=NUM_MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        **options,
    )
    return outputs


def largest_on_any_rank(value: float) -> float:
    difference = torch.tensor([value], dtype=torch.float64)
    difference.nan_to_num_(nan=float("inf"))
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


def largest_difference(folder: Path, settings: dict[str, Any]) -> float:
    """Build, import, run Megatron's pipeline schedule, and compare on the last stage; the same value on every rank."""
    _, model, _ = build(folder, settings)
    return logits_difference(folder, model)


def logits_difference(folder: Path, model: list[Any]) -> float:
    """Run `model`, which has the weights of `folder`, and compare on the last stage; the same value on every rank."""
    with torch.no_grad():
        outputs = run_schedule(logits_step, model, forward_only=True, collect_non_loss_data=True)
    difference = 0.0
    if parallel_state.is_pipeline_last_stage():
        logits = torch.cat(outputs)[..., : model[-1].config.vocab_size]
        difference = (logits - load_file(folder / "expected.safetensors")["logits"]).abs().max().item()
    return largest_on_any_rank(difference)


def largest_gradient_difference(folder: Path, settings: dict[str, Any]) -> float:
    """The largest difference of the loss, and of a gradient in relation to the largest of its tensor.

    Megatron's gradients are laid where the parameters are, so that the plan gives their places in the HF tensors.
    """
    provider, model, plan = build(folder, settings, with_ddp=True)
    provider.finalize_model_grads_func = finalize_model_grads
    outputs = run_schedule(loss_step, model, forward_only=False)
    expected = load_file(folder / "expected.safetensors")
    differences = [0.0]
    if outputs:
        loss = torch.stack([output["loss"] for output in outputs]).mean()
        differences.append((loss - expected["loss"]).abs().item())
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    gradients = load_file(folder / "gradients" / "model.safetensors")
    for held in plan.regions:
        if held.region.name.endswith(ROUTER_BIAS):
            continue
        gradient = gradients[held.region.name]
        difference = (held.live() - gradient[held.region.slices]).abs().max()
        differences.append((difference / gradient.abs().max().clamp_min(SMALLEST_GRADIENT)).item())
    return largest_on_any_rank(max(differences))


def compare_all(
    out: Path, models: Iterable[str], layouts: dict[str, dict[str, Any]], gradient_layouts: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The largest difference by layout and model; of gradients under `gradients-` and the layout."""
    differences: dict[str, dict[str, float]] = {}
    for layout, sizes in layouts.items():
        compare = partial(largest_difference, settings=sizes)
        differences[layout] = {name: compare(out / name) for name in models}
        if layout in gradient_layouts:
            compare_gradients = partial(largest_gradient_difference, settings=sizes)
            differences[f"gradients-{layout}"] = {name: compare_gradients(out / name) for name in models}
        destroy_model_parallel()
    return differences


def main(out: Path) -> None:
    initialize_distributed()
    if dist.get_rank() == 0:
        for name in (*MODELS, *MOE_MODELS):
            (out / name).mkdir()
            write_model(name, out / name)
    dist.barrier()
    differences = compare_all(out, MODELS, LAYOUTS, GRADIENT_LAYOUTS)
    moe_differences = compare_all(out, MOE_MODELS, MOE_LAYOUTS, MOE_GRADIENT_LAYOUTS)
    differences |= {f"moe-{layout}": by_model for layout, by_model in moe_differences.items()}
    differences["sabotage"] = {
        name: largest_difference(out / model, settings) for name, (model, settings) in SABOTAGE.items()
    }
    if dist.get_rank() == 0:
        (out / "differences.json").write_text(json.dumps(differences, indent=1))
    destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
