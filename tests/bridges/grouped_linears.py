"""Grouped experts where Transformer Engine is not: Megatron's own `TEGroupedMLP` around linears written here.

Its `GroupedLinear` needs a GPU. These linears have its names (`num_gemms`, `weight0`, ...), its call and what its
wrapper in Megatron lists for checkpoints (`TEGroupedLinear._sharded_state_dict_grouped` of
extensions/transformer_engine.py); they multiply expert by expert. Dispatcher, `TEGroupedMLP`, routing and activation
are Megatron's.

    with grouped_experts():
        model = provider.provide_distributed_model()
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from weightcast.bridges.layers.specs import SdpaSpecProvider

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.transformer.mlp import MLPSubmodules  # isort: skip
from megatron.core.transformer.moe import experts as megatron_experts  # isort: skip
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding  # isort: skip


class _GroupedLinear(nn.Module):
    """Several experts' linears; `axis` of each weight is cut over the ranks that share an expert."""

    axis = 0

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, pg_collection: Any, **kwargs: Any
    ) -> None:
        super().__init__()
        assert kwargs["is_expert"] and not kwargs["bias"]
        self.num_gemms, self.config = num_gemms, config
        self._pg_collection, self._tp_group = pg_collection, pg_collection.expt_tp
        size = self._tp_group.size()
        self.explicit_expert_comm = size > 1 or config.expert_model_parallel_size > 1
        self.parallel_mode = None if self.explicit_expert_comm else ("column", "row")[self.axis]
        shape = [output_size, input_size]
        shape[self.axis] //= size
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = [linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(torch.split(x, m_splits))]
        return torch.cat(parts), None

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        ep, result = self._pg_collection.ep, {}
        for index in range(self.num_gemms):
            number, total = ep.rank() * self.num_gemms + index, ep.size() * self.num_gemms
            single = metadata.get("singleton_local_shards", False)
            offsets = sharded_offsets if single else (*sharded_offsets, (len(sharded_offsets), number, total))
            entries = make_sharded_tensors_for_checkpoint(
                {f"{index}.weight": getattr(self, f"weight{index}")},
                "",
                {f"{index}.weight": self.axis},
                offsets,
                tp_group=self._tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(entries, f"{index}.", f"{number}.{prefix}" if single else prefix)
            entry = entries[f"{index}.weight"]
            entry.replica_id = (*entry.replica_id[:2], self._pg_collection.expt_dp.rank())
            result[f"{prefix}weight{index}"] = entry
        return result


class TEColumnParallelGroupedLinear(_GroupedLinear):
    """By its name it is known how it is cut."""


class TERowParallelGroupedLinear(_GroupedLinear):
    """By its name it is known how it is cut."""

    axis = 1


def _modules(self: Any, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False) -> Any:
    fc1, fc2 = TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
    if "moe_use_legacy_grouped_gemm" in inspect.signature(_OWN).parameters:
        return megatron_experts.TEGroupedMLP, MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)
    submodules = megatron_experts.GroupedMLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)  # megatron-core 0.17 and later
    return partial(megatron_experts.TEGroupedMLP, submodules=submodules)


_OWN = SdpaSpecProvider.grouped_mlp_modules


@contextmanager
def grouped_experts() -> Iterator[None]:
    """Models that are built inside have grouped experts."""
    SdpaSpecProvider.grouped_mlp_modules = _modules
    try:
        yield
    finally:
        SdpaSpecProvider.grouped_mlp_modules = _OWN
