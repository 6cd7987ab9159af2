"""Stores that fsspec reaches: the same versions, without rename and fsync."""

import builtins
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tests.sync.disk_parts import QUICK, clone, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import DiskPublisher, DiskSubscriber, materialize
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.disk.remote import FsspecStore
from weightcast.sync.disk.store import FolderStore, Store, open_store
from weightcast.sync.errors import ConfigError, DamagedVersion, StorageError, VersionError


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place of each kind, through fsspec; the one in memory is emptied afterwards."""
    if request.param == "file":
        yield f"local://{tmp_path}/store"
        return
    root = f"memory://{uuid.uuid4().hex}/store"
    yield root
    fsspec.filesystem("memory").store.clear()


def test_versions_are_written_and_followed(url: str, tmp_path: Path) -> None:
    tensors = make_model(1, 300)
    with (
        DiskPublisher(TensorSource(tensors), url, anchor_every=3, keep=2) as publisher,
        DiskSubscriber(url, limits=QUICK, report=True, engine="far") as subscriber,
    ):
        assert isinstance(publisher._store, FsspecStore)
        for number in range(1, 8):
            report = publisher.publish(number)
            assert report.is_anchor == (number in (1, 4, 7))
            take(subscriber, tensors, number)
            last = clone(tensors)
            step(tensors, number)
    listing = list_versions(url, check=True)
    assert [row.version.number for row in listing.versions] == [4, 5, 6, 7] and listing.faults == ()
    assert [(status.engine, status.serving) for status in listing.engines] == [("far", report.version)]
    with DiskSubscriber(url, limits=QUICK) as late:
        take(late, last, 7)
    materialize(url, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_a_later_publisher_fences_the_earlier(url: str) -> None:
    tensors = make_model(1, 100)
    with DiskPublisher(TensorSource(tensors), url) as old:
        old.publish(1)
        with DiskPublisher(TensorSource(tensors), url) as new, DiskSubscriber(url, limits=QUICK) as subscriber:
            new.publish(1)
            take(subscriber, tensors, 1)
            with pytest.raises(VersionError, match="is fenced"):
                old.publish(2)


@pytest.mark.parametrize(
    ("file", "message"),
    [("delta-r00000-00000.safetensors", "altered"), ("manifest.weightcast", "fails its own seal")],
)
def test_damage_is_found(file: str, message: str, url: str) -> None:
    tensors = make_model(1, 100)
    with DiskPublisher(TensorSource(tensors), url) as publisher:
        publisher.publish(1)
        before = clone(tensors)
        step(tensors, 1)
        folder = publisher.publish(2).place.rsplit("/", 1)[1]
    filesystem, root = fsspec.core.url_to_fs(url)
    raw = bytearray(filesystem.cat_file(f"{root}/{folder}/{file}"))
    raw[-2] ^= 1
    filesystem.pipe_file(f"{root}/{folder}/{file}", bytes(raw))
    with DiskSubscriber(url, limits=QUICK) as subscriber:
        with pytest.raises(DamagedVersion, match=f"{file} of version 2 .*{message}"):
            subscriber.wait(WAIT_S)
        take(subscriber, before, 1)


def test_a_manifest_that_is_cut_short_is_not_whole_yet(url: str) -> None:
    tensors = make_model(1, 100)
    with DiskPublisher(TensorSource(tensors), url) as publisher:
        folder = publisher.publish(1).place.rsplit("/", 1)[1]
    filesystem, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{folder}/manifest.weightcast"
    raw = filesystem.cat_file(path)
    with DiskSubscriber(url, limits=QUICK) as subscriber:
        filesystem.pipe_file(path, raw[: len(raw) // 2])
        assert [row for row in list_versions(url).versions] == []
        filesystem.pipe_file(path, raw)
        take(subscriber, tensors, 1)


class Full(FsspecStore):
    """A store that takes no more data files."""

    full = False

    def write(self, folder: str, name: str, buffers: Any) -> None:
        def run_out() -> Iterator[bytes]:
            for buffer in buffers:
                yield bytes(buffer)[:10]
                raise OSError(28, "No space left on device")

        super().write(folder, name, run_out() if self.full and name.endswith(".safetensors") else buffers)


def test_a_store_that_is_full_keeps_what_it_has(url: str) -> None:
    tensors = make_model(1, 100)
    store = Full(url)
    with DiskPublisher(TensorSource(tensors), store) as publisher:
        publisher.publish(1)
        before = clone(tensors)
        step(tensors, 1)
        store.full = True
        with pytest.raises(StorageError, match="No space left on device; every earlier version is as it was"):
            publisher.publish(2)
        with DiskSubscriber(url, limits=QUICK) as subscriber:
            update = subscriber.wait(WAIT_S)
            assert_same_bits(dict(update), before)
        store.full = False
        publisher.publish(3)
        assert [row.version.number for row in list_versions(url, check=True).versions] == [1, 3]


def test_the_extra_is_named_where_fsspec_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "fsspec":
            raise ImportError("No module named 'fsspec'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "fsspec", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'weightcast\[disk-remote\]'"):
        open_store("memory://x")


def test_a_protocol_whose_package_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"adl://x cannot be reached by fsspec: .*"):
        open_store("adl://x")


def test_which_store_a_place_is(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), FolderStore) and open_store(str(tmp_path)).url == str(tmp_path)
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore) and open_store(f"file://{tmp_path}").url == str(
        tmp_path
    )
    store: Store = open_store("memory://x/y")
    assert isinstance(store, FsspecStore) and open_store(store) is store


class Shaky(FsspecStore):
    """A store whose network fails for a while."""

    fails = 0

    def open(self, folder: str, name: str, num_bytes: int | None = None) -> Any:
        if self.fails and name.endswith(".safetensors"):
            self.fails -= 1
            raise TimeoutError("timed out")
        return super().open(folder, name, num_bytes)


def test_a_network_that_fails_for_a_while_spoils_nothing(url: str) -> None:
    tensors = make_model(1, 100)
    store = Shaky(url)
    with DiskPublisher(TensorSource(tensors), url) as publisher:
        publisher.publish(1)
    store.fails = 1000
    with DiskSubscriber(store, limits=QUICK) as subscriber:
        with pytest.raises(
            StorageError, match=r"model-r00000-00000.safetensors cannot be read now: timed out; it is tried"
        ):
            subscriber.wait(WAIT_S)
        store.fails = 1
        while True:
            try:
                update = subscriber.wait(WAIT_S)
                break
            except StorageError:
                continue
        assert_same_bits(dict(update), tensors)
        assert subscriber.spoiled == ()
