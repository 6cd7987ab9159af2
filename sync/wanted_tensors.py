"""What an engine takes of a version of which it wanted some boxes: those, or tensors of full shape with only those in.

    tensors = update.wanted
    for box, part in tensors.parts("model.layers.0.mlp.down_proj.weight"): ...      # part has the shape of box
    for name, tensor in tensors.items(): ...            # full shapes, one at a time, for loaders that narrow them

A tensor of full shape is made when it is asked for, or is the room in which a box of whole rows was staged. Whoever
takes it must read the wanted boxes alone, and write nothing: the rest is memory that was never touched, of undefined
contents, and takes no pages of its own where it is large.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.wanted import WantedRegions


class WantedTensors(Mapping[str, torch.Tensor]):
    """See the module. `boxes` has the key of each wanted box in `staged`, by HF name and in HF order.

    `around` has tensors that are there in full shape, with all bits in (others of the host wanted the rest).
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        boxes: Mapping[str, Sequence[tuple[str, Region]]],
        staged: Mapping[str, torch.Tensor],
        around: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._boxes = boxes
        self._staged = staged
        self._around = around or {}
        self._device = next((tensor.device for tensor in self._staged.values()), torch.device("cpu"))

    @property
    def regions(self) -> WantedRegions:
        """By HF name, the boxes that are here."""
        return {name: tuple(box for _, box in boxes) for name, boxes in self._boxes.items()}

    def parts(self, name: str) -> tuple[tuple[Region, torch.Tensor], ...]:
        """Each wanted box of a tensor with its contents, where they were staged."""
        return tuple((box, self._staged[key]) for key, box in self._boxes[name])

    def staged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, contents) of every box: the memory behind all of this."""
        for name in self._boxes:
            for _, part in self.parts(name):
                yield name, part

    @property
    def num_bytes(self) -> int:
        """Bytes of the wanted boxes."""
        sizes = {name: spec.dtype.itemsize for name, spec in self._specs.items()}
        return sum(box.numel * sizes[name] for name, boxes in self._boxes.items() for _, box in boxes)

    def __getitem__(self, name: str) -> torch.Tensor:
        if (full := self._around.get(name)) is not None:
            return full
        spec, parts = self._specs[name], self.parts(name)
        if len(parts) == 1 and (around := _look_around(spec, *parts[0])) is not None:
            return around
        full = make_empty(spec, self._device)
        for box, part in parts:
            full[box.slices] = part
        return full

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def _look_around(spec: TensorSpec, box: Region, part: torch.Tensor) -> torch.Tensor | None:
    """The tensor in which a box lies, where it was staged in room for all of that (`BoxSpec`); else None."""
    if box.shape == spec.shape:
        return part
    strides = [math.prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape))]
    start = sum(first * stride for first, stride in zip(box.offset, strides, strict=True))
    if part.untyped_storage().nbytes() != spec.num_bytes or part.storage_offset() != start:
        return None
    return part.as_strided(spec.shape, strides, 0)


def make_empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """Memory for a tensor of full shape, of undefined contents."""
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)
