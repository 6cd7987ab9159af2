"""Weightcast's two ends where host memory stands in for a GPU's, and numpy for its kernel; all else is what users run.

For the test of the cases of one GPU, and for `overhead`: what a version costs besides the device's own work. Both ends
answer how much of a version's time that work took here (`work_s`).
"""

import ctypes
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model_state
import numpy as np
import numpy.typing as npt
import torch
import weightcast_mover
from model_state import ModelState

sys.path.insert(0, str(Path(__file__).parents[2]))  # of a process that was started by the path of its file

from tests.sync.host_driver import HostDriver

from weightcast.sync import TensorSpec, device_passes
from weightcast.sync.digest import LANE_BYTES
from weightcast.sync.pass_plan import Tile
from weightcast.sync.transports import cuda_ipc

Int64Array = npt.NDArray[np.int64]


class NumpyKernel:
    """A `device_passes.Runner` that takes all lanes of a launch at once; `work_s` is how long it has worked."""

    def __init__(self) -> None:
        self.work_s = 0.0
        # This process's memory as lanes, by their addresses: numpy looks only at those that it is asked for.
        self._memory: Int64Array = np.ctypeslib.as_array((ctypes.c_int64 * (1 << 44)).from_address(LANE_BYTES))
        self._launches: dict[tuple[int, int], _Lanes] = {}

    def __call__(
        self,
        tile: Tile,
        items: torch.Tensor,
        places: torch.Tensor,
        row_weights: torch.Tensor,
        lane_weights: torch.Tensor,
        sums: torch.Tensor,
        *,
        copies: bool,
    ) -> None:
        """See `device_passes.Runner`."""
        start_s = time.monotonic()
        key = items.data_ptr(), len(items)  # tables stay where they are for as long as they are used
        lanes = self._launches.get(key)
        if lanes is None:
            lanes = self._launches[key] = _list_lanes(items.numpy(), row_weights.numpy(), lane_weights.numpy())
        there = places.numpy()[lanes.piece]
        is_there = there[:, 0] != 0
        if not is_there.all():
            lanes, there = lanes.take(is_there), there[is_there]
        data = self._memory[there[:, 0] // LANE_BYTES - 1 + lanes.row * there[:, 1] + lanes.lane]
        if copies:
            self._memory[there[:, 2] // LANE_BYTES - 1 + lanes.row * there[:, 3] + lanes.lane] = data
        if len(data):
            firsts = np.flatnonzero(np.diff(lanes.piece, prepend=-1))
            np.add.at(sums.numpy(), lanes.piece[firsts], np.add.reduceat(data * lanes.weight, firsts))
        self.work_s += time.monotonic() - start_s


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The lanes of a launch: whose they are, their row and place in it, and the weight of each."""

    piece: Int64Array
    row: Int64Array
    lane: Int64Array
    weight: Int64Array

    def take(self, mask: npt.NDArray[np.bool_]) -> "_Lanes":
        return _Lanes(self.piece[mask], self.row[mask], self.lane[mask], self.weight[mask])


def _list_lanes(items: Int64Array, row_weights: Int64Array, lane_weights: Int64Array) -> _Lanes:
    parts = []
    for piece, first_row, num_rows, first_lane, num_lanes, row, lane, block in items:
        rows, lanes = (grid.ravel() for grid in np.mgrid[:num_rows, :num_lanes])
        with np.errstate(over="ignore"):
            weights = row_weights[row + rows] * lane_weights[lane + lanes] * block
        parts.append((np.full(len(rows), piece), first_row + rows, first_lane + lanes, weights))
    return _Lanes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


kernel = NumpyKernel()


class Sender(weightcast_mover.PublishingSender):
    """A trainer rank whose parameters lie in the stand-in's memory."""

    def send(self, number: int) -> dict[str, Any]:
        kernel.work_s = 0.0
        return super().send(number) | {"work_s": kernel.work_s}


class Receiver(weightcast_mover.SubscribingReceiver):
    """An engine on the stand-in's memory."""

    def receive(self, number: int) -> dict[str, Any]:
        kernel.work_s = 0.0
        return super().receive(number) | {"work_s": kernel.work_s}


def _stand_in() -> None:
    """Have weightcast find the stand-ins where it looks for a GPU's driver and kernel."""
    driver, allocate = HostDriver(), model_state.allocate
    setattr(cuda_ipc, "find_driver", lambda: driver)  # noqa: B010  names that others imported there
    setattr(device_passes, "find_runner", lambda device: kernel)  # noqa: B010
    model_state.allocate = lambda *arguments: driver.move_in(allocate(*arguments))
    if not device_passes.is_right(kernel, torch.device("cpu")):
        raise AssertionError("the kernel's stand-in has other digests than torch")


def open_sender(state: ModelState, options: Mapping[str, Any]) -> Sender:
    """The trainer's side."""
    return Sender(state, options)


def open_receiver(specs: Sequence[TensorSpec], address: str, options: Mapping[str, Any]) -> Receiver:
    """The engine's side."""
    return Receiver(specs, address, options)


_stand_in()
