"""Engines and sources of broadcasts in processes of their own, for tests that kill, stop and slow them.

A peer runs a function of this module or a test's; what the function says through its pipe comes back in order.

    with peers((be_engine, address, "engine-0", 2)) as (engine,):
        ...
        assert engine.hear() == {"version": 1, "bits": ...}
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import xxhash
from tests.sync.parts import TensorSource, make_specs, split_rows

from weightcast.sync.errors import WeightcastError
from weightcast.sync.transports.collective_source import CollectiveSource
from weightcast.sync.transports.collective_target import CollectiveReceiver

PATIENCE_S = 60.0
LOST_AFTER_S = 2.0
_PRELOAD = ["torch.distributed", "weightcast.sync.transports.collective_target", "tests.sync.parts"]


class Peer:
    """A process and what it says."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_enter, args=(theirs, function, args))
        self.process.start()
        theirs.close()

    def hear(self, timeout_s: float = PATIENCE_S) -> Any:
        """The next thing that the peer says; an error that it let out fails the test."""
        if not self._pipe.poll(timeout_s):
            raise AssertionError(f"the peer said nothing for {timeout_s} s")
        said = self._pipe.recv()
        if isinstance(said, BaseException):
            raise AssertionError(f"the peer ended with {type(said).__name__}: {said}") from said
        return said

    def tell(self, word: Any) -> None:
        """Let the peer go on."""
        self._pipe.send(word)

    def signal(self, number: signal.Signals) -> None:
        """Kill, stop or continue."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        """Whatever state it is in."""
        self.process.kill()
        self.process.join(10)


def _enter(pipe: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(pipe, *args)
    except BaseException as error:
        pipe.send(error)


@contextmanager
def peers(*calls: tuple[Any, ...]) -> Iterator[list[Peer]]:
    """One peer a call, a function and its arguments; all are ended with the block."""
    made: list[Peer] = []
    try:
        for function, *args in calls:
            made.append(Peer(function, *args))
        yield made
    finally:
        for peer in made:
            peer.end()


def name_bits(tensors: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits that name the bits of all tensors, with their names, dtypes and shapes."""
    total = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def cut_source(tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> TensorSource:
    """Rank `rank`'s share of tensors cut by rows."""
    rows = {spec.name: split_rows(spec, world_size) for spec in make_specs(tensors)}
    return TensorSource(tensors, rank, world_size, [rows[name][rank] for name in tensors])


def be_engine(pipe: Connection, address: str, engine: str, versions: int, **options: Any) -> None:
    """Receive so many versions and say what each holds; after a failure say it, and rejoin when told to."""
    options = {"timeout_s": PATIENCE_S, "lost_after_s": LOST_AFTER_S} | options
    with CollectiveReceiver(address, engine, **options) as receiver:
        while versions:
            try:
                update = receiver.receive()
            except WeightcastError as error:
                pipe.send({"error": type(error).__name__, "text": str(error)})
                if pipe.recv() != "rejoin":
                    return
                receiver.rejoin()
                continue
            versions -= 1
            pipe.send({"version": update.version.number, "bits": name_bits(update.tensors)})


def be_source(
    pipe: Connection,
    address: str,
    tensors: dict[str, torch.Tensor],
    rank: int,
    world_size: int,
    numbers: list[int],
    **options: Any,
) -> None:
    """Broadcast this rank's share of each version, as the other sources do at the same time."""
    options = {"timeout_s": PATIENCE_S, "lost_after_s": LOST_AFTER_S} | options
    with CollectiveSource(cut_source(tensors, rank, world_size), address, **options) as source:
        for number in numbers:
            try:
                report = source.broadcast(number)
                pipe.send({"engines": len(report.engines), "num_bytes": report.num_bytes})
            except WeightcastError as error:
                pipe.send({"error": type(error).__name__, "text": str(error), "lost": source.lost})
                if pipe.recv() != "rebuild":
                    return
                source.rebuild()
