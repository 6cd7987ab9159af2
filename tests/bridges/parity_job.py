"""The parity job: logits of Megatron and of transformers, for every model and layout, in one group of four processes.

Started by `test_parity.py` once for the whole matrix, because starting a process and importing Megatron takes longer
than all of the arithmetic. Rank 0 writes the random checkpoints and transformers' logits to OUT and, at the end,
`differences.json`: the largest absolute difference by layout and model.

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
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from weightcast.bridges.checkpoint_files import open_checkpoint
from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.models.registry import find_bridge
from weightcast.bridges.plan import build_plan
from weightcast.bridges.process_groups import destroy_distributed, destroy_model_parallel, initialize_distributed
from weightcast.bridges.provider import GPTModelProvider

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
    """[microbatches * batch, sequence]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, COMMON["vocab_size"], (NUM_MICROBATCHES * MICRO_BATCH, SEQUENCE), generator=generator)


def write_model(name: str, folder: Path) -> None:
    """Save a random checkpoint and transformers' logits for `tokens()`."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as constants and biases as zeros, under which mistakes are invisible
                parameter.add_(torch.randn_like(parameter) * 0.3)
        save_file({"logits": model(tokens()).logits}, folder / "logits.safetensors")
    model.save_pretrained(folder / "model")


def build(folder: Path, settings: dict[str, Any]) -> tuple[GPTModelProvider, list[Any]]:
    """The provider and this rank's part of the model, with the checkpoint's weights."""
    checkpoint = open_checkpoint(folder / "model")
    hf_config = AutoConfig.from_pretrained(folder / "model")
    bridge = find_bridge(hf_config)
    provider = bridge.translate(hf_config)
    for name, value in settings.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    import_weights(build_plan(model, bridge.rules(hf_config), tuple(checkpoint.specs)), checkpoint)
    return provider, [chunk.eval() for chunk in model]


def forward_step(batches: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """One microbatch through one chunk, as Megatron's schedules call it."""
    batch = next(batches)
    positions = torch.arange(SEQUENCE).expand_as(batch)

    def whole_vocabulary(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return gather_from_tensor_model_parallel_region(output)

    return chunk(batch, positions, None), whole_vocabulary


def largest_difference(folder: Path, settings: dict[str, Any]) -> float:
    """Build, import, run Megatron's pipeline schedule, and compare on the last stage; the same value on every rank."""
    provider, model = build(folder, settings)
    batches = [iter(tokens().split(MICRO_BATCH)) for _ in model]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if len(model) > 1 else batches[0],
            model=model if len(model) > 1 else model[0],
            num_microbatches=NUM_MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH,
            forward_only=True,
            collect_non_loss_data=True,
        )
    difference = torch.zeros(1)
    if parallel_state.is_pipeline_last_stage():
        logits = torch.cat(outputs)[..., : provider.vocab_size]
        difference[0] = (logits - load_file(folder / "logits.safetensors")["logits"]).abs().max()
        difference.nan_to_num_(nan=float("inf"))
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


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
        destroy_model_parallel()
    differences["sabotage"] = {
        name: largest_difference(out / model, settings) for name, (model, settings) in SABOTAGE.items()
    }
    if dist.get_rank() == 0:
        (out / "differences.json").write_text(json.dumps(differences, indent=1))
    destroy_distributed()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
