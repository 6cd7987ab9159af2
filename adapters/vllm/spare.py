"""A worker's model a second time, loaded while the first one serves, and swapped with it.

    spare = SpareModel(vllm_config, model)     # in the worker's own thread: no memory, some milliseconds
    prepared = spare.load(tensors)             # in any thread: as a fresh engine would; `model` is only read
    prepared.swap()                            # no request runs: pointers move
    spare.clear()                              # drops what served before

The spare is built by vLLM as a fresh engine's model is, and keeps no memory between versions. After a load it is walked
(`object_graph`): whatever is not as it was built came of the weights, be it a parameter, a packed copy behind a
function, or a kernel's object. The model that serves must have a tensor of the same kind at the same place, and then
the two exchange their storages. Tensors keep their identity, so whoever holds one, compiled code too, sees the new
weights; what does not depend on weights (key-value caches, rotary tables, expert maps) stays. A model of which not all
can be told apart so is not swapped at all: `CannotPrepareError` says where.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from weightcast.adapters.vllm.object_graph import (
    Path,
    copy_content,
    describe,
    is_leaf,
    is_scalar,
    is_unchanged,
    parts,
    put_back,
    walk,
)
from weightcast.adapters.vllm.twin import build_twin, without_layers
from weightcast.sync.errors import EngineError, ModelMismatch

# A parameter that is larger must be filled by the loader; a smaller one may keep what it was built with.
_MAX_KEPT_BYTES = 1 << 20

_MISSING = object()


class CannotPrepareError(ModelMismatch):
    """This kind of model cannot be loaded beside the one that serves; reload it in the pause."""


class CannotSwapError(ModelMismatch):
    """What was prepared could not be swapped in, and nothing was."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the spare, and those of the serving model that are what it is; `path` leads to it."""

    path: Path
    spare: torch.Tensor
    serving: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version's weights, processed, beside those that serve."""

    pairs: tuple[Pair, ...]

    def swap(self) -> None:
        """Exchange storages; raises `CannotSwapError` with everything as it was, should that fail."""
        done: list[Pair] = []
        try:
            for pair in self.pairs:
                done.append(pair)
                _exchange(pair)
        except Exception as error:
            for pair in reversed(done[:-1]):
                _exchange(pair)
            raise CannotSwapError(f"the prepared weights cannot be swapped in: {error!r}") from error


def _exchange(pair: Pair) -> None:
    old, new = pair.serving[0].data, pair.spare.data
    try:
        for tensor in pair.serving:
            tensor.data = new
        pair.spare.data = old
    except Exception:
        for tensor in pair.serving:
            tensor.data = old
        raise


