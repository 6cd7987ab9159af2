"""What an engine's tensors may be, that versions land in: one device, memory of their own, views as they are."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY, make_specs

from weightcast.sync import TensorSpec, WeightSubscriber
from weightcast.sync.engine_tensors import EngineTensors, _place_of, find_overlap
from weightcast.sync.errors import ConfigError

WIDE = torch.zeros(6, 20)
ELEMENTS = torch.zeros(64, dtype=torch.int16)


def test_views_of_one_parameter_are_taken_as_they_are() -> None:
    with torch.inference_mode():
        made_there = torch.zeros(3, dtype=torch.bfloat16)
    fused = torch.nn.Parameter(torch.zeros(6, 20))
    into = {
        "rows": fused[:2],
        "left": fused[2:4, :7],
        "right": fused[2:4, 7:],
        "turned": fused[4:].T,
        "none": torch.zeros(0, 4),
        "codes": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "there": made_there,
    }
    memory = EngineTensors(into)
    assert memory.device is None and list(memory.specs) == make_specs(into)
    for name, tensor in into.items():
        place = memory.take(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        assert type(place) is torch.Tensor and not place.requires_grad and place.stride() == tensor.stride()
        place.copy_(torch.ones(tensor.shape))
        assert bool((tensor.float() == 1).all())
    assert bool((fused == 1).all())
    assert memory.present(["codes", "rows"])["rows"] is into["rows"]
    memory.check_unmoved()


@pytest.mark.parametrize(
    ("into", "says"),
    [
        ({}, "names no tensors"),
        ({"a": [1.0]}, r"into\['a'\] is a list"),
        ({"a": torch.zeros(2, device="meta")}, r"into\['a'\] is torch.strided on meta"),
        ({"a": torch.zeros(2, 2).to_sparse()}, r"into\['a'\] is torch.sparse_coo"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"into\['a'\] is complex64; versions have one of bfloat16"),
        ({"a": torch.zeros(1, 3).expand(2, 3)}, r"into\['a'\] of the shape \[2, 3\] and strides \[0, 1\]"),
        ({"a": torch.zeros(9).as_strided((3, 3), (2, 1))}, "has elements that share memory"),
        (
            {"a": WIDE[:4], "b": WIDE[3:]},
            "'a' and 'b' have a part of their memory in common.*or, where they are tied, all",
        ),
        ({"a": WIDE, "b": WIDE, "c": WIDE.view(-1)}, "'a' and 'c' have a part of their memory in common"),
        (
            {"a": WIDE[:, :8], "b": WIDE[:, 10:], "c": WIDE[5, 9:11]},
            "'b' and 'c' have a part of their memory in common",
        ),
        ({"a": WIDE[0], "b": WIDE[0].view(torch.uint8)[4:5]}, "'a' and 'b' have a part of their memory in common"),
    ],
)
def test_what_cannot_be_landed_in_is_refused_by_name(into: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineTensors(into)


def test_a_device_is_that_of_the_tensors() -> None:
    assert EngineTensors({"a": WIDE}, "cpu").device == torch.device("cpu")
    with pytest.raises(ConfigError, match="into is on cpu, not on cuda; leave out device"):
        EngineTensors({"a": WIDE}, "cuda")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": "group"}, "share does not go together with into: workers"),
        ({"want": {}}, "want does not go together with into: all"),
        ({"prepares": True}, "prepares does not go together with into: an engine"),
        ({"expect": []}, "expect does not go together with into: the tensors themselves"),
        ({"role": "observer"}, "an observer receives nothing that could land in place"),
        ({"device": "cuda"}, "into is on cpu, not on cuda"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WeightSubscriber("ipc:///tmp/none", into={"a": WIDE}, **options)  # type: ignore[arg-type]


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A strided view of the same few elements."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    step = draw(st.integers(1, 3))
    stride = draw(st.integers((columns - 1) * step + 1, (columns - 1) * step + 5))
    last = (rows - 1) * stride + (columns - 1) * step
    start = draw(st.integers(0, len(ELEMENTS) - 1 - last))
    return ELEMENTS.as_strided((rows, columns), (stride, step), start)


@given(st.lists(views(), min_size=2, max_size=5))
@PROPERTY
def test_an_overlap_is_found_exactly_where_two_have_an_element_in_common(found: list[torch.Tensor]) -> None:
    elements = {}
    for number, view in enumerate(found):
        ELEMENTS.zero_()
        view.fill_(1)
        elements[str(number)] = set(ELEMENTS.nonzero().view(-1).tolist())
    wanted = {frozenset(pair) for pair in itertools.combinations(elements, 2) if elements[pair[0]] & elements[pair[1]]}
    pair = find_overlap({str(number): _place_of(view) for number, view in enumerate(found)})
    assert (pair is None) == (not wanted) and (pair is None or frozenset(pair) in wanted)
