"""An engine's own tensors as the place where versions land: what they may be, and the memory behind them.

    memory = EngineTensors({"model.norm.weight": norm, "model.layers.0.self_attn.q_proj.weight": qkv[:1024], ...})
    memory.specs                               # what a publisher must offer
    memory.take(spec)                          # a `TensorPool`: the engine's tensor of that name, to be written

Views are welcome, such as slices of fused parameters, rows or columns. No two names may have an element in common,
unless they are tied: names of the same memory, all of it. Of these the first is landed in place; the others come to
memory of their own, since a change that was applied to one would be applied to the other again, and must have the same
bits in the end.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import DTYPES, TensorSpec, dtype_name


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: an address, and strides in elements."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """From the first element's first byte to the last one's last; 0 of no elements."""
        if not math.prod(self.shape):
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize


def _place_of(tensor: torch.Tensor) -> _Place:
    return _Place(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


class EngineTensors:
    """See the module. Raises `ConfigError` with the name where a tensor cannot be landed in.

    `device`, where it is given, must be where the tensors are.
    """

    def __init__(self, into: Mapping[str, torch.Tensor], device: str | torch.device | None = None) -> None:
        if not into:
            raise ConfigError("into names no tensors; give the engine's tensors by their HF names, or leave it out")
        self._given = dict(into)
        for name, tensor in self._given.items():
            _check_tensor(name, tensor)
        self.specs = tuple(TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in self._given.items())
        self.device = _find_device(self._given, device)
        """None for host memory that is landed in as such."""
        self._places = {name: _place_of(tensor) for name, tensor in self._given.items()}
        self._ties = _find_ties(self._places)
        if pair := find_overlap({name: place for name, place in self._places.items() if name not in self._ties}):
            raise ConfigError(
                f"into: {pair[0]!r} and {pair[1]!r} have a part of their memory in common, where the bits of one would "
                "be those of the other; give every name its own elements, or, where they are tied, all the same"
            )
        self._aliases = {name: _make_alias(tensor) for name, tensor in self._given.items()}
        self._apart: dict[str, torch.Tensor] = {}

    def take(self, spec: TensorSpec, *, keep_bits: bool = True) -> torch.Tensor:
        """The engine's memory of a tensor, with what lies there: see `TensorPool`. Of tied ones, of the first.

        `MemoryError` where there is none for another one that is tied to it.
        """
        if spec.name not in self._ties:
            return self._aliases[spec.name]
        if spec.name not in self._apart:
            try:
                self._apart[spec.name] = torch.zeros(spec.shape, dtype=spec.dtype, device=self._given[spec.name].device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from None
        return self._apart[spec.name]

    def find_broken_tie(self) -> tuple[str, str] | None:
        """A tied tensor that came with other bits than the one that it is tied to, and that one."""
        for name, first in self._ties.items():
            apart, there = (
                tensor.contiguous().view(-1).view(torch.uint8) for tensor in (self._apart[name], self._aliases[first])
            )
            if not torch.equal(apart, there):
                return name, first
        return None

    def present(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The engine's tensors, the very objects, in the order of `names`."""
        return {name: self._given[name] for name in names}

    def check_unmoved(self) -> None:
        """`ConfigError` when a tensor was given other memory since: what lands would never reach the engine."""
        for name, tensor in self._given.items():
            if (now := _place_of(tensor)) != self._places[name]:
                was = self._places[name]
                raise ConfigError(
                    f"into[{name!r}] was given other memory: it is {dtype_name(now.dtype)} {list(now.shape)} at "
                    f"{now.address:#x} on {now.device}, and was {dtype_name(was.dtype)} {list(was.shape)} at "
                    f"{was.address:#x} on {was.device}; make a new subscriber for what the engine has now"
                )

    def synchronize(self) -> None:
        """Wait for all work on the tensors' GPU, where they are on one."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"into[{name!r}] is a {type(tensor).__name__}; a torch.Tensor is to be written")
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise ConfigError(
            f"into[{name!r}] is {tensor.layout} on {tensor.device}, which has no memory of rows; use a dense tensor"
        )
    if tensor.dtype not in DTYPES.values():
        raise ConfigError(f"into[{name!r}] is {dtype_name(tensor.dtype)}; versions have one of {', '.join(DTYPES)}")
    reach = 0
    steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for step, size in steps if tensor.numel() else ():
        if step <= reach:
            raise ConfigError(
                f"into[{name!r}] of the shape {list(tensor.shape)} and strides {list(tensor.stride())} has elements "
                "that share memory, as an expanded tensor has; each needs its own"
            )
        reach += (size - 1) * step


def _find_device(tensors: Mapping[str, torch.Tensor], asked: str | torch.device | None) -> torch.device | None:
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ConfigError(
                f"into[{name!r}] is on {tensor.device}, into[{first_name!r}] on {first.device}; all must be on one"
            )
    if asked is None:
        return None if first.device.type == "cpu" else first.device
    wanted = torch.device(asked)
    if wanted.type != first.device.type or wanted.index not in (None, first.device.index):
        raise ConfigError(f"into is on {first.device}, not on {wanted}; leave out device: it is that of the tensors")
    return first.device


def _make_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A plain tensor on the same memory: no parameter, no subclass, none of inference mode, which few may write."""
    plain = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    with torch.no_grad():
        plain.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    assert plain.data_ptr() == tensor.data_ptr()
    return plain


def _find_ties(places: Mapping[str, _Place]) -> dict[str, str]:
    """By name, the first name of the same memory, for all but the first."""
    firsts: dict[_Place, str] = {}
    return {
        name: firsts[place]
        for name, place in places.items()
        if place.num_bytes and firsts.setdefault(place, name) != name
    }


def find_overlap(places: Mapping[str, _Place]) -> tuple[str, str] | None:
    """Two names that have an element in common; None when there are none.

    Where the bytes of several are in one another's reach (columns of one parameter), their elements are marked one by
    one: that takes a byte for each element of the parameter, in host memory and for a moment.
    """
    found = (_find_overlap_within(group) for group in _list_groups(places) if len(group) > 1)
    return next(filter(None, found), None)


def _list_groups(places: Mapping[str, _Place]) -> list[list[tuple[str, _Place]]]:
    """Those whose bytes are in one another's reach, by address."""
    groups: list[list[tuple[str, _Place]]] = []
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].address):
        if not place.num_bytes:
            continue
        if not groups or place.address >= end:
            groups.append([])
        groups[-1].append((name, place))
        end = max(end, place.address + place.num_bytes)
    return groups


def _find_overlap_within(group: list[tuple[str, _Place]]) -> tuple[str, str] | None:
    start = group[0][1].address
    num_bytes = max(place.address + place.num_bytes for _, place in group) - start
    unit = math.gcd(num_bytes, *(place.dtype.itemsize for _, place in group))
    unit = math.gcd(unit, *(place.address - start for _, place in group))
    marks = torch.zeros(num_bytes // unit, dtype=torch.bool)

    def view(place: _Place) -> torch.Tensor:
        width = place.dtype.itemsize // unit
        strides = [step * width for step in place.strides]
        return marks.as_strided((*place.shape, width), (*strides, 1), (place.address - start) // unit)

    for number, (name, place) in enumerate(group):
        if view(place).any():
            marks.zero_()
            view(place).fill_(True)
            return next((other, name) for other, there in group[:number] if view(there).any())
        view(place).fill_(True)
    return None