class _Built:
    """A tensor of the spare as it was built: what it takes to make it so again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.is_parameter = isinstance(tensor, torch.nn.Parameter)
        self._size, self._stride, self._dtype = tensor.size(), tensor.stride(), tensor.dtype
        is_kept = not self.is_parameter or tensor.nbytes <= _MAX_KEPT_BYTES
        self.initial = tensor.detach().clone() if is_kept else None
        self.strip()

    def materialise(self) -> None:
        if self.initial is not None:
            self.tensor.data = self.initial.clone()
        else:
            self.tensor.data = torch.empty_strided(self._size, self._stride, dtype=self._dtype)

    def strip(self) -> None:
        """Let go of the memory, but of what is not loaded."""
        if self.is_parameter:
            self.tensor.data = torch.empty(0, dtype=self._dtype)
        elif self.initial is not None and not _has_bits(self.tensor, self.initial):
            self.tensor.data = self.initial.clone()

    @property
    def is_as_built(self) -> bool:
        """Of tensors that are no parameters: whether the load left it alone."""
        return not self.is_parameter and self.initial is not None and _has_bits(self.tensor, self.initial)


def _has_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.stride() != other.stride():
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class SpareModel:
    """See the module. Made in the worker's thread under its configuration; one thread loads and clears."""

    def __init__(self, vllm_config: VllmConfig, serving: torch.nn.Module) -> None:
        self._serving = serving
        self._model_config = vllm_config.model_config
        parallel = vllm_config.parallel_config
        self._share: float = 1 / (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        self._model = build_twin(without_layers(vllm_config), "cpu")
        self._check_modules()
        serving_ids = {id(node) for _, node in walk(serving)}
        # Held as objects, so that no id becomes another's: what both models use, such as tables that vLLM caches.
        self._shared = {id(node): node for _, node in walk(self._model) if id(node) in serving_ids}
        nodes = [node for _, node in walk(self._model, self._shared)]
        self._known = {id(node): node for node in nodes}
        contents = ((node, copy_content(node)) for node in nodes)
        self._contents = {id(node): content for node, content in contents if content is not None}
        self._built = {id(node): _Built(node) for node in nodes if isinstance(node, torch.Tensor)}

    @property
    def share(self) -> float:
        """The part of the model that this worker holds."""
        return self._share

    def untouched_bytes(self) -> int:
        """Key-value caches of the model that serves: the system counts their memory as free until it is used."""
        caches: dict[int, int] = {}
        for module in self._serving.modules():
            for _, node in walk(getattr(module, "kv_cache", None)):
                if isinstance(node, torch.Tensor):
                    caches[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        return sum(caches.values())

    def _check_modules(self) -> None:
        def kinds(model: torch.nn.Module) -> dict[str, type]:
            return {name: type(module) for name, module in model.named_modules()}

        serving, spare = kinds(self._serving), kinds(self._model)
        for name in serving | spare:
            if serving.get(name) is not spare.get(name):
                raise CannotPrepareError(
                    f"the module {name or type(self._serving).__name__!r} is a {serving.get(name)} in the model that "
                    f"serves and a {spare.get(name)} in one that vLLM builds anew"
                )

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> Prepared:
        """Load and process `tensors`, which the loader may keep: their memory must not be used again before a swap.

        Raises `CannotPrepareError`, and whatever vLLM's loader raises; then call `clear`.
        """
        self.clear()
        for built in self._built.values():
            built.materialise()
        loaded = self._model.load_weights(iter(tensors.items()))  # type: ignore[operator]
        self._check_filled(loaded)
        self._own(tensors)
        process_weights_after_loading(self._model, self._model_config, torch.device("cpu"))
        return Prepared(tuple(self._match()))

    def _check_filled(self, loaded: set[str] | None) -> None:
        if loaded is None or self._model_config.quantization is not None:
            return  # vLLM itself tracks loaded names only for unquantised models that report them
        if unfilled := sorted({name for name, _ in self._model.named_parameters()} - loaded):
            raise EngineError(f"vLLM filled nothing into {', '.join(unfilled)}")

    def _own(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy what the loader kept instead of copying it."""
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
        for _, node in walk(self._model, self._shared):
            if isinstance(node, torch.Tensor) and node.numel() and node.untyped_storage().data_ptr() in given:
                node.data = node.data.clone()

    def clear(self) -> None:
        """Be as built, without memory: what was loaded, or what served before a swap, is dropped."""
        for node in self._known.values():
            content = self._contents.get(id(node))
            if content is not None and not is_unchanged(node, content):
                put_back(node, content)
        for built in self._built.values():
            built.strip()

    # What the load made, and where the serving model has the same

    def _match(self) -> Iterable[Pair]:
        pairs: dict[int, Pair] = {}
        owners: dict[int, int] = {}
        seen: dict[int, Any] = {}
        stack: list[tuple[Path, Any, Any, bool]] = [((), self._model, self._serving, False)]
        while stack:
            path, spare, serving, is_new = stack.pop()
            if spare is serving or id(spare) in self._shared:
                continue
            if isinstance(spare, torch.Tensor):
                if self._came_of_weights(spare):
                    self._pair(path, spare, serving, pairs, owners)
            elif is_scalar(spare) or is_leaf(spare):
                if is_new and not _is_same_leaf(spare, serving):
                    raise CannotPrepareError(f"{describe(path)} is {spare!r} anew, and {serving!r} in what serves")
            elif id(spare) not in seen:
                seen[id(spare)] = spare
                stack.extend(self._pair_parts(path, spare, serving))
        return pairs.values()

    def _came_of_weights(self, tensor: torch.Tensor) -> bool:
        built = self._built.get(id(tensor))
        return built is None or not built.is_as_built

    def _pair(
        self, path: Path, spare: torch.Tensor, serving: Any, pairs: dict[int, Pair], owners: dict[int, int]
    ) -> None:
        if not isinstance(serving, torch.Tensor) or _kind(spare) != _kind(serving):
            found = _kind(serving) if isinstance(serving, torch.Tensor) else "no tensor"
            raise CannotPrepareError(f"{describe(path)} is {_kind(spare)} anew, and {found} in what serves")
        if owners.setdefault(id(serving), id(spare)) != id(spare):
            raise CannotPrepareError(f"{describe(path)} is one tensor with another in what serves, and not anew")
        pair = pairs.setdefault(id(spare), Pair(path, spare))
        if not any(tensor is serving for tensor in pair.serving):
            pair.serving.append(serving)

    def _pair_parts(self, path: Path, spare: Any, serving: Any) -> list[tuple[Path, Any, Any, bool]]:
        """What hangs on an object of the spare, beside what hangs on the serving model's, and whether it is new."""
        ours, theirs = parts(spare), {} if serving is _MISSING else parts(serving)
        is_known = id(spare) in self._known
        if not is_known and not _is_same_kind(spare, serving, ours.keys() == theirs.keys()):
            raise CannotPrepareError(f"{describe(path)} is {spare!r} anew, and {serving!r} in what serves")
        for step, held in theirs.items():
            if step not in ours and isinstance(held, torch.Tensor) and held.numel():
                raise CannotPrepareError(f"{describe((*path, step))} is a tensor of what serves alone")
        before = self._content_parts(spare) if is_known else {}
        rows = []
        for step, part in ours.items():
            is_same = step in before and (before[step] is part or _is_same_leaf(before[step], part))
            is_new = not is_same and id(part) not in self._known
            rows.append(((*path, step), part, theirs.get(step, _MISSING), is_new))
        return rows

    def _content_parts(self, node: Any) -> dict[Any, Any]:
        content = self._contents.get(id(node))
        if content is None:
            return parts(node)  # cannot be changed in place
        if isinstance(content, dict) and not isinstance(node, dict):
            return {("attr", name): value for name, value in content.items()}
        return parts(content)


def _kind(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, str]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device.type


def _is_same_kind(one: object, other: object, has_same_parts: bool) -> bool:
    if type(one) is not type(other) or (isinstance(one, torch.nn.Module) is False and not has_same_parts):
        return False
    return not isinstance(one, FunctionType) or (isinstance(other, FunctionType) and one.__code__ is other.__code__)


def _is_same_leaf(one: object, other: object) -> bool:
    if one is other:
        return True
    if type(one) is not type(other) or not (is_scalar(one) or isinstance(one, set | frozenset)):
        return False
    return bool(one == other) or (one != one and other != other)  # a NaN is no other than itself
