"""The parity job: logits, loss and gradients of Megatron and of transformers for every model and layout.

One group of four processes does it all.

Started by `test_parity.py` once for the whole matrix, because starting a process and importing Megatron takes longer
than all of the arithmetic. Rank 0 writes the random checkpoints and transformers' numbers to OUT and, at the end,
`differences.json`: the largest difference by layout and model.

    RANK=.. WORLD_SIZE=4 MASTER_ADDR=.. MASTER_PORT=.. python parity_job.py OUT
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.models.registry import find_bridge
from weightcast.bridges.plan import Plan, build_plan
from weightcast.bridges.process_groups import destroy_distributed, destroy_model_parallel, initialize_distributed
from weightcast.bridges.provider import GPTModelProvider
from weightcast.sync.checkpoint_files import open_checkpoint

NUM_MICROBATCHES, MICRO_BATCH, SEQUENCE = 2, 2, 24

# The head dimension is not hidden size / heads, the vocabulary is odd, windows are shorter than the sequence, and the
# weights are large enough that every feature moves the logits by far more than the tolerance.
COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 800.0, "factor": 3.0}
# None of Llama 3's four numbers is the one that Megatron hard-codes, and each band has frequencies of the small head.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GEMMA3: dict[str, Any] = COMMON | {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": LINEAR_ROPE,
        "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
    },
}

MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**COMMON | {"num_key_value_heads": 4}, rope_parameters=DEFAULT_ROPE),
    "llama3-tied-one-kv-head": lambda: LlamaConfig(
        **COMMON | {"num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=16, rope_parameters=LLAMA3_ROPE
    ),
    "llama-linear-rope-all-biases": lambda: LlamaConfig(
        **COMMON, head_dim=16, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR_ROPE
    ),
    "llama-attention-biases": lambda: LlamaConfig(**COMMON, attention_bias=True, rope_parameters=DEFAULT_ROPE),
    "llama-mlp-biases": lambda: LlamaConfig(**COMMON, mlp_bias=True, rope_parameters=DEFAULT_ROPE),
    "qwen2-one-kv-head": lambda: Qwen2Config(**COMMON | {"num_key_value_heads": 1}, rope_parameters=DEFAULT_ROPE),
    "qwen2-tied-windows": lambda: Qwen2Config(
        **COMMON | WINDOWS | {"tie_word_embeddings": True}, rope_parameters=DEFAULT_ROPE
    ),
    "qwen3-biases-windows": lambda: Qwen3Config(
        **COMMON | WINDOWS, head_dim=16, attention_bias=True, rope_parameters=LINEAR_ROPE
    ),
    "qwen3-tied-one-kv-head": lambda: Qwen3Config(
        **COMMON | {"num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=16, rope_parameters=DEFAULT_ROPE
    ),
    "gemma3-tied-one-kv-head": lambda: Gemma3TextConfig(
        **GEMMA3 | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "gemma3-biases": lambda: Gemma3TextConfig(**GEMMA3, attention_bias=True),
}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "tp4": {"tensor_model_parallel_size": 4},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}

GRADIENT_LAYOUTS = ("tp2-sequence-parallel", "tp4", "pp2-vpp2", "tp2-pp2")

# A change of the provider under which parity must fail, or the test sees nothing: model and setting.
SABOTAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "rope-numbers-of-megatron": (
        "llama3-tied-one-kv-head",
        {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_position_embeddings": 8192},
    ),
    "no-linear-scaling": ("llama-linear-rope-all-biases", {"seq_len_interpolation_factor": None}),
    "window-one-longer": ("qwen2-tied-windows", {"window_size": (6, 0)}),
    "one-rope-for-all-layers": ("gemma3-biases", {"rotary_base_local": None}),
    "plain-softmax-scale": ("gemma3-biases", {"softmax_scale": None}),
    "unscaled-embeddings": ("gemma3-biases", {"embedding_scale": None}),
}


def tokens() -> torch.Tensor:
    """Inputs and, one further, labels: [microbatches * batch, sequence + 1]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, COMMON["vocab_size"], (NUM_MICROBATCHES * MICRO_BATCH, SEQUENCE + 1), generator=generator)


def write_model(name: str, folder: Path) -> None:
    """Save a random checkpoint, and transformers' logits, loss and gradients for `tokens()`."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as constants and biases as zeros, under which mistakes are invisible
                parameter.add_(torch.randn_like(parameter) * 0.3)
    logits = model(tokens()[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), tokens()[:, 1:].flatten())
    torch.autograd.backward(loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    save_file({"logits": logits.detach(), "loss": loss.detach(), **gradients}, folder / "expected.safetensors")
    model.save_pretrained(folder / "model")


def build(folder: Path, settings: dict[str, Any], with_ddp: bool = False) -> tuple[GPTModelProvider, list[Any], Plan]:
    """The provider and this rank's part of the model, with the checkpoint's weights."""
    checkpoint = open_checkpoint(folder / "model")
    hf_config = AutoConfig.from_pretrained(folder / "model")
    bridge = find_bridge(hf_config)
    provider = bridge.translate(hf_config)
    for name, value in settings.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    model = provider.provide_distributed_model(wrap_with_ddp=with_ddp)
    plan = build_plan(model, bridge.rules(hf_config), tuple(checkpoint.specs))
    import_weights(plan, checkpoint)
    return provider, [chunk.eval() for chunk in model], plan


def logits_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """One microbatch through one chunk, as Megatron's schedules call it; gives the logits."""
    inputs = next(batches)[:, :-1].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)

    def whole_vocabulary(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(output)
        return whole

    return chunk(inputs, positions, None), whole_vocabulary


def loss_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """The same for the loss of the next token."""
    batch = next(batches)
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.mean(), {"loss": losses.detach().mean()}

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
    provider, model, _ = build(folder, settings)
    with torch.no_grad():
        outputs = run_schedule(logits_step, model, forward_only=True, collect_non_loss_data=True)
    difference = 0.0
    if parallel_state.is_pipeline_last_stage():
        logits = torch.cat(outputs)[..., : provider.vocab_size]
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
    for held in plan.regions:
        gradient = expected[held.region.name]
        box = tuple(slice(at, at + size) for at, size in zip(held.region.offset, held.region.shape, strict=True))
        differences.append(((held.live() - gradient[box]).abs().max() / gradient.abs().max()).item())
    return largest_on_any_rank(max(differences))


def main(out: Path) -> None:
    initialize_distributed()
    if dist.get_rank() == 0:
        for name in MODELS:
            (out / name).mkdir()
            write_model(name, out / name)
    dist.barrier()
    differences: dict[str, dict[str, float]] = {}
    for layout, sizes in LAYOUTS.items():
        compare = partial(largest_difference, settings=sizes)
        differences[layout] = {name: compare(out / name) for name in MODELS}
        if layout in GRADIENT_LAYOUTS:
            compare_gradients = partial(largest_gradient_difference, settings=sizes)
            differences[f"gradients-{layout}"] = {name: compare_gradients(out / name) for name in MODELS}
        destroy_model_parallel()
    differences["sabotage"] = {
        name: largest_difference(out / model, settings) for name, (model, settings) in SABOTAGE.items()
    }
    if dist.get_rank() == 0:
        (out / "differences.json").write_text(json.dumps(differences, indent=1))
    destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
