"""Counts what a piece of code sends and how much memory it has at once, at the operations that PyTorch dispatches.

Every collective and message of torch.distributed is an operation of the namespace `c10d`, whatever Python name it was
called under. Memory is the storages that came into being inside and still live; views of older storages cost nothing.
What a backend allocates for itself is not seen: for that there is the process's own peak (`resident_peak`).

    with TrafficMeter() as meter:
        for name, tensor in export_weights(plan):
            del tensor
    print(meter.calls, meter.peak_bytes)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrafficMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`calls` counts collectives and messages by kind; `peak_bytes` is the most memory that new tensors had at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.peak_bytes = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def num_calls(self) -> int:
        """All collectives and messages."""
        return self.calls.total()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and look at what it made."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.calls[func.__name__.partition(".")[0]] += 1
        given = {_storage(tensor)._cdata for tensor in _tensors((args, kwargs or {}))}
        for tensor in _tensors(result):
            storage = _storage(tensor)
            if storage._cdata not in given:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._living[storage._cdata] = (reference, storage.nbytes())
        self._living = {
            key: entry
            for key, entry in self._living.items()
            if not entry[0].expired()  # type: ignore[no-untyped-call]
        }
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self._living.values()))
        return result


@contextmanager
def resident_peak() -> Iterator[Callable[[], int]]:
    """Gives a function that tells by how many bytes this process's memory has exceeded what it was at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
    start_bytes = _read_status("VmRSS")
    yield lambda: max(0, _read_status("VmHWM") - start_bytes)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return (leaf for leaf in leaves if leaf.device.type != "meta")


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.untyped_storage()


def _read_status(field: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{field}:"))
