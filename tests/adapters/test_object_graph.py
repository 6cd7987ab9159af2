"""What hangs on an object, found whatever holds it, and put back as it was."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from weightcast.adapters.vllm.object_graph import copy_content, describe, is_unchanged, put_back, walk


class Slotted:
    __slots__ = ("inner", "unset")

    def __init__(self, inner: object) -> None:
        self.inner = inner


@dataclass
class Record:
    held: dict[str, Any] = field(default_factory=dict)

    def method(self) -> None:
        """Bound to what holds it."""


def closing_over(held: object) -> object:
    return lambda given, other=(held, 3): (given, held, other)


WEIGHT = torch.ones(3)


@pytest.mark.parametrize(
    ("root", "path"),
    [
        pytest.param({"a": [0, (WEIGHT,)]}, ".a[1][0]", id="containers"),
        pytest.param(OrderedDict({3: WEIGHT}), "[3]", id="keys that are no names"),
        pytest.param(Slotted(WEIGHT), "inner", id="slots"),
        pytest.param(Record({"w": WEIGHT}), "held.w", id="attributes"),
        pytest.param(Record({"w": WEIGHT}).method, "__self__.held.w", id="bound methods"),
        pytest.param(closing_over(Record({"w": WEIGHT})), "<default 0>[0].held.w", id="functions"),
        pytest.param(partial(print, 1, end=Record({"w": WEIGHT})), "keywords.end.held.w", id="partial functions"),
    ],
)
def test_a_tensor_is_found_wherever_it_hangs(root: object, path: str) -> None:
    [found] = [path for path, node in walk(root) if node is WEIGHT]
    assert describe(found) == path.removeprefix(".")


def test_a_module_is_walked_once_though_it_holds_itself() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].parent = Record({"model": model})  # type: ignore[assignment]
    tensors = sorted(describe(path) for path, node in walk(model) if isinstance(node, torch.Tensor))
    assert len(tensors) == 3 and {"['0'].bias", "['1'].bias"} < set(tensors)
    assert not any(node is model for _, node in walk(model, {id(model)}))


NODES: list[Any] = [{"a": 1, "b": 2}, [1, 2], {1, 2}, Record({"a": 1}), torch.nn.Linear(2, 2)]


@pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)
def test_what_was_changed_is_put_back(node: Any) -> None:
    content = copy_content(node)
    assert content is not None and is_unchanged(node, content)
    if isinstance(node, list):
        node.append(3)
    elif isinstance(node, set):
        node.discard(1)
    elif isinstance(node, dict):
        node["a"] = object()
    else:
        node.packed = WEIGHT
    assert not is_unchanged(node, content)
    put_back(node, content)
    assert is_unchanged(node, content)


def test_what_cannot_be_changed_has_no_content() -> None:
    assert all(copy_content(node) is None for node in ((1, 2), "text", 7, torch.float32, print, Record))
