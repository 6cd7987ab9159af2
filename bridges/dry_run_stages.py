"""The shards of every seat of a layout that nobody runs: Megatron itself is asked, on meta tensors, in one process.

Each pipeline stage is built once under a fake process group; then its ranks in the tensor, expert and expert tensor
groups are set from seat to seat and `sharded_state_dict` is asked again, because setting up Megatron's groups for
every one of a thousand ranks would take most of the time. A test compares the shards with those of ranks that are set
up in full.

    for seat, boxes in read_seats(provider, Layout(tensor=8, pipeline=16, world_size=1024)):
        print(seat, len(boxes))
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from weightcast.bridges.dry_run_cuts import set_cut
from weightcast.bridges.dry_run_layout import Layout, Seat
from weightcast.bridges.process_groups import initialize_model_parallel
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.runtime import ensure_runtime
from weightcast.bridges.shards import read_shards
from weightcast.sync.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Box:
    """A shard without its memory: a local box of a global Megatron tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Chair(dist.ProcessGroup):
    """A group of the size of another in which this process can be any rank. No collective is ever run in it."""

    def __init__(self, size: int) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]  # torch's stub lists one of its two forms
        self.place = 0

    def rank(self) -> int:
        return self.place


# Where Megatron keeps the groups that cut weights within a stage, and the field of `Seat` that each is.
_GROUPS = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "_EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "expert_tensor",
}


def apply_layout(provider: GPTModelProvider, layout: Layout) -> Mapping[str, int | str]:
    """Set the sizes of `layout` on `provider` and finalize it. Raises `ConfigError`.

    Context parallelism copies weights, so it counts as data parallelism here and needs no Transformer Engine. Gives
    the settings that had to be chosen, because the layers do not divide by the stages (see `dry_run_cuts`).
    """
    provider.tensor_model_parallel_size = layout.tensor
    provider.pipeline_model_parallel_size = layout.pipeline
    provider.expert_model_parallel_size = layout.expert
    provider.expert_tensor_parallel_size = layout.experts_tensor
    provider.sequence_parallel = layout.tensor > 1 and provider.num_moe_experts is not None
    chosen = set_cut(provider, layout)
    provider.finalize()
    return chosen


def read_seats(provider: GPTModelProvider, layout: Layout) -> Iterator[tuple[Seat, tuple[Box, ...]]]:
    """Each seat of `layout`, in order, and the shards that its ranks hold. `provider` has had `apply_layout`.

    Raises `ConfigError` in a process that has a process group already.
    """
    ensure_runtime()
    seats = layout.seats()
    for stage in range(layout.pipeline):
        with _stage(provider, layout, stage) as chairs, torch.device("meta"):
            with warnings.catch_warnings():
                # Experts that no tensor parallelism cuts say this one by one; nothing is computed here anyway.
                warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`")
                chunks = _build(provider)
            for seat in (seat for seat in seats if seat.pipeline == stage):
                for name, chair in chairs.items():
                    chair.place = getattr(seat, name)
                yield seat, _read_boxes(chunks)


def _build(provider: GPTModelProvider) -> list[MegatronModule]:
    virtual = provider.virtual_pipeline_model_parallel_size
    return [provider.provide(vp_stage=number) for number in ([None] if virtual is None else range(virtual))]


def _read_boxes(chunks: list[MegatronModule]) -> tuple[Box, ...]:
    return tuple(
        Box(shard.key, shard.global_shape, shard.offset, shard.view.shape, shard.view.parameter.dtype)
        for shard in read_shards(chunks)
    )


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process as a rank of a world of which nothing else exists; no collective does anything.

    Raises `ConfigError` in a process that has a process group already.
    """
    # Importing the module registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError(
            "this process has a process group already, and planning needs one of its own; run it in another process"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _stage(provider: GPTModelProvider, layout: Layout, stage: int) -> Iterator[dict[str, _Chair]]:
    """A fake world in which this process is the first rank of `stage`, its seat in the other groups to be set."""
    with fake_world(stage * layout.stage_ranks, layout.num_ranks):
        initialize_model_parallel(provider)
        chairs: dict[str, _Chair] = {}
        state: Any = parallel_state
        for place, name in _GROUPS.items():
            chairs[name] = _Chair(getattr(state, place).size())
            setattr(state, place, chairs[name])
        yield chairs
