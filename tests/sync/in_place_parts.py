"""What tests of landing in place share: a model, an engine whose parameters are fused, and a version landed there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, bits, make_model, random_bits

from weightcast.sync import WeightPublisher, WeightSubscriber
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.in_place import Held
from weightcast.sync.pass_plan import Int64Array

CHUNK_BYTES = 4096
ROWS, COLUMNS = 24, 136
TORN = "are torn: .*do not serve from them; wait"


def make_layers(seed: int) -> dict[str, torch.Tensor]:
    """Names as a checkpoint has them, whose tensors an engine fuses; and a few of awkward kinds."""
    # Those of awkward sizes come last: what lies behind them in a source's memory is not aligned for a kernel.
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, rows) in enumerate((("q", 2 * ROWS), ("k", ROWS), ("v", ROWS), ("up", ROWS), ("gate", ROWS))):
        tensors[f"{name}_proj.weight"] = random_bits(torch.bfloat16, (rows, COLUMNS), 1000 * seed + number)
    for number, name in enumerate(("strided.weight", "direct.weight")):
        tensors[name] = random_bits(torch.bfloat16, (600, COLUMNS), 1000 * seed + 20 + number)
    for number in range(3):
        tensors[f"experts.{number}.weight"] = random_bits(torch.float32, (9, 5), 1000 * seed + 10 + number)
    return tensors | make_model(seed, rows=100)


def bump(tensors: Mapping[str, torch.Tensor]) -> None:
    """Change a few elements of every tensor."""
    for tensor in tensors.values():
        raw = bits(tensor) if tensor.is_contiguous() else tensor
        raw[::211] ^= 1


@dataclass
class Fused:
    """An engine's parameters: fused by rows (qkv), by columns (up and gate, with a margin), and by a dimension more."""

    qkv: torch.Tensor = field(default_factory=lambda: torch.zeros(4 * ROWS, COLUMNS, dtype=torch.bfloat16))
    wide: torch.Tensor = field(default_factory=lambda: torch.full((ROWS, 2 * COLUMNS + 8), 7.0, dtype=torch.bfloat16))
    large: torch.Tensor = field(default_factory=lambda: torch.zeros(600, 2 * COLUMNS + 6, dtype=torch.bfloat16))
    direct: torch.Tensor = field(default_factory=lambda: torch.zeros(700, COLUMNS, dtype=torch.bfloat16))
    experts: torch.Tensor = field(default_factory=lambda: torch.zeros(9, 3, 5))

    def views(self) -> dict[str, torch.Tensor]:
        """By the checkpoint's names."""
        into = {name: torch.zeros_like(tensor) for name, tensor in make_model(0, rows=100).items()}
        into["layer.0.weight"] = torch.nn.Parameter(into["layer.0.weight"])
        starts = {"q": 0, "k": 2 * ROWS, "v": 3 * ROWS}
        into |= {f"{n}_proj.weight": self.qkv[s : s + (2 if n == "q" else 1) * ROWS] for n, s in starts.items()}
        into["up_proj.weight"] = self.wide[:, :COLUMNS]
        into["gate_proj.weight"] = self.wide[:, COLUMNS + 8 :]
        into |= {"strided.weight": self.large[:, 3 : COLUMNS + 3], "direct.weight": self.direct[99:699]}
        return into | {f"experts.{number}.weight": self.experts[:, number] for number in range(3)}


def copy_of(into: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in into.items()}


def land(subscriber: WeightSubscriber, into: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> int:
    """Wait for a version, which must be these tensors' and lie in the engine's own; the bytes that came for it."""
    update = subscriber.wait(WAIT_S)
    got = dict(update)
    assert all(got[name] is tensor for name, tensor in into.items()) and len(update) == len(into)
    assert_same_bits(got, tensors)
    assert subscriber.held == Held(update.version)
    update.commit()
    return update.stats.num_bytes


def publishing(tensors: Mapping[str, torch.Tensor], address: str, **more: Any) -> WeightPublisher:
    """Their publisher, in small chunks."""
    options: dict[str, Any] = {"chunk_bytes": CHUNK_BYTES, "delta": "on", "timeout_s": WAIT_S} | more
    return WeightPublisher(TensorSource(tensors), address, **options)


def landing(address: str, into: Mapping[str, torch.Tensor], **more: Any) -> WeightSubscriber:
    """The engine `e`, whose tensors these are."""
    options: dict[str, Any] = {"engine": "e", "limits": LIMITS, "transport": "zmq"} | more
    return WeightSubscriber(address, into=into, **options)


def draw_rows(data: st.DataObject, memories: Sequence[ByteArray]) -> tuple[Int64Array, ByteArray]:
    """A table of pieces in two memories of a thousand bytes and more, and their bytes as they would be packed."""
    rows, wanted = [], np.zeros(0, np.uint8)
    for _ in range(data.draw(st.integers(1, 6))):
        num_rows, row_bytes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
        step, gap = row_bytes + data.draw(st.integers(0, 60)), data.draw(st.integers(0, 9))
        number, first = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 400))
        wanted = np.concatenate([wanted, np.zeros(gap, np.uint8)])
        rows.append((len(wanted), num_rows, row_bytes, number, first, step))
        lines = [memories[number][first + n * step : first + n * step + row_bytes] for n in range(num_rows)]
        wanted = np.concatenate([wanted, *lines])
    return np.array(rows, np.int64), wanted
