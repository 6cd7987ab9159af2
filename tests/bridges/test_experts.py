"""Experts without a job of many ranks: configurations that are refused, layouts that do not divide, grouped linears."""

from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from weightcast.bridges.hf_source import specs_of_config
from weightcast.bridges.models.registry import find_bridge
from weightcast.bridges.plan import Stages, lay_rules
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.rules import GatedMlp, ModelDimensions, Rename
from weightcast.bridges.rules_experts import PerExpert
from weightcast.bridges.shards import read_shards
from weightcast.sync.errors import ConfigError, UnsupportedModel
from weightcast.sync.regions import Region, TensorSpec

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.dist_checkpointing import ShardedTensor  # isort: skip
from megatron.core.transformer.moe.experts import TEGroupedMLP  # isort: skip

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GLM: dict[str, Any] = SIZES | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "num_nextn_predict_layers": 0,
}
CONFIGURATIONS: dict[str, Any] = {
    "Qwen3MoeForCausalLM": lambda **fields: Qwen3MoeConfig(
        **SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | fields
    ),
    "Qwen2MoeForCausalLM": lambda **fields: Qwen2MoeConfig(
        **SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} | fields
    ),
    "MixtralForCausalLM": lambda **fields: MixtralConfig(**SIZES | {"num_local_experts": 4} | fields),
    "Glm4MoeForCausalLM": lambda **fields: Glm4MoeConfig(**GLM | fields),
}


def translate(architecture: str, **fields: Any) -> GPTModelProvider:
    config = CONFIGURATIONS[architecture](**fields, architectures=[architecture])
    return find_bridge(config).translate(config)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0, 1, 2, 3]}, "num_experts=4 .* no layer has experts"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ("Glm4MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob=False .* must be True for 4 experts"),
        ("Glm4MoeForCausalLM", {"num_experts_per_tok": 1}, "norm_topk_prob=True .* must be False for 1 experts"),
        (
            "Glm4MoeForCausalLM",
            {"n_group": 4, "topk_group": 1},
            "topk_group=1 .* by their 4 best experts, HF does by two",
        ),
    ],
)
def test_routers_that_megatron_computes_otherwise_are_refused(
    architecture: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=f"{architecture}: {message}"):
        translate(architecture, **fields)


def test_layers_and_weights_of_experts_are_those_of_the_configuration() -> None:
    qwen3 = translate("Qwen3MoeForCausalLM", decoder_sparse_step=2, norm_topk_prob=False, router_aux_loss_coef=0.02)
    assert qwen3.moe_layer_freq == [0, 1, 0, 1]
    assert (qwen3.moe_router_pre_softmax, qwen3.moe_aux_loss_coeff, qwen3.moe_router_dtype) == (True, 0.02, "fp32")
    glm = translate("Glm4MoeForCausalLM", first_k_dense_replace=3, n_shared_experts=2, n_group=4, topk_group=2)
    assert glm.moe_layer_freq == [0, 0, 0, 1]
    assert (glm.moe_shared_expert_intermediate_size, glm.moe_shared_expert_gate) == (48, False)
    assert (glm.moe_router_num_groups, glm.moe_router_group_topk, glm.rotary_percent) == (4, 2, 0.5)
    assert translate("MixtralForCausalLM", router_jitter_noise=0.01).moe_input_jitter_eps == 0.01
    assert translate("Qwen2MoeForCausalLM").moe_shared_expert_gate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_model_parallel_size": 3}, "num_moe_experts=4 is not a multiple of expert_model_parallel_size=3"),
        ({"num_moe_experts": None, "expert_model_parallel_size": 2}, "needs a model with experts"),
        (
            {"expert_tensor_parallel_size": 5},
            "moe_ffn_hidden_size=24 is not a multiple of expert_tensor_parallel_size=5",
        ),
        (
            {"tensor_model_parallel_size": 2, "moe_shared_expert_intermediate_size": 25},
            "moe_shared_expert_intermediate_size=25 is not a multiple of tensor_model_parallel_size=2",
        ),
        ({"moe_router_topk": 5}, "moe_router_topk=5 experts a token are more than num_moe_experts=4"),
        ({"moe_layer_freq": [1, 0]}, r"moe_layer_freq=\[1, 0\] .* num_layers=4"),
        ({"moe_use_legacy_grouped_gemm": True}, "moe_use_legacy_grouped_gemm=True"),
        ({"moe_token_dispatcher_type": "flex"}, "needs CUDA; use 'alltoall'"),
    ],
)
def test_layouts_and_kernels_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    provider = translate("Qwen3MoeForCausalLM")
    for name, value in settings.items():
        setattr(provider, name, value)
    with pytest.raises(ConfigError, match=message):
        provider.finalize()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU grouped experts may be there")
def test_grouped_experts_are_off_where_they_cannot_run() -> None:
    provider = translate("Qwen3MoeForCausalLM")
    assert provider.moe_grouped_gemm
    provider.finalize()
    assert not provider.moe_grouped_gemm


