"""Draws a model and a layout that fits it, from a source of random numbers.

The same draws serve the property test, where hypothesis is the source and every rank is planned on meta tensors in one
process, and a test with real processes, where the source is a seed.

    case = draw_case(random.Random(7), max_ranks=8)
    bridge = AutoBridge.from_hf_config(case.config())
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.bridges.layout_tables import CP, EMBEDDING, EP, ETP, FIRST, LAST, LOSS, PP, STAGES, TP, VPP
from transformers import DeepseekV3Config, Glm4MoeConfig, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

KINDS = ("llama", "qwen3-moe", "glm4-moe", "deepseek-v3")


@dataclass(frozen=True)
class Case:
    """A model's kind and sizes, and how it is cut over `num_ranks`."""

    kind: str
    fields: dict[str, Any]
    settings: dict[str, Any]
    """Fields of the provider: parallel sizes and the cut of the pipeline."""
    num_ranks: int
    vocab_multiple: int = 128
    _architectures: dict[str, type[PretrainedConfig]] = field(
        default_factory=lambda: {
            "LlamaForCausalLM": LlamaConfig,
            "Qwen3MoeForCausalLM": Qwen3MoeConfig,
            "Glm4MoeForCausalLM": Glm4MoeConfig,
            "DeepseekV3ForCausalLM": DeepseekV3Config,
        },
        repr=False,
    )

    def config(self) -> PretrainedConfig:
        """The configuration of the model."""
        name = list(self._architectures)[KINDS.index(self.kind)]
        return self._architectures[name](**self.fields, architectures=[name], dtype="float32")


def divisors(number: int, most: int) -> list[int]:
    """The divisors of `number` that are not larger than `most`."""
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def draw_case(rng: Random, max_ranks: int) -> Case:
    """A case of at most `max_ranks` ranks; every size that a layout puts a condition on is drawn to meet it."""
    kind = rng.choice(KINDS)
    tensor = rng.choice([size for size in (1, 2, 3, 4, 8) if size <= max_ranks])
    pipeline = rng.choice([size for size in (1, 2, 3, 4) if size <= max_ranks // tensor])
    num_layers, cut = _draw_pipeline(rng, pipeline)
    context = rng.choice([1, 2]) if tensor * pipeline * 2 <= max_ranks else 1
    copies = rng.choice(divisors(max_ranks // (tensor * pipeline * context), 3))
    stage_ranks = tensor * context * copies
    fields = _draw_dense(rng, tensor) | {"num_hidden_layers": num_layers}
    settings: dict[str, Any] = {TP: tensor, PP: pipeline, CP: context} | cut
    if kind != "llama":
        expert_tensor = rng.choice(divisors(stage_ranks, 4))
        expert = rng.choice(divisors(stage_ranks // expert_tensor, 4))
        settings |= {EP: expert, ETP: expert_tensor}
        fields |= _draw_experts(rng, kind, num_layers, expert, tensor * expert_tensor)
        # A list of stages would have to name them.
        fields |= {"num_nextn_predict_layers": 0 if STAGES in cut else rng.choice([0, 1])}
    fields |= _draw_attention(rng, kind, tensor, fields["num_attention_heads"])
    return Case(kind, fields, settings, stage_ranks * pipeline, rng.choice([1, 2, 7, 128]))


def _draw_dense(rng: Random, tensor: int) -> dict[str, Any]:
    """Sizes that all kinds have. Key-value heads may be fewer than tensor parallel ranks."""
    groups = rng.choice([tensor * rng.randint(1, 2), *divisors(tensor, tensor)])
    heads = groups * rng.randint(1, 3)
    heads *= 1 if heads % tensor == 0 else tensor
    return {
        "vocab_size": rng.randint(5, 150),
        "hidden_size": heads * rng.choice([2, 3, 4]),
        "intermediate_size": tensor * rng.randint(1, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": rng.choice([2, 4, 6]) * (tensor if groups < tensor else 1),  # the fused rows divide by TP
        "max_position_embeddings": 96,
        "tie_word_embeddings": rng.random() < 0.5,
    }


def _draw_attention(rng: Random, kind: str, tensor: int, heads: int) -> dict[str, Any]:
    if kind != "deepseek-v3":
        biases = ("attention_bias", "mlp_bias") if kind == "llama" else ("attention_bias",)
        return {name: rng.random() < 0.5 for name in biases}
    rotated = rng.choice([2, 4])
    return {
        "num_key_value_heads": heads,
        "q_lora_rank": rng.choice([None, tensor * rng.randint(1, 3)]),
        "kv_lora_rank": tensor * rng.randint(2, 4) * rotated - rotated,  # with the rotated key it is cut by TP
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": rng.choice([2, 6]),
        "v_head_dim": rng.choice([3, 4]),
        "attention_bias": False,
    }


def _draw_experts(rng: Random, kind: str, num_layers: int, expert: int, divisor: int) -> dict[str, Any]:
    """Experts that divide by `expert`, of sizes that divide by both tensor parallel sizes."""
    num_experts = expert * rng.randint(1, 3) * 2
    common = {"moe_intermediate_size": divisor * rng.randint(2, 4), "num_experts_per_tok": 2}
    dense = rng.randrange(num_layers)
    if kind == "qwen3-moe":
        only = [layer for layer in range(num_layers) if rng.random() < 0.3][: num_layers - 1]
        return common | {"num_experts": num_experts, "mlp_only_layers": only}
    return common | {
        "n_routed_experts": num_experts,
        "n_shared_experts": rng.randint(1, 2),
        "first_k_dense_replace": dense,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": rng.random() < 0.5,
    }


def _draw_pipeline(rng: Random, stages: int) -> tuple[int, dict[str, Any]]:
    """How many layers, and how they are cut: evenly, with other ends, with the ends counted, or stage by stage."""
    if stages == 1:
        return rng.randint(1, 4), {}
    virtual = rng.choice([1, 1, 2, 3])
    how = rng.choice(["even", "ends", "counted", "listed"])
    if how == "listed":
        return _draw_stages(rng, stages * virtual)
    chunks: dict[str, Any] = {VPP: virtual} if virtual > 1 else {}
    layers = stages * virtual * rng.randint(1, 2)
    if how == "counted" and layers > 2:
        return layers - 2, {EMBEDDING: True, LOSS: True} | chunks
    if how == "ends":
        first, last = virtual * rng.randint(1, 2), virtual * rng.randint(1, 3)
        if stages == 2:
            return first + last, {FIRST: first} | chunks  # of two stages the other is what is left
        return first + last + (stages - 2) * virtual, {FIRST: first, LAST: last} | chunks
    return layers, chunks


def _draw_stages(rng: Random, num_stages: int) -> tuple[int, dict[str, Any]]:
    """A list of stages in Megatron's spelling; a stage may have no layer, and an end may stand alone."""
    counts = [rng.randint(0, 2) for _ in range(num_stages)]
    if not any(counts):
        counts[rng.randrange(num_stages)] = 1
    return sum(counts), {STAGES: spell_stages(counts)}


def spell_stages(counts: Sequence[int]) -> str:
    """The numbers of layers of all (virtual) stages in order, as Megatron spells it: (0, 2, 1) is "E|tt|tL"."""
    return f"E{'|'.join('t' * count for count in counts)}L"
