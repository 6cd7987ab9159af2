"""A guard that makes every collective and every message between ranks fail.

Everything in torch.distributed, and whatever name it was imported under, ends in a method of `ProcessGroup`; the
guard replaces those. It is a patch on purpose: the claim under test is that nothing ever gets there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

MESSAGES = ("send", "recv", "recv_anysource")
COLLECTIVES = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


class CollectiveIssued(Exception):
    """Something talked to another rank."""


@contextmanager
def no_collectives() -> Iterator[None]:
    """Inside, any collective or message raises `CollectiveIssued`."""
    group: Any = dist.ProcessGroup
    # As stored in the class: getattr would take off the wrapping that makes it a method again.
    saved = {name: vars(group)[name] for name in (*COLLECTIVES, *MESSAGES)}

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
