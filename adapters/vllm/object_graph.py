"""What hangs on an object: attributes, items, and what functions closed over.

vLLM's layers keep their processed weights where each kernel likes: in parameters, in plain attributes, in the closure
of a function, in objects of their own. To find all of them nothing is said about any kernel; the graph is walked.

    for path, node in walk(model): ...
    content = copy_content(node)         # and later put_back(node, content)
"""

from collections.abc import Collection, Iterator
from enum import Enum
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch

Step: TypeAlias = tuple[str, Any]
"""("attr", its name), ("item", its key or index), ("cell" or "default", its index)."""

Path: TypeAlias = tuple[Step, ...]

SCALARS = (bool, int, float, complex, str, bytes, type(None), range, slice, Enum)
TORCH_SCALARS = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)

# Configurations and process groups: large, shared, and without weights.
_CLOSED_PACKAGES = ("vllm.config", "transformers", "torch.distributed", "torch._ops", "logging", "threading")


def parts(node: object) -> dict[Step, Any]:
    """What `node` holds; nothing for a tensor, a scalar, a class, or something of a closed package."""
    if isinstance(node, dict):
        return {("item", key): value for key, value in node.items()}
    if isinstance(node, list | tuple):
        return {("item", index): value for index, value in enumerate(node)}
    if isinstance(node, FunctionType):
        cells = enumerate(node.__closure__ or ())
        held = {("cell", index): cell.cell_contents for index, cell in cells if _is_filled(cell)}
        return held | {("default", index): value for index, value in enumerate(node.__defaults__ or ())}
    if isinstance(node, MethodType):
        return {("attr", "__self__"): node.__self__, ("attr", "__func__"): node.__func__}
    if isinstance(node, partial):
        return {("attr", name): getattr(node, name) for name in ("func", "args", "keywords")}
    return {} if is_leaf(node) else {("attr", name): value for name, value in attributes_of(node).items()}


def attributes_of(node: object) -> dict[str, Any]:
    """The attributes of one object, those in slots included."""
    slots = [name for kind in type(node).__mro__ for name in _slots_of(kind) if hasattr(node, name)]
    return {name: getattr(node, name) for name in slots} | dict(getattr(node, "__dict__", {}))


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def is_scalar(node: object) -> bool:
    """Whether a value says all about `node`."""
    return isinstance(node, SCALARS + TORCH_SCALARS)


def is_leaf(node: object) -> bool:
    """Whether the walk goes no further than `node`."""
    if isinstance(node, dict | list | tuple | FunctionType | MethodType | partial):
        return isinstance(node, torch.Size)
    if is_scalar(node) or isinstance(node, torch.Tensor | type | ModuleType | set | frozenset):
        return True
    if type(node).__module__.startswith(_CLOSED_PACKAGES):
        return True
    return not hasattr(node, "__dict__") and not any(_slots_of(kind) for kind in type(node).__mro__)


def walk(root: object, closed: Collection[int] = ()) -> Iterator[tuple[Path, Any]]:
    """Everything below `root` but scalars, each object once, by the first way to it; not beyond the ids in `closed`."""
    seen: dict[int, object] = {}  # objects, not only their ids, so that no id is used again meanwhile
    stack: list[tuple[Path, Any]] = [((), root)]
    while stack:
        path, node = stack.pop()
        if is_scalar(node) or id(node) in seen or id(node) in closed:
            continue
        seen[id(node)] = node
        yield path, node
        stack.extend(((*path, step), part) for step, part in parts(node).items())


def copy_content(node: object) -> dict[Any, Any] | list[Any] | set[Any] | None:
    """What may be changed about `node` in place, a level deep; None when nothing may be."""
    if isinstance(node, dict):
        return dict(node)
    if isinstance(node, list):
        return list(node)
    if isinstance(node, set):
        return set(node)
    if isinstance(node, torch.Tensor) or (not is_leaf(node) and hasattr(node, "__dict__")):
        return dict(vars(node))
    return None


def put_back(node: Any, content: dict[Any, Any] | list[Any] | set[Any]) -> None:
    """Make `node` what it was when `content` was copied."""
    if isinstance(node, list):
        node[:] = content
        return
    held = node if isinstance(node, dict | set) else vars(node)
    held.clear()
    held.update(content)


def is_unchanged(node: Any, content: dict[Any, Any] | list[Any] | set[Any]) -> bool:
    """Whether `node` holds the very objects of `content`."""
    if isinstance(node, set):
        return node == content
    if isinstance(node, list):
        return len(node) == len(content) and all(one is other for one, other in zip(node, content, strict=True))
    held = node if isinstance(node, dict) else vars(node)
    assert isinstance(content, dict)
    return list(held) == list(content) and all(held[name] is content[name] for name in content)


def describe(path: Path) -> str:
    """A path as one would write it in Python, but for what a function closed over."""
    text = ""
    for kind, key in path:
        if kind == "attr" and key in ("_modules", "_parameters", "_buffers"):
            continue
        is_name = kind == "attr" or (isinstance(key, str) and key.isidentifier())
        text += f".{key}" if is_name else f"[{key!r}]" if kind == "item" else f"<{kind} {key}>"
    return text.removeprefix(".") or "the model"
