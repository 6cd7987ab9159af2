"""One way to follow versions, wherever they come from: a publisher's socket, or a store of versions.

    with follow("tcp://127.0.0.1:5600", engine="engine-0") as subscriber:      # or ipc:///path
    with follow("/shared/versions", engine="engine-0") as subscriber:          # or file://, s3://, gs://, memory://
        EngineFollower(engine, subscriber).run(stop)

An address with `tcp://` or `ipc://` is a publisher's. A path, and any other URL, is a store's (fsspec reaches it, with
the extra `disk-remote`). An option that the kind of place does not have is refused by its name.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from weightcast.sync.disk.observer import DiskObserver
from weightcast.sync.disk.subscriber import DiskLimits, DiskSubscriber
from weightcast.sync.errors import AddressError, ConfigError
from weightcast.sync.fleet import Role
from weightcast.sync.host.share import HostShare
from weightcast.sync.limits import Limits
from weightcast.sync.regions import TensorSpec
from weightcast.sync.subscriber import WeightSubscriber
from weightcast.sync.transports.zmq_sockets import CurveKeys, parse_address
from weightcast.sync.version import Version
from weightcast.sync.wanted import Want

PlaceKind: TypeAlias = Literal["publisher", "store"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[\w.\-]+):(\d{1,5}|\*)", re.ASCII)

# Why an option is refused, and what to do instead.
_OF_PUBLISHERS = {
    "keys": "CurveZMQ keys are for sockets; a sealed store has a key of its own (key=, a file named by --key-file)",
    "transport": "a store has files, and no transports to choose from; leave it out",
    "share": "each worker reads a store by itself, into a copy of its own; leave it out",
    "device": "versions of a store are staged in host memory; leave it out",
    "want": "versions of a store are read whole; leave it out",
    "into": "versions of a store are staged before an engine loads them; leave it out",
    "prepares": "versions of a store are not looked at before they are taken; leave it out",
}
_OF_STORES = {
    "key": "it unseals a store's files; sockets have CurveZMQ keys (keys=, a file named by --keys)",
    "serving": "a publisher tells by itself which versions are newer; leave it out",
    "report": "a publisher's engines always say what they serve; leave it out",
    "agree": "a publisher's engines always agree, by its policy; leave it out",
}
_OF_RECEIVERS = dict.fromkeys(
    ("expect", "serving", "report", "limits"), "an observer of a store reads no tensors; leave it out"
)


def kind_of(address: str | os.PathLike[str]) -> PlaceKind:
    """Whether an address is a publisher's or a store's. Pure.

    Raises `AddressError` for one that is empty, a publisher's that is malformed, and `HOST:PORT` without `tcp://`.
    """
    text = os.fspath(address)
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() in ("tcp", "ipc"):
        parse_address(text)
        return "publisher"
    if not text.strip():
        raise AddressError("the address is empty; use tcp://HOST:PORT, ipc:///PATH, a folder, or a URL such as s3://")
    if scheme is None and _HOST_AND_PORT.fullmatch(text):
        raise AddressError(f"{text!r} is neither an address nor a folder; did you mean 'tcp://{text}', or './{text}'?")
    return "store"


def follow(
    address: str | os.PathLike[str],
    *,
    engine: str | None = None,
    expect: Sequence[TensorSpec] | None = None,
    role: Role = "receiver",
    limits: Limits | DiskLimits | None = None,
    keys: CurveKeys | None = None,
    transport: str | None = None,
    share: str | HostShare | None = None,
    device: str | torch.device | None = None,
    want: Want | None = None,
    prepares: bool = False,
    into: Mapping[str, torch.Tensor] | None = None,
    key: bytes | None = None,
    serving: Version | None = None,
    report: bool | None = None,
    agree: bool | None = None,
) -> WeightSubscriber | DiskSubscriber | DiskObserver:
    """A `WeightSubscriber` of a publisher, a `DiskSubscriber` of a store, or an observer of either.

    `engine`, `expect`, `role` and `limits` are for both; `key`, `serving`, `report` and `agree` for stores; all others
    for publishers. See the classes. Raises `AddressError`, and `ConfigError` for an option that does not apply.
    """
    if kind_of(address) == "publisher":
        _refuse(address, _OF_STORES, {"key": key, "serving": serving, "report": report, "agree": agree})
        if isinstance(limits, DiskLimits):
            raise ConfigError(f"limits: {address} is a publisher's, which takes sync.Limits, not DiskLimits")
        return WeightSubscriber(
            os.fspath(address),
            engine=engine,
            expect=expect,
            role=role,
            keys=keys,
            limits=limits,
            transport="auto" if transport is None else transport,
            share=share,
            device=device,
            want=want,
            prepares=prepares,
            into=into,
        )
    given = {"keys": keys, "transport": transport, "share": share, "device": device, "want": want}
    _refuse(address, _OF_PUBLISHERS, given | {"prepares": prepares or None, "into": into})
    if isinstance(limits, Limits):
        raise ConfigError(f"limits: {address} is a store's, which takes sync.DiskLimits, not Limits")
    place: str | Path = address if isinstance(address, str) else Path(address)
    if role == "observer":
        _refuse(address, _OF_RECEIVERS, {"expect": expect, "serving": serving, "report": report, "limits": limits})
        return DiskObserver(place, engine=engine, key=key, agree=agree)
    return DiskSubscriber(
        place,
        engine=engine,
        expect=expect,
        serving=serving,
        report=bool(report),
        limits=limits,
        key=key,
        agree=agree,
    )


def _refuse(address: str | os.PathLike[str], reasons: dict[str, str], given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} does not apply to {os.fspath(address)}: {reasons[name]}")
