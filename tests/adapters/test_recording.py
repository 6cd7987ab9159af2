"""What a loader reads of each tensor, told by watching it: loaders of every kind, without an engine."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightcast.adapters.vllm.recording import Copied, LoadRecord, box_of_view, record_load
from weightcast.sync.errors import EngineError
from weightcast.sync.regions import Region, TensorSpec

FULL = TensorSpec("w", torch.bfloat16, (8, 6))
Load = Callable[[torch.nn.Parameter, torch.Tensor], object]


class Model(torch.nn.Module):
    """A model of one parameter, with a loader."""

    def __init__(self, shape: tuple[int, ...], load: Load, device: str = "meta") -> None:
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(shape, device=device, dtype=torch.bfloat16), requires_grad=False)
        self._load = load

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "w":
                self._load(self.p, tensor)


def box(offset: tuple[int, ...], shape: tuple[int, ...], name: str = "w") -> Region:
    return Region(name, offset, shape)


@pytest.mark.parametrize(
    ("shape", "load", "source", "target"),
    [
        pytest.param((8, 6), lambda p, w: p.copy_(w), ((0, 0), (8, 6)), ((0, 0), (8, 6)), id="whole"),
        pytest.param((8, 6), lambda p, w: p.data.copy_(w), ((0, 0), (8, 6)), ((0, 0), (8, 6)), id="data"),
        pytest.param((4, 6), lambda p, w: p.copy_(w.narrow(0, 4, 4)), ((4, 0), (4, 6)), ((0, 0), (4, 6)), id="rows"),
        pytest.param((8, 3), lambda p, w: p.copy_(w[:, 3:]), ((0, 3), (8, 3)), ((0, 0), (8, 3)), id="columns"),
        pytest.param((8, 2), lambda p, w: p.copy_(w.chunk(3, 1)[1]), ((0, 2), (8, 2)), ((0, 0), (8, 2)), id="chunk"),
        pytest.param((6, 8), lambda p, w: p.copy_(w.t()), ((0, 0), (8, 6)), ((0, 0), (6, 8)), id="transposed"),
        pytest.param(
            (2, 2, 6), lambda p, w: p.copy_(w[2:6].view(2, 2, 6)), ((2, 0), (4, 6)), ((0, 0, 0), (2, 2, 6)), id="split"
        ),
        pytest.param(
            (8, 6), lambda p, w: p.copy_(w.flatten().view(8, 6)), ((0, 0), (8, 6)), ((0, 0), (8, 6)), id="flat"
        ),
        pytest.param((48,), lambda p, w: p.copy_(w.view(-1)), ((0, 0), (8, 6)), ((0,), (48,)), id="to-a-vector"),
    ],
)
def test_boxes_that_are_copied(
    shape: tuple[int, ...],
    load: Load,
    source: tuple[tuple[int, ...], tuple[int, ...]],
    target: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    record = record_load(Model(shape, load), [FULL])
    assert record == LoadRecord({"w": (box(*source),)}, (Copied(box(*source), box(*target, name="p")),), (), ())


def test_halves_of_one_parameter_and_an_expert_of_a_stack() -> None:
    def load(p: torch.nn.Parameter, w: torch.Tensor) -> None:
        for half in (0, 1):
            p.data[half].narrow(0, 0, 2).copy_(w[4 * half : 4 * half + 2])
        p.data[:, 2:].fill_(0)

    record = record_load(Model((2, 4, 6), load), [FULL])
    assert record.wanted == {"w": (box((0, 0), (2, 6)), box((4, 0), (2, 6)))}
    assert [copied.target for copied in record.copied] == [
        box((0, 0, 0), (1, 2, 6), "p"),
        box((1, 0, 0), (1, 2, 6), "p"),
    ]


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        pytest.param(lambda p, w: p.copy_(w[:4].float() * 2), ((0, 0), (4, 6)), id="scaled"),
        pytest.param(lambda p, w: p.copy_(w[2:6].contiguous().flip(0)), ((2, 0), (4, 6)), id="turned"),
        pytest.param(lambda p, w: p.copy_(torch.cat([w[2:4], w[6:8]])), None, id="joined"),
        pytest.param(lambda p, w: p.copy_(w[::2]), ((0, 0), (7, 6)), id="every-second"),
        pytest.param(lambda p, w: p.copy_(w.view(-1)[3:27].view(4, 6)), ((0, 0), (8, 6)), id="across-rows"),
    ],
)
def test_whatever_is_computed_depends_on_what_was_read(
    load: Load, wanted: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> None:
    record = record_load(Model((4, 6), load), [FULL])
    expected = (box((2, 0), (2, 6)), box((6, 0), (2, 6))) if wanted is None else (box(*wanted),)
    assert record.wanted == {"w": expected}


def test_computing_is_told_from_copying() -> None:
    assert record_load(Model((8, 6), lambda p, w: p.copy_(w + 1)), [FULL]).computed == ("w",)
    assert record_load(Model((8, 6), lambda p, w: p.copy_(w)), [FULL]).computed == ()


def test_what_is_not_read_is_not_wanted_and_what_is_not_written_is_named() -> None:
    other = TensorSpec("other", torch.float32, (3,))
    record = record_load(Model((8, 6), lambda p, w: None), [FULL, other])
    assert record == LoadRecord({"w": (), "other": ()}, (), (), ("p",))


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(lambda p, w: p.copy_(w) if w[0, 0].item() == 0 else None, id="item"),
        pytest.param(lambda p, w: p.copy_(w) if torch.equal(w, w) else None, id="equal"),
        pytest.param(lambda p, w: p.copy_(w) if bool((w == w).all()) else None, id="derived"),
    ],
)
def test_a_loader_that_looks_at_values_is_refused(load: Load) -> None:
    with pytest.raises(EngineError, match=r"ask for whole tensors instead"):
        record_load(Model((8, 6), load), [FULL])


def test_a_model_with_memory_is_refused() -> None:
    with pytest.raises(EngineError, match="p is not on the meta device"):
        record_load(Model((8, 6), lambda p, w: p.copy_(w), "cpu"), [FULL])


def test_a_parameter_that_is_filled_in_part_is_refused() -> None:
    with pytest.raises(EngineError, match="the loader filled 24 of 48 elements of p"):
        record_load(Model((8, 6), lambda p, w: p.data[:4].copy_(w[:4])), [FULL])


def test_a_loader_that_fails_is_named() -> None:
    def load(p: torch.nn.Parameter, w: torch.Tensor) -> None:
        raise KeyError("w")

    with pytest.raises(EngineError, match=r"Model.load_weights cannot be watched: KeyError: 'w'"):
        record_load(Model((8, 6), load), [FULL])


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of numbers, and a view of it made in up to five steps."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    view = whole
    for _ in range(draw(st.integers(0, 5))):
        dim = draw(st.integers(0, view.dim() - 1)) if view.dim() else None
        if dim is None:
            break
        step = draw(st.sampled_from(["narrow", "select", "transpose", "stride", "flatten", "unflatten", "expand"]))
        if step == "narrow":
            start = draw(st.integers(0, view.shape[dim] - 1))
            view = view.narrow(dim, start, draw(st.integers(1, view.shape[dim] - start)))
        elif step == "select":
            view = view.select(dim, draw(st.integers(0, view.shape[dim] - 1)))
        elif step == "transpose":
            view = view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
        elif step == "stride":
            view = view[(slice(None),) * dim + (slice(None, None, 2),)]
        elif step == "flatten" and view.is_contiguous():
            view = view.view(-1)
        elif step == "unflatten" and view.shape[dim] % 2 == 0:
            view = torch.unflatten(view, dim, (2, -1))
        elif step == "expand":
            view = view.unsqueeze(dim).expand(*view.shape[:dim], 2, *view.shape[dim:])
    return whole, view


@given(views())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_box_of_any_view_holds_all_of_it(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole, view = case
    region = box_of_view("w", view, whole)
    found = set(whole[region.slices].flatten().tolist())
    assert set(view.flatten().tolist()) <= found
