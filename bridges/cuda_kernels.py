"""Kernels for a GPU without Transformer Engine and Apex, where Megatron-Core falls back to loops or to single steps.

Each function here takes what Megatron has in the place (`present`) and gives what is put there; they are put in place
by `weightcast.bridges.runtime` only, which also says why each is needed. Nothing here acts on import.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from weightcast.bridges.layers.compiled import compiled, rotate


def with_norm_of_all(present: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `l2_norm_impl` as two kernels, where it is the local one; Apex's stays."""
    return norm_of_all if present.__name__ == "local_multi_tensor_l2_norm" else present


def norm_of_all(
    chunk_size: int, overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], per_tensor: bool, *unused: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all numbers of `lists[0]` together, [1]; with the arguments of `amp_C.multi_tensor_l2norm`."""
    norms = torch.stack(torch._foreach_norm(lists[0]))
    return torch.linalg.vector_norm(norms).reshape(1), None


def with_scale_of_all(present: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `multi_tensor_scale_impl` in place and in one kernel, where it is the local one; Apex's stays."""
    return scale_of_all if present.__name__ == "local_multi_tensor_scale" else present


def scale_of_all(chunk_size: int, overflow: torch.Tensor, lists: Sequence[list[torch.Tensor]], scale: float) -> None:
    """Write `lists[0]` times `scale` into `lists[1]`, which may be the same tensors."""
    sources, targets = lists
    if all(source is target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)
    else:
        torch._foreach_copy_(targets, torch._foreach_mul(sources, scale))


def with_compiled_rotation(present: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's rotation of queries and keys, in one kernel for models that ask for it.

    Packed sequences, interleaved pairs and scaled rotations (YaRN) stay with Megatron.
    """

    @functools.wraps(present)
    def rotated(
        t: torch.Tensor,
        freqs: torch.Tensor,
        config: Any,
        cu_seqlens: torch.Tensor | None = None,
        mscale: float = 1.0,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        is_plain = cu_seqlens is None and mscale == 1.0 and not config.rotary_interleaved
        if is_plain and not config.apply_rope_fusion and getattr(config, "uses_compiled_kernels", False):
            turned: torch.Tensor = compiled(rotate)(t, freqs)
            return turned
        return present(t, freqs, config, cu_seqlens, mscale, *args, **kwargs)

    return rotated
