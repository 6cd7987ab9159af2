"""Bounded msgpack: a small schema language for messages that come from strangers.

A message is a frozen dataclass; each field names a `Check` in its metadata, which turns the decoded msgpack value
into the field's value or raises `WireError`. Nothing is believed before its check has passed, unknown and missing
fields are refused, and the size, depth and number of items are limited before anything is built.

    @dataclass(frozen=True, slots=True)
    class Ping:
        serving: Version | None = checked(optional(version))
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import msgpack
import torch

from weightcast.sync.errors import WireError
from weightcast.sync.regions import dtype_name

Check: TypeAlias = Callable[[Any], Any]

# A manifest of a million tensors fits; a claim of more is refused before memory is taken.
MAX_MESSAGE_BYTES = 256 << 20
MAX_ITEMS = 4_000_000
MAX_TEXT_BYTES = 4096
MAX_DIMENSIONS = 8
MAX_UINT = (1 << 64) - 1


def checked(check: Check, **kwargs: Any) -> Any:
    """A dataclass field whose wire value must pass `check`."""
    return dataclasses.field(metadata={"check": check}, **kwargs)


def pack(kind: str, message: Any) -> bytes:
    """A message as bytes: a msgpack map of its fields and its kind."""
    fields = {field.name: _plain(getattr(message, field.name)) for field in dataclasses.fields(message)}
    packed: bytes = msgpack.packb({"kind": kind, **fields}, use_bin_type=True)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise WireError(f"a {kind!r} message of {len(packed)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    return packed


def unpack(raw: bytes | memoryview, kinds: dict[str, type[Any]]) -> Any:
    """The message in `raw`, one of `kinds`; `WireError` when it is anything else."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(raw)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        value = msgpack.unpackb(
            raw,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=64,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not a weightcast message: {error or type(error).__name__}") from None
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        raise WireError("not a weightcast message: a map with a 'kind' was expected")
    kind = value.pop("kind")
    if kind not in kinds:
        raise WireError(f"unknown kind of message {kind[:40]!r}; known are {sorted(kinds)}")
    return _build(kinds[kind], kind, value)


def _build(cls: type[Any], kind: str, values: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if values.keys() != fields.keys():
        raise WireError(
            f"a {kind!r} message with the fields {[show(name) for name in values][:20]}; "
            f"exactly {sorted(fields)} are allowed"
        )
    built = {}
    for name, field in fields.items():
        try:
            built[name] = field.metadata["check"](values[name])
        except WireError as error:
            raise WireError(f"{kind}.{name}: {error}") from None
    return cls(**built)


def _plain(value: Any) -> Any:
    """Records as lists and dtypes by name, so that msgpack takes them; the checks below read them back."""
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def positive(limit: int) -> Check:
    """An integer from 1 to `limit`."""

    def check(value: Any) -> int:
        if type(value) is not int or not 1 <= value <= limit:
            raise WireError(f"an integer from 1 to {limit} was expected, got {show(value)}")
        return value

    return check


def uint(limit: int = MAX_UINT) -> Check:
    """An integer from 0 to `limit`."""

    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise WireError(f"an integer from 0 to {limit} was expected, got {show(value)}")
        return value

    return check


def real(value: Any) -> float:
    """A finite number, not negative: times and durations in seconds."""
    if type(value) not in (float, int) or not 0 <= value < 1e15:
        raise WireError(f"a number >= 0 was expected, got {show(value)}")
    return float(value)


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise WireError(f"true or false was expected, got {show(value)}")
    return value


def text(value: Any) -> str:
    """Printable text of at most `MAX_TEXT_BYTES`."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_BYTES or "\0" in value:
        raise WireError(f"text of at most {MAX_TEXT_BYTES} characters was expected, got {show(value)}")
    return value


def binary(limit: int) -> Check:
    """Bytes, at most `limit`."""

    def check(value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) > limit:
            raise WireError(f"at most {limit} bytes were expected, got {show(value)}")
        return value

    return check


def choice(*allowed: str) -> Check:
    """One of the given words."""

    def check(value: Any) -> str:
        if value not in allowed:
            raise WireError(f"one of {allowed} was expected, got {show(value)}")
        return str(value)

    return check


def optional(inner: Check) -> Check:
    """None, or what `inner` takes."""
    return lambda value: None if value is None else inner(value)


def many(inner: Check, limit: int = MAX_ITEMS) -> Check:
    """A list of at most `limit` items, each of which `inner` takes; comes back as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise WireError(f"a list of at most {limit} items was expected, got {show(value)}")
        return tuple(inner(item) for item in value)

    return check


def record(cls: type[Any], *inner: Check) -> Check:
    """A list with one item a field of `cls`; comes back as a `cls`."""

    def check(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(inner):
            raise WireError(f"a {cls.__name__} of {len(inner)} fields was expected, got {show(value)}")
        return cls(*(take(item) for take, item in zip(inner, value, strict=True)))

    return check


def show(value: Any) -> str:
    """A value for an error message, in bounded time: a stranger's may be deep, or hundreds of megabytes."""
    if isinstance(value, list | dict | bytes):
        return f"{type(value).__name__} of length {len(value)}"
    return repr(value[:77] + "..." if isinstance(value, str) and len(value) > 80 else value)
