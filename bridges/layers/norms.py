"""RMSNorm and LayerNorm in plain torch, with what Megatron expects of a norm.

Megatron's own wrapper of torch's norms refuses sequence parallelism and zero-centred weights (Gemma stores gamma - 1).
These take both: the weight carries the `sequence_parallel` mark by which Megatron sums its gradients over the tensor
parallel ranks, and a zero-centred weight is used as it is stored, without a change of values on import or export.
They run on any device, in fp32 whatever the dtype of the activations.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; input and output [..., hidden_size].

    `config` decides the weight's dtype, whether it is zero-centred, and its `sequence_parallel` mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def gamma(self) -> torch.Tensor:
        """The factor the normalised values are multiplied with, in fp32."""
        weight = self.weight.float()
        return weight + 1.0 if self.zero_centered else weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype and not self.zero_centered:
            # CUDA's kernel computes in fp32 inside, so 16 bits go in and out of it: a fifth of the memory's traffic.
            return nn.functional.rms_norm(hidden_states, (self.hidden_size,), self.weight, self.eps)
        normalised = nn.functional.rms_norm(hidden_states.float(), (self.hidden_size,), self.gamma(), self.eps)
        return normalised.type_as(hidden_states)


class LayerNorm(RMSNorm):
    """Norm to zero mean and unit variance over the last dimension, with a bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalised = nn.functional.layer_norm(
            hidden_states.float(), (self.hidden_size,), self.gamma(), self.bias.float(), self.eps
        )
        return normalised.type_as(hidden_states)


def norm_class(normalization: str) -> type[RMSNorm]:
    """The class for Megatron's `config.normalization`."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[normalization]
