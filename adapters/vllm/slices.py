"""Which slices of a model a vLLM worker asks for, when it asks for its own.

A worker of several receives the tensors that its loader cuts as the slices that it keeps (`twin`), where that is worth
it: with `"slices": "auto"`, when it receives by itself, or when the workers are on several hosts, of which each then
receives what its own workers keep, once. Workers that are all on one host, and share its memory, take whole tensors
once for all, of which together they need everything; with `"slices": "on"` they too ask for what each keeps.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.distributed.parallel_state import get_node_count

from weightcast.adapters.engine import check_ties
from weightcast.adapters.vllm.settings import BackendSettings, takes_slices
from weightcast.adapters.vllm.twin import wanted_of_worker
from weightcast.sync import DiskUpdate, Update
from weightcast.sync.preview import Preview
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.wanted import Want, WantedRegions, whole


def choose_want(
    settings: BackendSettings,
    publisher: str,
    vllm_config: Any,
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
) -> Want | None:
    """What this worker asks for; None for whole tensors. `specs` are those of the checkpoint that it was started on.

    Called in a worker, in the thread that runs its model: the twin's making changes vLLM's and torch's globals.
    """
    parallel = vllm_config.parallel_config
    if not takes_slices(settings, publisher, parallel.world_size, get_node_count()):
        return None
    loaded = [spec for spec in specs if spec.name not in aliases]
    wanted = wanted_of_worker(vllm_config, loaded)
    return None if wanted == whole(loaded) else partial(boxes_of_offer, wanted, aliases)


def boxes_of_offer(
    wanted: WantedRegions, aliases: Mapping[str, str], offered: Sequence[TensorSpec]
) -> dict[str, tuple[Region, ...]]:
    """`wanted` for what a publisher offers. Pure.

    Of a tied tensor that it offers under both names the same boxes are taken of both, to be compared. What the engine
    does not know is not wanted here: the whole offer is compared with its checkpoint before a load.
    """
    boxes = {}
    for spec in offered:
        tied = aliases.get(spec.name)
        found = wanted.get(spec.name, ()) if tied is None else wanted.get(tied, ())
        boxes[spec.name] = tuple(Region(spec.name, box.offset, box.shape) for box in found)
    return boxes


def check_tied_update(update: Update | DiskUpdate | Preview, aliases: Mapping[str, str]) -> None:
    """`check_ties` of what was received; of tensors that came in part, box by box."""
    if isinstance(update, DiskUpdate) or update.wanted is None:
        check_ties(dict(update) if aliases else {}, aliases)
        return
    names = {spec.name for spec in update.specs}
    for alias, name in aliases.items():
        if alias in names and name in names:
            for (_, part), (_, other) in zip(update.wanted.parts(alias), update.wanted.parts(name), strict=True):
                check_ties({alias: part, name: other}, {alias: name})


def staged_tensors(update: Update | DiskUpdate) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors whose memory the next version is staged into: what was received, slices as such."""
    if isinstance(update, DiskUpdate) or update.wanted is None:
        return update
    return update.wanted.staged()
