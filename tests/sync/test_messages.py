"""Messages survive the wire, and nothing else does: whatever comes is a valid message or a `WireError`."""

from contextlib import suppress
from dataclasses import fields
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync import messages as m
from weightcast.sync.errors import WireError
from weightcast.sync.messages import decode, encode
from weightcast.sync.records import EngineReport, Offer, SourceReport, Span, Ticket
from weightcast.sync.regions import Region, TensorSpec
from weightcast.sync.version import Version

V = Version(1_700_000_000_000, 7)
SPAN = Span("stage", 1.5, 2.5)
REPORT = EngineReport("e", "serving", 0.1, 0.2, 3, 4, (SPAN,), "", "zmq", 2)
TICKET = Ticket(0, "shared_memory", b"\6" * 40)
REGION = Region("model.w", (0, 4), (8, 2))
EXAMPLES: list[m.Message] = [
    m.Hello(1, "engine-0", "receiver", None),
    m.Hello(1, "engine-0", "observer", V),
    m.Ping(),
    m.Staged(V, 10, 0.5, 3, (SPAN, SPAN), "shared_memory", 1, 12),
    m.Serving(V, 0.0, ()),
    m.Failed(V, "out of memory"),
    m.Bye(),
    m.Welcome(1, 5, (TensorSpec("a", torch.bfloat16, (2, 3)), TensorSpec("b", torch.bool, ()))),
    m.Layout(5, 4096, (Offer(0, "tcp://127.0.0.1:1", (REGION,)),)),
    m.Announce(V, (TICKET,)),
    m.Sealed(V, b"\1" * 16),
    m.Release(V),
    m.Pong(5, True),
    m.Goodbye("closed", False),
    m.SourceHello(1, 0, 2, "f" * 32, "ipc:///tmp/x", (REGION, REGION)),
    m.Assigned(5, 4096, (REGION,)),
    m.Packing(7, (TICKET, TICKET)),
    m.Packed(7, b"\4" * 8, SourceReport(0, 0.5, 10, 1, 3, 2), (SPAN,)),
    m.Published(V, (REPORT,), (SourceReport(0, 0.5, 10, 10, None, 2),), 2, (SPAN,), "", "on", "deltas are quicker"),
    m.ChunkRequest(V, 3, None, False),
    m.ChunkRequest(V, 3, V, True),
    m.ChunkHeader(V, 3, "dense", None, b"\5" * 16),
    m.ChunkHeader(V, 3, "same", V, b""),
    m.ChunkHeader(V, 3, "same", V, b"", 2),
    m.ChunkRequest(V, 3, V, True, m.MAX_RUN_CHUNKS),
    m.Announce(V, (TICKET,), (0, 3)),
    m.Packing(7, (), is_ready=True),
    m.Layout(5, 4096, (), (TICKET,)),
    m.SourceHello(1, 0, 2, "f" * 32, "ipc:///tmp/x", (), (TICKET,)),
]


def plain(message: m.Message) -> dict[str, Any]:
    """A message's msgpack map."""
    value: dict[str, Any] = msgpack.unpackb(encode(message))
    return value


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: m.Message) -> None:
    assert decode(encode(message)) == message
    assert decode(memoryview(encode(message))) == message


def test_every_kind_has_an_example() -> None:
    assert {type(message).__name__ for message in EXAMPLES} == set(m.KINDS)


@PROPERTY
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_valid(raw: bytes) -> None:
    with suppress(WireError):
        assert type(decode(raw)).__name__ in m.KINDS


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    SCALARS | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.binary(max_size=3), inner),
    max_leaves=8,
)


@PROPERTY
@given(st.data(), st.sampled_from(EXAMPLES), VALUES)
def test_any_value_in_any_field_is_refused_or_valid(data: st.DataObject, message: m.Message, value: Any) -> None:
    mutated = plain(message)
    mutated[data.draw(st.sampled_from(sorted(mutated)))] = value
    with suppress(WireError):
        decode(msgpack.packb(mutated))


@PROPERTY
@given(st.data(), st.sampled_from(EXAMPLES))
def test_flipped_cut_and_added_bytes_are_refused_or_valid(data: st.DataObject, message: m.Message) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] + data.draw(st.binary(max_size=4))
    with suppress(WireError):
        decode(bytes(raw))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_missing_and_extra_fields_are_refused(message: m.Message) -> None:
    with pytest.raises(WireError, match="exactly"):
        decode(msgpack.packb(plain(message) | {"more": 1}))
    for field in fields(message):
        less = plain(message)
        del less[field.name]
        with pytest.raises(WireError, match="exactly"):
            decode(msgpack.packb(less))


