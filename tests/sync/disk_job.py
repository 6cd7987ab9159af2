"""Processes that write stores of versions, and die while they do.

python -m tests.sync.disk_job sweep FOLDER DELTA      kills a writer at every call that it makes of the system
python -m tests.sync.disk_job source FOLDER RANK      rank RANK of two, driven by lines on its standard input
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a store does to a disk, in the order of a write.
CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


def count_calls(then: Callable[[int, str], None]) -> None:
    """Let `then` see each of the calls, numbered from 0, before it is made."""
    number = 0

    def wrap(name: str) -> None:
        call = getattr(os, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            then(number, name)
            number += 1
            return call(*args, **kwargs)

        setattr(os, name, counted)

    for name in CALLS:
        wrap(name)


def tear_writes() -> None:
    """Every other write is done by half, so that a kill before the rest leaves a torn file."""
    write = os.write
    halve = False

    def torn(file: int, data: Any) -> int:
        nonlocal halve
        halve = not halve
        return write(file, memoryview(data)[: max(1, len(data) // 2)] if halve else data)

    os.write = torn


def make_writer(store: Any, delta: str) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """A publisher that removes old versions as it writes new ones: the sweep's victim. Its step, and its tensors."""
    from tests.sync.disk_parts import step
    from tests.sync.parts import TensorSource, make_model

    from weightcast.sync import DiskPublisher

    tensors = make_model(1, 16)
    publisher = DiskPublisher(TensorSource(tensors), store, keep=1, anchor_every=3, delta=delta)  # type: ignore[arg-type]

    def publish(number: int) -> Any:
        step(tensors, number)
        return publisher.publish(number)

    return publish, tensors


def sweep(folder: Path, delta: str) -> None:
    """Publishes versions 1 to 4, and forks: one child dies at call 0 of the fifth and sixth, the next at call 1, ...

    Each child has a copy of the folder. Prints one line for each: the last call, and which versions were published.
    """
    import torch

    from weightcast.sync.disk.store import FolderStore

    torch.set_num_threads(1)
    store = FolderStore(folder / "start")
    publish, _ = make_writer(store, delta)
    for number in range(1, 5):
        publish(number)
    for die_at in range(10_000):
        reader, writer = os.pipe()
        place = folder / str(die_at)
        shutil.copytree(store.root, place)
        child = os.fork()
        if child == 0:
            os.close(reader)
            store.close()
            store.root = place
            _write_until(publish, die_at, writer)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        said = os.read(reader, 1000).decode().splitlines()
        os.close(reader)
        print(json.dumps({"at": die_at, "said": said, "killed": os.WIFSIGNALED(status)}), flush=True)
        if not os.WIFSIGNALED(status):
            return


def _write_until(publish: Callable[[int], Any], die_at: int, writer: int) -> None:
    try:
        tell = os.write
        tear_writes()

        def then(number: int, name: str) -> None:
            if number == die_at:
                tell(writer, f"{name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        count_calls(then)
        publish(5)
        tell(writer, b"published\n")
        publish(6)
        tell(writer, b"published\n")
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def source(folder: Path, rank: int) -> None:
    """Rank `rank` of two, which share a model by columns; publishes the numbers that it reads, and prints results."""
    from tests.sync.disk_parts import step
    from tests.sync.parts import TensorSource, make_model

    from weightcast.sync import DiskPublisher
    from weightcast.sync.errors import WeightcastError

    tensors = make_model(1, 300)
    regions = cut_columns(tensors, 2)[rank]
    with DiskPublisher(TensorSource(tensors, rank, 2, regions), folder, timeout_s=20) as publisher:
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            number = json.loads(line)
            step(tensors, number)
            try:
                report = publisher.publish(number)
                print(json.dumps([report.version.number, report.is_anchor, report.has_delta]), flush=True)
            except WeightcastError as error:
                print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)


def cut_columns(tensors: dict[str, Any], parts: int) -> list[list[Any]]:
    """Each matrix cut along its last dimension, as tensor parallelism cuts rows of weights; the rest is replicated."""
    from tests.sync.parts import make_specs

    from weightcast.sync import Region

    shares: list[list[Any]] = [[] for _ in range(parts)]
    for spec in make_specs(tensors):
        width = spec.shape[-1] if len(spec.shape) > 1 else 0
        for index, share in enumerate(shares):
            if width < parts:
                share.append(spec.whole())
                continue
            start, end = width * index // parts, width * (index + 1) // parts
            zeros = (0,) * (len(spec.shape) - 1)
            share.append(Region(spec.name, (*zeros, start), (*spec.shape[:-1], end - start)))
    return shares


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        sweep(Path(sys.argv[2]), sys.argv[3])
    else:
        source(Path(sys.argv[2]), int(sys.argv[3]))
