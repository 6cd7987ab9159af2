"""A guard that makes every collective and every message between ranks fail.

Everything in torch.distributed, and whatever name it was imported under, ends in a method of `ProcessGroup`; the
guard replaces those. It is a patch on purpose: the claim under test is that nothing ever gets there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

# What `ProcessGroup`'s methods that move data begin with; their number differs between versions of torch.
TALKING = (
    "all_gather",
    "all_to_all",
    "allgather",
    "allreduce",
    "alltoall",
    "barrier",
    "broadcast",
    "gather",
    "merge_remote_group",
    "monitored_barrier",
    "recv",
    "reduce",
    "scatter",
    "send",
    "split_group",
)


class CollectiveIssued(Exception):
    """Something talked to another rank."""


@contextmanager
def no_collectives() -> Iterator[None]:
    """Inside, any collective or message raises `CollectiveIssued`."""
    group: Any = dist.ProcessGroup
    # As stored in the class: getattr would take off the wrapping that makes it a method again.
    saved = {name: method for name, method in vars(group).items() if name.lstrip("_").startswith(TALKING)}

    def forbid(name: str) -> Any:
        def forbidden(*args: object, **kwargs: object) -> None:
            raise CollectiveIssued(name)

        return forbidden

    for name in saved:
        setattr(group, name, forbid(name))
    try:
        yield
    finally:
        for name, method in saved.items():
            setattr(group, name, method)