def nested(depth: int) -> bytes:
    """A Pong whose epoch is a list in a list in a list."""
    return b"\x83\xa4kind\xa4Pong\xa5epoch" + b"\x91" * depth + b"\xc0\xa5known\xc3"


@pytest.mark.parametrize("depth", [1, 500, 1000, 1020, 1023, 1024, 5000, 1_000_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    # Near 1000 the decoder still takes it, and Python's own repr() would end in a RecursionError.
    with pytest.raises(WireError):
        decode(nested(depth))


@pytest.mark.parametrize(
    ("message", "field", "value", "match"),
    [
        (EXAMPLES[0], "kind", "Execute", "unknown kind"),
        (EXAMPLES[0], "kind", 3, "'kind' was expected"),
        (EXAMPLES[0], "role", "admin", "one of"),
        (EXAMPLES[0], "engine", "x" * 5000, "at most 4096"),
        (EXAMPLES[0], "engine", "a\0b", "text"),
        (EXAMPLES[0], "protocol", True, "integer"),
        (EXAMPLES[0], "protocol", -1, "integer"),
        (EXAMPLES[3], "stage_s", float("nan"), "number"),
        (EXAMPLES[3], "stage_s", float("inf"), "number"),
        (EXAMPLES[3], "spans", [["a", 1.0, 2.0]] * 10_001, "at most 10000"),
        (EXAMPLES[3], "version", [1], "of 2 fields"),
        (EXAMPLES[7], "specs", [["a", "object", [1]]], "one of the dtypes"),
        (EXAMPLES[7], "specs", [["a", [["int8"]], [1]]], "one of the dtypes"),
        (EXAMPLES[7], "specs", [["a", "int8", [1] * 9]], "at most 8"),
        (EXAMPLES[7], "specs", [["a", "int8", [1 << 49]]], "integer"),
        (EXAMPLES[15], "regions", [["a", [0, 0], [1]]], "as many offsets"),
        (EXAMPLES[19], "index", 1 << 23, "integer"),
        (EXAMPLES[19], "count", 0, "integer from 1 to 64"),
        (EXAMPLES[19], "count", 65, "integer from 1 to 64"),
        (EXAMPLES[21], "count", True, "integer from 1 to 64"),
        (EXAMPLES[21], "encoding", "gzip", "one of"),
        (EXAMPLES[21], "hash", b"x" * 17, "at most 16 bytes"),
        (EXAMPLES[16], "tickets", [[0, "shared_memory", b"x" * 1025]], "at most 1024 bytes"),
        (EXAMPLES[17], "digests", "text", "bytes"),
        (EXAMPLES[18], "error", b"x" * (1 << 20), "bytes of length 1048576"),
    ],
)
def test_values_out_of_bounds_are_named(message: m.Message, field: str, value: Any, match: str) -> None:
    with pytest.raises(WireError, match=match) as caught:
        decode(msgpack.packb(plain(message) | {field: value}))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "value",
    [None, 1, [], {}, {"kind": None}, {"kind": "Ping", b"a": 1, "b": 2}, {str(i): i for i in range(65)}],
)
def test_what_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb(value))


def test_a_claim_of_billions_of_items_takes_no_memory() -> None:
    with pytest.raises(WireError):
        decode(b"\x82\xa4kind\xa7Welcome\xa5specs\xdd\xff\xff\xff\xff")
    with pytest.raises(WireError):
        decode(b"\x82\xa4kind\xa7Welcome\xa5specs\xc6\xff\xff\xff\xff")


def test_extension_types_are_refused() -> None:
    with pytest.raises(WireError):
        decode(msgpack.packb({"kind": "Goodbye", "reason": msgpack.ExtType(4, b"x")}))
    with pytest.raises(WireError):
        decode(msgpack.packb({"kind": "Goodbye", "reason": msgpack.Timestamp(1, 2)}))


def test_a_message_past_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightcast.sync.schema.MAX_MESSAGE_BYTES", 100)
    with pytest.raises(WireError, match="limit of 100"):
        encode(m.Goodbye("x" * 200, False))
    with pytest.raises(WireError, match="limit of 100"):
        decode(b"\x81" * 101)
