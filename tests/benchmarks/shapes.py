"""Tensor shapes of real models, so that a benchmark moves what users move: few large tensors and many small ones."""

from collections.abc import Callable

import torch

from weightcast.sync import TensorSpec


def qwen3_specs(
    layers: int = 28,
    hidden: int = 1024,
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = 128,
    intermediate: int = 3072,
    vocab: int = 151_936,
    tied: bool = True,
) -> list[TensorSpec]:
    """The tensors of a Qwen3 checkpoint, bf16; the defaults are Qwen3-0.6B's with tied embeddings, 1.19 GB."""
    rows: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        rows += [
            (f"{prefix}input_layernorm.weight", (hidden,)),
            (f"{prefix}self_attn.q_proj.weight", (heads * head_dim, hidden)),
            (f"{prefix}self_attn.k_proj.weight", (kv_heads * head_dim, hidden)),
            (f"{prefix}self_attn.v_proj.weight", (kv_heads * head_dim, hidden)),
            (f"{prefix}self_attn.o_proj.weight", (hidden, heads * head_dim)),
            (f"{prefix}self_attn.q_norm.weight", (head_dim,)),
            (f"{prefix}self_attn.k_norm.weight", (head_dim,)),
            (f"{prefix}post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{prefix}mlp.up_proj.weight", (intermediate, hidden)),
            (f"{prefix}mlp.down_proj.weight", (hidden, intermediate)),
        ]
    rows.append(("model.norm.weight", (hidden,)))
    if not tied:
        rows.append(("lm_head.weight", (vocab, hidden)))
    return [TensorSpec(name, torch.bfloat16, shape) for name, shape in rows]


def _tiny() -> list[TensorSpec]:
    return qwen3_specs(layers=2, vocab=4096)


def _qwen3_8b() -> list[TensorSpec]:
    return qwen3_specs(layers=36, hidden=4096, heads=32, intermediate=12_288, tied=False)


def _qwen3_8b_small() -> list[TensorSpec]:
    return qwen3_specs(layers=36, hidden=32, heads=4, kv_heads=1, head_dim=8, intermediate=96, vocab=1184, tied=False)


def _one() -> list[TensorSpec]:
    return [TensorSpec("model.norm.weight", torch.bfloat16, (32,))]


MODELS: dict[str, Callable[[], list[TensorSpec]]] = {
    "tiny": _tiny,  # 71 MB: to try the program
    "qwen3-0.6b": qwen3_specs,  # 1.19 GB
    "qwen3-8b": _qwen3_8b,  # 16.4 GB
    "qwen3-8b-small": _qwen3_8b_small,  # its 399 tensors, each side a 128th: in chunks of 4 KiB as many as in 64 MiB
    "one-tensor": _one,  # 64 bytes
}
