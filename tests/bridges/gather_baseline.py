"""The baseline of the export benchmark: whole tensors by gathering parameter by parameter, as established bridges do.

For every Megatron parameter: a broadcast over the pipeline group from the stage that has it, an all-gather over the
tensor group where it is sharded, and for an expert's an all-gather over the expert group; then the HF tensors are cut
out. Written for Qwen3 and Qwen3-MoE on megatron-core's local layers. Names, shapes and owners cost it nothing, although
the tools that work this way send Python objects for them as well.

    for name, tensor in gather_by_parameter(chunk, hf_config):
        print(name, tuple(tensor.shape))
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups

Named = tuple[str, torch.Tensor]
_LAYER = "decoder.layers.{}."
# Suffix in Megatron -> suffix in HF, for tensors that are the same in both.
_SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_SHARDED_DIM = {"linear_qkv": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1, "word_embeddings": 0, "output": 0}


def gather_by_parameter(chunk: torch.nn.Module, hf: Any) -> Iterator[Named]:
    """Every HF tensor on every rank, in Megatron's order. Every rank must iterate."""
    mine = dict(chunk.named_parameters())
    stages = groups.get_pipeline_model_parallel_world_size()
    layers_here = hf.num_hidden_layers // stages
    vocab = (hf.vocab_size // groups.get_tensor_model_parallel_world_size(), hf.hidden_size)
    template = {name: tuple(tensor.shape) for name, tensor in mine.items()}

    def fetch(name: str, shape: tuple[int, ...], stage: int) -> torch.Tensor:
        here = stage == groups.get_pipeline_model_parallel_rank()
        tensor = mine[name].detach() if here else torch.empty(shape, dtype=torch.bfloat16)
        if stages > 1:
            group = groups.get_pipeline_model_parallel_group()
            dist.broadcast(tensor, src=dist.get_global_rank(group, stage), group=group)
        return tensor

    embedding = fetch("embedding.word_embeddings.weight", vocab, 0)
    yield "model.embed_tokens.weight", gather_sharded("word_embeddings", embedding)
    for layer in range(hf.num_hidden_layers):
        stage, local = divmod(layer, layers_here)
        for name in [name for name in mine if name.startswith(_LAYER.format(0))]:
            suffix = name.removeprefix(_LAYER.format(0))
            tensor = fetch(_LAYER.format(local) + suffix, template[name], stage)
            for hf_suffix, weight in convert(suffix, tensor, hf):
                yield f"model.layers.{layer}.{hf_suffix}", weight
    yield "model.norm.weight", fetch("decoder.final_layernorm.weight", (hf.hidden_size,), stages - 1)
    yield "lm_head.weight", gather_sharded("output", fetch("output_layer.weight", vocab, stages - 1))


def gather_sharded(kind: str, tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that tensor parallelism cuts."""
    parts = all_gather(tensor, groups.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=_SHARDED_DIM[kind]) if len(parts) > 1 else tensor


def all_gather(tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """The tensors of all ranks of a group; no collective in a group of one."""
    if dist.get_world_size(group) == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def convert(suffix: str, tensor: torch.Tensor, hf: Any) -> Iterator[Named]:
    """The HF tensors of one Megatron parameter of a layer, from this rank's part of it."""
    kind = suffix.split(".")[-2]
    if ".local_experts." in suffix:
        yield from convert_expert(suffix, kind, tensor, hf)
    elif kind == "linear_qkv":
        rows, per_group = hf.head_dim, hf.num_attention_heads // hf.num_key_value_heads
        grouped = gather_sharded(kind, tensor).view(hf.num_key_value_heads, per_group + 2, rows, -1)
        for name, part in (("q", grouped[:, :-2]), ("k", grouped[:, -2]), ("v", grouped[:, -1])):
            yield f"self_attn.{name}_proj.weight", part.reshape(-1, hf.hidden_size)
    elif kind == "linear_fc1":
        parts = [part.chunk(2) for part in all_gather(tensor, groups.get_tensor_model_parallel_group())]
        for index, name in enumerate(("gate", "up")):
            yield f"mlp.{name}_proj.weight", torch.cat([part[index] for part in parts])
    elif kind in _SHARDED_DIM:
        yield _SAME[suffix], gather_sharded(kind, tensor)
    else:
        yield _SAME[suffix], tensor


def convert_expert(suffix: str, kind: str, tensor: torch.Tensor, hf: Any) -> Iterator[Named]:
    """One local expert of every rank of the expert group at once."""
    local = int(suffix.split(".")[3])
    parts = all_gather(tensor, groups.get_expert_model_parallel_group())
    for rank, part in enumerate(parts):
        prefix = f"mlp.experts.{rank * (hf.num_experts // len(parts)) + local}"
        if kind == "linear_fc1":
            gate, up = part.chunk(2)
            yield f"{prefix}.gate_proj.weight", gate
            yield f"{prefix}.up_proj.weight", up
        else:
            yield f"{prefix}.down_proj.weight", part
