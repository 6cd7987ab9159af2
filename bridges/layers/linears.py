"""Variants of a backend's parallel linear layers: a forced bias, and a norm behind the output.

Each function derives a class from the one it is given, so that the same variant exists for Megatron's own linears and
for Transformer Engine's. Weights keep their names; the norm adds `post_layernorm.weight`.
"""

from typing import Any

import torch
from torch import nn


def with_bias(linear: type[nn.Module], bias: bool) -> type[nn.Module]:
    """`linear` with or without a bias, whatever the caller of its constructor asks for.

    Megatron has one switch for the biases of all linears and one for q, k and v; HF models choose for attention and
    MLP separately.
    """

    class LinearWithFixedBias(linear):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["bias"] = bias
            super().__init__(*args, **kwargs)

    LinearWithFixedBias.__name__ = f"{linear.__name__}{'With' if bias else 'Without'}Bias"
    return LinearWithFixedBias


def with_post_norm(linear: type[nn.Module], norm: type[nn.Module]) -> type[nn.Module]:
    """A row-parallel `linear` whose output goes through a `norm` before the residual is added (Gemma 2 and 3).

    The output is whole in the hidden dimension on every rank (its sum over ranks has been taken), so the norm is
    replicated over the tensor parallel ranks; under sequence parallelism each rank norms its own positions.
    """

    class RowParallelLinearWithPostNorm(linear):  # type: ignore[misc,valid-type]
        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)
            # A hook, so that an adapter of the linear adds to what the norm sees.
            self.register_forward_hook(_norm_output)

    RowParallelLinearWithPostNorm.__name__ = f"{linear.__name__}WithPostNorm"
    return RowParallelLinearWithPostNorm


def with_frozen_weight(linear: type[nn.Module]) -> type[nn.Module]:
    """Megatron's own row-parallel `linear`, for a weight that does not train.

    It then leaves out its process group, which Megatron itself warns of at every call.
    """

    class FrozenRowParallelLinear(linear):  # type: ignore[misc,valid-type]
        def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs["tp_group"] = self.tp_group
            output: torch.Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return output

    FrozenRowParallelLinear.__name__ = f"Frozen{linear.__name__}"
    return FrozenRowParallelLinear


def _norm_output(
    linear: Any, inputs: object, output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, None]:
    projected, bias = output
    if bias is not None:  # left to the caller to add after the norm, which would be too late
        projected = projected + bias
    return linear.post_layernorm(projected), None
