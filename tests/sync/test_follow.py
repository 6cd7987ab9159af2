"""Following by address: which kind of place it is, what does not apply to it, and versions from each."""

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from tests.sync.disk_parts import QUICK, step, take
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import (
    CurveKeys,
    DiskLimits,
    DiskObserver,
    DiskPublisher,
    DiskSubscriber,
    Limits,
    Version,
    WeightPublisher,
    WeightSubscriber,
    follow,
    kind_of,
)
from weightcast.sync.errors import AddressError, ConfigError


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("tcp://127.0.0.1:5600", "publisher"),
        ("tcp://[::1]:5600", "publisher"),
        ("ipc:///tmp/weights", "publisher"),
        ("/shared/versions", "store"),
        ("versions", "store"),
        ("./127.0.0.1:5600", "store"),
        (Path("versions"), "store"),
        ("file:///shared/versions", "store"),
        ("s3://bucket/versions", "store"),
        ("gs://bucket/versions", "store"),
        ("memory://versions", "store"),
    ],
)
def test_an_address_says_what_kind_of_place_it_is(address: str | Path, kind: str) -> None:
    assert kind_of(address) == kind


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "the address is empty"),
        ("  ", "the address is empty"),
        ("127.0.0.1:5600", "did you mean 'tcp://127.0.0.1:5600'"),
        ("trainer-0:5600", "did you mean 'tcp://trainer-0:5600'"),
        ("tcp://127.0.0.1", "cannot read the address"),
        ("ipc://relative", "cannot read the address"),
    ],
)
def test_a_wrong_address_is_explained(address: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        kind_of(address)
    with pytest.raises(AddressError, match=message):
        follow(address)


KEYS = CurveKeys(b"p" * 40, b"s" * 40, b"v" * 40)


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("versions", {"keys": KEYS}, r"^keys does not apply to versions: .* a key of its own \(key="),
        ("versions", {"transport": "zmq"}, "^transport does not apply to versions: .* leave it out"),
        ("s3://b/v", {"share": "group"}, "^share does not apply to s3://b/v: each worker reads a store by itself"),
        ("versions", {"device": "cuda"}, "^device does not apply to versions"),
        ("versions", {"into": {}}, "^into does not apply to versions"),
        ("versions", {"limits": Limits()}, "takes sync.DiskLimits, not Limits"),
        ("versions", {"role": "observer", "expect": []}, "^expect does not apply to versions: an observer of a store"),
        ("tcp://127.0.0.1:1", {"key": b"k" * 32}, r"^key does not apply to tcp://.* CurveZMQ keys \(keys="),
        ("tcp://127.0.0.1:1", {"serving": Version(1, 1)}, "^serving does not apply to tcp://"),
        ("tcp://127.0.0.1:1", {"report": True}, "^report does not apply to tcp://"),
        ("ipc:///tmp/w", {"agree": True}, "^agree does not apply to ipc:///tmp/w: a publisher's engines always agree"),
        ("tcp://127.0.0.1:1", {"limits": DiskLimits()}, "takes sync.Limits, not DiskLimits"),
        ("nowhere://bucket/versions", {}, "nowhere://bucket/versions cannot be reached by fsspec"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(address: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        follow(address, **options)


@pytest.mark.parametrize("form", ["folder", "relative", "file", "memory"])
def test_a_store_is_followed_by_its_folder_or_url(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places: dict[str, Any] = {
        "folder": tmp_path / "store",
        "relative": "store",
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{uuid.uuid4().hex}/store",
    }
    place, tensors, key = places[form], make_model(1, 100), os.urandom(32)
    with (
        DiskPublisher(TensorSource(tensors), place, key=key) as publisher,
        follow(place, engine="one", key=key, limits=QUICK, expect=TensorSource(tensors).specs()) as subscriber,
        follow(place, role="observer", key=key) as observer,
    ):
        assert isinstance(subscriber, DiskSubscriber) and isinstance(observer, DiskObserver)
        for number in (1, 2):
            report = publisher.publish(number)
            take(subscriber, tensors, number)
            update = observer.wait(WAIT_S)
            assert (update.version, list(update)) == (report.version, [])
            update.commit()
            step(tensors, number)
    fsspec.filesystem("memory").store.clear()


def test_a_publisher_is_followed_by_its_address(tmp_path: Path) -> None:
    tensors, address = make_model(1, 100), f"ipc://{tmp_path}/weights"
    torch.manual_seed(0)
    with (
        WeightPublisher(TensorSource(tensors), address) as publisher,
        follow(address, engine="one", transport="zmq", limits=LIMITS) as subscriber,
    ):
        assert isinstance(subscriber, WeightSubscriber)
        publisher.wait_for_subscribers(1, WAIT_S)
        publication = publisher.begin(1)
        update = subscriber.wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        assert update.stats.transport == "zmq"
        update.commit()
        assert publication.wait().serving == ("one",)
