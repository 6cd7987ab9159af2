"""A source of this process that broadcasts, and engines in processes of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.sync.collective_peers import (
    LOST_AFTER_S,
    PATIENCE_S,
    Peer,
    be_engine,
    be_source,
    cut_source,
    peers,
)
from tests.sync.parts import make_model

from weightcast.sync.transports.collective_source import CollectiveSource

ROWS = 512
SMALL: dict[str, Any] = {"chunk_bytes": 4096, "bucket_bytes": 16384}


@contextmanager
def making_source(tensors: dict[str, torch.Tensor], engines: int, world_size: int = 1, **options: Any) -> Iterator[Any]:
    """Source rank 0 in this process, as a trainer's."""
    options = {"timeout_s": PATIENCE_S, "lost_after_s": LOST_AFTER_S, **SMALL} | options
    names = [f"engine-{index}" for index in range(engines)]
    with CollectiveSource(cut_source(tensors, 0, world_size), "tcp://127.0.0.1:0", engines=names, **options) as source:
        yield source


@contextmanager
def engines_of(source: CollectiveSource, count: int, versions: int) -> Iterator[list[Peer]]:
    """Engines in processes of their own."""
    with peers(*((be_engine, source.address, f"engine-{index}", versions) for index in range(count))) as engines:
        yield engines


def small_source(pipe: Any, *args: Any) -> None:
    """A further source, cut as rank 0's."""
    be_source(pipe, *args, **SMALL)


def change(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other bits, in place."""
    for name, tensor in make_model(seed, ROWS).items():
        tensors[name].copy_(tensor)
