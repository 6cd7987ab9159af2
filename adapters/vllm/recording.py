"""Which parts of which HF tensors a model's loader reads, and where it puts them.

A tensor-parallel worker narrows every tensor that it is given and copies its own part: asked for that part alone, the
rest need not travel. Nobody says which part it is, so the loader is run once and watched. All that reads a tensor does
so through torch's dispatcher, and every view of it shares its storage, so an operation tells by storage, offset and
strides which box it reads; boxes are wanted, whatever is done with them afterwards. On the meta device this takes no
memory and moves no byte (`weightcast.adapters.vllm.twin`).

    record = record_load(model, specs)        # calls model.load_weights once
    record.wanted["model.layers.0.mlp.down_proj.weight"]   # (Region(..., (0, 256), (1024, 256)),)

What a loader reads must not depend on the values that it finds: an operation that gives Python a value is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightcast.sync.errors import EngineError
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.wanted import WantedRegions, merge_boxes

ALL_AS_IT_IS = "ask for whole tensors instead"


@dataclass(frozen=True, slots=True)
class Copied:
    """A box of an HF tensor that went to a box of a parameter, unchanged but for its dtype."""

    source: Region
    target: Region


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """What one load read and wrote."""

    wanted: WantedRegions
    """By HF name, the boxes that were read, which do not overlap; none for a tensor that this worker has no use for."""
    copied: tuple[Copied, ...]
    """Where boxes went that were only copied."""
    computed: tuple[str, ...]
    """HF tensors that the loader did something else with than to copy boxes of them; what it read is wanted."""
    unfilled: tuple[str, ...]
    """Parameters that nothing was written to."""


def record_load(model: torch.nn.Module, specs: Sequence[TensorSpec]) -> LoadRecord:
    """Run `model.load_weights` once on tensors of `specs` without memory, and say what it read.

    `model` is on the meta device, where a loader that looks at values, be they computed, fails by itself. Raises
    `EngineError` when it does, when the loader does not know a name, or fills a parameter in part only.
    """
    tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
    parameters = dict(model.named_parameters())
    if elsewhere := [name for name, parameter in parameters.items() if parameter.device.type != "meta"]:
        raise EngineError(f"{elsewhere[0]} is not on the meta device, and watching a load needs all of a model there")
    with LoadWatch(tensors, parameters) as watch:
        try:
            model.load_weights(iter(tensors.items()))  # type: ignore[operator]
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"{type(model).__name__}.load_weights cannot be watched: {type(error).__name__}: {error}; "
                f"{ALL_AS_IT_IS}"
            ) from error
    return watch.record()


class LoadWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes what operations read of `tensors` and write into `parameters`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors = dict(tensors)
        self._parameters = dict(parameters)
        self._names = {_storage(tensor): name for name, tensor in self._tensors.items()}
        self._targets = {_storage(tensor): name for name, tensor in self._parameters.items()}
        self._read: dict[str, dict[Region, None]] = {name: {} for name in self._tensors}
        self._written: dict[str, dict[Region, None]] = {name: {} for name in self._parameters}
        self._copied: dict[Copied, None] = {}
        self._computed: dict[str, None] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._note(func, args, kwargs or {}, result)
        return result

    def _note(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object
    ) -> None:
        written, read = _split_arguments(func, args, kwargs)
        sources = [region for tensor in read if (region := self._region(tensor, self._names, self._tensors))]
        targets = [region for tensor in written if (region := self._region(tensor, self._targets, self._parameters))]
        for region in sources:
            self._read[region.name][region] = None
            if not _holds_tensors(result):
                raise EngineError(f"the loader looks at the values of {region} ({func}); {ALL_AS_IT_IS}")
        for region in targets:
            self._written[region.name][region] = None
        is_copy = func is torch.ops.aten.copy_.default and len(sources) == len(targets) == 1
        if is_copy and sources[0].numel == targets[0].numel:
            self._copied[Copied(sources[0], targets[0])] = None
        else:
            self._computed |= {region.name: None for region in sources}

    def _region(
        self, tensor: torch.Tensor, names: Mapping[int, str], wholes: Mapping[str, torch.Tensor]
    ) -> Region | None:
        name = names.get(_storage(tensor))
        if name is None or tensor.numel() == 0:
            return None
        return box_of_view(name, tensor, wholes[name])

    def record(self) -> LoadRecord:
        """What was seen. Raises `EngineError` for a parameter that was filled in part only."""
        written = {name: merge_boxes(boxes) for name, boxes in self._written.items()}
        for name, boxes in written.items():
            filled, numel = sum(box.numel for box in boxes), self._parameters[name].numel()
            if boxes and filled != numel:
                raise EngineError(f"the loader filled {filled} of {numel} elements of {name}; {ALL_AS_IT_IS}")
        return LoadRecord(
            {name: merge_boxes(boxes) for name, boxes in self._read.items()},
            tuple(self._copied),
            tuple(self._computed),
            tuple(name for name, boxes in written.items() if not boxes and self._parameters[name].numel()),
        )

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def box_of_view(name: str, view: torch.Tensor, whole: torch.Tensor) -> Region:
    """The smallest box of `whole`, which is contiguous or a permutation of it, that is sure to hold a view of it."""
    strides = [int(whole.stride(dim)) for dim in range(whole.dim())]
    order = sorted(range(whole.dim()), key=lambda dim: -strides[dim])
    offset, extent = [0] * whole.dim(), [1] * whole.dim()
    left = int(view.storage_offset()) - int(whole.storage_offset())
    for dim in order:
        offset[dim], left = divmod(left, strides[dim])
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1 or stride == 0:
            continue
        along = next((d for d in order if whole.shape[d] > 1 and strides[d] <= stride), None)
        if along is None or stride % strides[along]:
            return Region(name, (0,) * whole.dim(), tuple(whole.shape))
        extent[along] += (size - 1) * (stride // strides[along])
    if any(first + length > full for first, length, full in zip(offset, extent, whole.shape, strict=True)):
        # The view runs over the end of a row: it was flattened.
        return Region(name, (0,) * whole.dim(), tuple(whole.shape))
    return Region(name, tuple(offset), tuple(extent))


def _storage(tensor: torch.Tensor) -> int:
    """The identity of a storage, while it lives; the meta device has no addresses."""
    return int(tensor.untyped_storage()._cdata)


def _split_arguments(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation writes to, and those that it reads."""
    written: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        (written if is_written else read).extend(_tensors_in(value))
    return written, read


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def _holds_tensors(value: object) -> bool:
    return value is None or any(True for _ in _tensors_in(value))
