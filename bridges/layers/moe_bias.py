"""Biases of experts and of their router (gpt-oss), in any layout.

Megatron has one switch, `add_bias_linear`, for these and all other biases, and refuses it under expert tensor
parallelism. Its row parallel linears would add an expert's output bias once on every rank, and sum the bias's gradient
over the tensor parallel ranks under sequence parallelism, whose experts need not even be the same.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from weightcast.bridges.layers.linears import with_bias
from weightcast.bridges.layers.spec_parts import submodules_of, with_parts


class BiasedRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's router with a bias in its logits, whatever `add_bias_linear` says."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.bias = nn.Parameter(torch.zeros(config.num_moe_experts, dtype=config.params_dtype))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def with_bias_once(linear: type[nn.Module]) -> type[nn.Module]:
    """A row parallel `linear` of experts, grouped or not, whose bias counts once among the ranks that share an expert.

    Each rank's output is a part of a sum. The first rank's part has the bias; elsewhere it is zero in value and whole
    in its gradient, because every rank sees the gradients of all tokens: the copies of the bias stay the same.
    """

    class ExpertLinearWithBiasOnce(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["bias"] = True
            super().__init__(*args, **kwargs)
            group = kwargs["tp_group"] if "tp_group" in kwargs else kwargs["pg_collection"].expt_tp
            self.has_the_bias = group.rank() == 0
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("bias"):
                    parameter.sequence_parallel = False

        def forward(self, *args: Any) -> Any:
            output, bias = super().forward(*args)
            if not getattr(self, "explicit_expert_comm", True):
                # A sum over one rank gives its input back, and Megatron adds the bias to it in place, which autograd
                # refuses.
                output = output.clone()
            if bias is None or self.has_the_bias:
                return output, bias
            if isinstance(bias, list):  # one an expert in Transformer Engine's grouped linear
                return output, [each - each.detach() for each in bias]
            return output, bias - bias.detach()

    ExpertLinearWithBiasOnce.__name__ = f"{linear.__name__}WithBiasOnce"
    return ExpertLinearWithBiasOnce


def with_expert_biases(mlp: Any) -> Any:
    """`mlp`, the spec of an MoE layer, with biases of the router and of the routed experts."""
    submodules = submodules_of(mlp)
    linears = submodules_of(submodules.experts)
    linears = replace(
        linears, linear_fc1=with_bias(linears.linear_fc1, True), linear_fc2=with_bias_once(linears.linear_fc2)
    )
    experts = with_parts(submodules.experts, submodules=linears)
    return with_parts(mlp, submodules=replace(submodules, router=BiasedRouter, experts=experts))