@pytest.mark.parametrize("architecture", CONFIGURATIONS)
def test_the_table_fills_the_tensors_that_transformers_stores(architecture: str) -> None:
    config = CONFIGURATIONS[architecture](architectures=[architecture], dtype=torch.bfloat16)
    specs = specs_of_config(config)
    dimensions = ModelDimensions(4, 4, 2, 8, SIZES["vocab_size"])
    table = RuleTable.make(find_bridge(config).rules(config), dimensions, specs)  # raises unless each is filled once
    assert sum(".experts.3." in name for names in table.hf_names.values() for name in names) >= 9
    biases = [spec.dtype for spec in specs if spec.name.endswith("e_score_correction_bias")]
    assert biases == ([torch.float32] * 3 if architecture == "Glm4MoeForCausalLM" else [])
    assert {spec.dtype for spec in specs} - {torch.float32} == {torch.bfloat16}


def test_the_bias_of_routers_stays_in_fp32_and_the_same_tensor() -> None:
    provider = translate("Glm4MoeForCausalLM")
    provider.set_dtype(torch.bfloat16)
    kept: list[torch.Tensor] = []
    exact = torch.full((8,), 1.0 + 2**-20)

    def fill(model: list[Any]) -> None:
        kept.extend(buffer for name, buffer in model[0].named_buffers() if name.endswith("expert_bias"))
        for buffer in kept:
            buffer.copy_(exact)

    model = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=fill)
    try:
        found = [buffer for name, buffer in model[0].named_buffers() if name.endswith("expert_bias")]
        assert len(found) == 3 and all(a is b for a, b in zip(found, kept, strict=True))
        assert all(torch.equal(buffer, exact) for buffer in found)
        assert next(model[0].parameters()).dtype == torch.bfloat16
    finally:
        destroy_distributed()


class _Group:
    """A process group's size and this rank's place in it."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class _GroupedLinear(torch.nn.Module):
    """Weights as Transformer Engine's grouped linear has and lists them (`_sharded_state_dict_grouped`)."""

    def __init__(self, num_experts: int, rows: int, columns: int, axis: int, ep: _Group, tp: _Group) -> None:
        super().__init__()
        self.num_experts, self.axis, self.ep, self.tp = num_experts, axis, ep, tp
        for expert in range(num_experts):
            self.register_parameter(f"weight{expert}", torch.nn.Parameter(torch.randn(rows, columns)))

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        first, total = self.ep.rank() * self.num_experts, self.ep.size() * self.num_experts
        return {
            f"{prefix}weight{expert}": ShardedTensor.from_rank_offsets(
                f"{prefix}weight",
                getattr(self, f"weight{expert}"),
                (0, first + expert, total),
                (1 + self.axis, self.tp.rank(), self.tp.size()),
                prepend_axis_num=1,
            )
            for expert in range(self.num_experts)
        }


class _GroupedExperts(TEGroupedMLP):  # type: ignore[misc]
    """Megatron's grouped experts with `_GroupedLinear`s: two of four experts, the second half of their rows."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.config = GPTModelProvider(gated_linear_unit=True)
        self.num_local_experts, self.ep_group, self.tp_group = 2, _Group(2, 1), _Group(2, 1)
        self.linear_fc1 = _GroupedLinear(2, 6, 4, 0, self.ep_group, self.tp_group)
        self.linear_fc2 = _GroupedLinear(2, 4, 3, 1, self.ep_group, self.tp_group)

    def sharded_state_dict(self, metadata: dict[str, Any]) -> Any:
        return super().sharded_state_dict("mlp.experts.", (), metadata | {"dp_cp_group": _Group(1, 0)})


def test_grouped_linears_have_the_keys_and_regions_of_sequential_experts() -> None:
    experts = _GroupedExperts()
    rules = (
        PerExpert(GatedMlp("mlp.experts.experts.linear_fc1.weight", gate="{expert}.gate", up="{expert}.up"), 4),
        PerExpert(Rename("mlp.experts.experts.linear_fc2.weight", "{expert}.down"), 4),
    )
    shapes = {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
    specs = [
        TensorSpec(f"{expert}.{name}", torch.float32, shape) for expert in range(4) for name, shape in shapes.items()
    ]
    plan = lay_rules(read_shards([experts]), Stages(True, True), ModelDimensions(1, 1, 1, 1, 1), rules, specs)
    assert [held.region for held in plan.regions] == [
        region
        for expert in (2, 3)
        for region in (
            Region(f"{expert}.gate", (3, 0), (3, 4)),
            Region(f"{expert}.up", (3, 0), (3, 4)),
            Region(f"{expert}.down", (0, 3), (4, 3)),
        )
    ]
    live = {held.region.name: held.live() for held in plan.regions}
    parameters = dict(experts.named_parameters())
    assert torch.equal(live["3.up"], parameters["linear_fc1.weight1"][3:])
    assert live["3.down"].data_ptr() == parameters["linear_fc2.weight1"].data_ptr()
