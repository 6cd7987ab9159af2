"""Stored versions that are damaged: named, refused, never used again, and healed by the next anchor."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.sync.disk_parts import QUICK, clone, folder_of, read_manifest, step, take, write_manifest
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import DiskLimits, DiskPublisher, DiskSubscriber, materialize
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.disk.records import Hashing
from weightcast.sync.errors import DamagedVersion, DeadlineExceeded

ROWS = 300
DELTA_FILE = "delta-r00000-00000.safetensors"
DENSE_FILE = "model-r00000-00000.safetensors"


def flip(path: Path, place: int = -3) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(bytes(raw))


def relink(path: Path) -> None:
    """Put a link in the file's place that leads to a copy of it elsewhere."""
    copy = path.parent.parent / "elsewhere"
    shutil.move(path, copy)
    path.symlink_to(copy)


def pipe(path: Path) -> None:
    """A reader that opened a named pipe would hang for ever."""
    path.unlink()
    os.mkfifo(path)


def swap_in_older(path: Path) -> None:
    """The file of the version before, as a careless copy would leave it."""
    older = folder_of(path.parent.parent, int(path.parent.name.split("-")[1]) - 1) / path.name
    shutil.copy(older, path)


def make_folder(path: Path) -> None:
    """A folder under the file's name."""
    path.unlink()
    path.mkdir()


DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "the file is missing"),
    "cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        r"the file is cut short: it has \d+ bytes, \d+ were",
    ),
    "empty": (lambda path: path.write_bytes(b""), "the file is cut short: it has 0 bytes"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "the file is another"),
    "one bit": (flip, "the file was altered: it does not have the xxh3_128 hash"),
    "one bit of its header": (lambda path: flip(path, 12), "the file was altered"),
    "another version's": (swap_in_older, "the file (was altered|is another|is cut short)"),
    "a link": (relink, "the file cannot be read: Too many levels of symbolic links"),
    "a named pipe": (pipe, "the file cannot be read: it is no plain file"),
    "a folder": (make_folder, "the file cannot be read"),
}


@pytest.mark.parametrize("case", DATA)
def test_a_damaged_delta_is_named_the_copy_stays_and_an_anchor_heals(case: str, tmp_path: Path) -> None:
    spoil, message = DATA[case]
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path, anchor_every=5) as publisher:
        for number in (1, 2):
            publisher.publish(number)
            step(tensors, number, 97 + number)
        with DiskSubscriber(tmp_path, engine="e", limits=QUICK) as subscriber:
            update = subscriber.wait(WAIT_S)
            kept = dict(update)
            before = clone(kept)
            publisher.publish(3)
            spoil(folder_of(tmp_path, 3) / DELTA_FILE)
            update.commit()
            with pytest.raises(DamagedVersion, match=f"{DELTA_FILE} of version 3 .*: {message}.* next anchor heals it"):
                subscriber.wait(WAIT_S)
            assert_same_bits(kept, before)
            assert [version.number for version in subscriber.spoiled] == [3]
            # What is upon it is out of reach, without another error, also when the file is well again.
            step(tensors, 3)
            publisher.publish(4)
            with pytest.raises(DeadlineExceeded, match="no whole version newer than 2"):
                subscriber.wait(0.3)
            step(tensors, 4)
            publisher.publish(5)  # not yet an anchor
            step(tensors, 5)
            publisher.publish(6)
            take(subscriber, tensors, 6)
            step(tensors, 6)
            publisher.publish(7)
            take(subscriber, tensors, 7)


@pytest.mark.parametrize("case", DATA)
def test_a_damaged_anchor_is_named_and_passed_by(case: str, tmp_path: Path) -> None:
    spoil, message = DATA[case]
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path, anchor_every=2, keep=9) as publisher:
        for number in (1, 2, 3):
            publisher.publish(number)
            step(tensors, number)
        wanted = clone(tensors)
        with DiskSubscriber(tmp_path, engine="held", limits=QUICK) as follower:
            update = follower.wait(WAIT_S)
            publisher.publish(4)
            step(tensors, 4)
            publisher.publish(5)  # an anchor, with a delta upon 4
            if case == "another version's":
                shutil.copy(folder_of(tmp_path, 3) / DENSE_FILE, folder_of(tmp_path, 5) / DENSE_FILE)
            else:
                spoil(folder_of(tmp_path, 5) / DENSE_FILE)
            update.commit()
            final = follower.wait(WAIT_S)
            while final.version.number < 5:
                final.commit()
                final = follower.wait(WAIT_S)
            assert_same_bits(dict(final), tensors)  # it came by deltas, and never looked at the anchor
        with DiskSubscriber(tmp_path, engine="late", limits=QUICK) as late:
            with pytest.raises(DamagedVersion, match=f"{DENSE_FILE} of version 5 .*: {message}"):
                late.wait(WAIT_S)
            take(late, tensors, 5)  # from the anchor before, by three deltas
    assert wanted


MANIFESTS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "missing": (lambda path: path.unlink(), None),
    "being written": (lambda path: path.write_bytes(path.read_bytes()[:40]), None),
    "empty": (lambda path: path.write_bytes(b""), None),
    "one bit": (flip, "fails its own seal"),
    "another program's": (lambda path: path.write_bytes(b"{}" * 40), "no record of weightcast"),
    "a link": (relink, "Too many levels of symbolic links"),
    "another version's": (swap_in_older, "moved into the folder"),
    "huge": (lambda path: os.truncate(path, 1 << 40), r"it has 1099511627776 bytes, at most \d+ are read"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_damaged_manifest_is_no_version(case: str, tmp_path: Path) -> None:
    spoil, message = MANIFESTS[case]
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path, anchor_every=3) as publisher:
        publisher.publish(1)
        before = clone(tensors)
        step(tensors, 1)
        publisher.publish(2)
        spoil(folder_of(tmp_path, 2) / "manifest.weightcast")
        with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
            if message is not None:
                with pytest.raises(DamagedVersion, match=f"manifest.weightcast of version 2 .*: .*{message}"):
                    subscriber.wait(WAIT_S)
            take(subscriber, before, 1)
            with pytest.raises(DeadlineExceeded):
                subscriber.wait(0.2)
    listing = list_versions(tmp_path, check=True)
    assert [row.version.number for row in listing.versions] == [1]
    assert len(listing.damaged) == (message is not None) and len(listing.unfinished) == (message is None)


def reseal(folder: Path, change: Callable[[Path], object]) -> None:
    """Alter a data file and make the manifest agree: a fault of the writer, which only digests and checks can see."""
    change(folder)
    manifest = read_manifest(folder)
    files = []
    for file in manifest.files:
        raw = (folder / file.name).read_bytes()
        files.append(replace(file, num_bytes=len(raw), hash=Hashing().of(raw)))
    write_manifest(folder, replace(manifest, files=tuple(files)))


def test_wrong_bits_behind_sound_hashes_are_found_by_digest(tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path, keep=9, anchor_every=4) as publisher:
        for number in (1, 2, 3):
            publisher.publish(number)
            step(tensors, number)
        reseal(folder_of(tmp_path, 3), lambda folder: flip(folder / DELTA_FILE, -1))
        with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
            with pytest.raises(DamagedVersion, match=r"version 3 .*: (tensor .* has the digest 0x|the delta of )"):
                subscriber.wait(WAIT_S)
            assert subscriber.wait(WAIT_S).version.number == 2
    assert [bool(row.faults) for row in list_versions(tmp_path, check=True).versions] == [False, False, True]
    with pytest.raises(DamagedVersion):
        materialize(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_malformed_delta_is_refused_before_a_byte_changes(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(1000, dtype=torch.bfloat16)}
    with DiskPublisher(TensorSource(tensors), tmp_path, keep=9) as publisher:
        publisher.publish(1)
        tensors["w"][::50] = 1.0
        publisher.publish(2)
    start = read_manifest(folder_of(tmp_path, 2)).delta[0].start_byte

    def point_outside(folder: Path) -> None:
        raw = np.frombuffer((folder / DELTA_FILE).read_bytes(), np.uint8).copy()
        raw[-40:-20] = 254  # gaps that lead past the end of the tensor
        (folder / DELTA_FILE).write_bytes(raw.tobytes())

    assert start > 0
    reseal(folder_of(tmp_path, 2), point_outside)
    with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
        with pytest.raises(DamagedVersion, match=r"the delta of w: a delta reaches to element .* of an array of 1000"):
            subscriber.wait(WAIT_S)
        assert subscriber.wait(WAIT_S).version.number == 1


def test_a_staged_copy_that_an_engine_wrote_to_is_made_anew(tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        publisher.publish(1)
        update = subscriber.wait(WAIT_S)
        dict(update)["layer.0.codes"].add_(1)
        update.commit()
        del update
        step(tensors, 1)
        publisher.publish(2)
        update = subscriber.wait(WAIT_S)
        assert_same_bits(dict(update), tensors)
        assert [taken.kind for taken in update.stats.route] == ["dense", "delta"]
        assert subscriber.spoiled == ()


def test_a_model_too_large_for_the_engine_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path) as publisher:
        publisher.publish(1)
    for limits, message in (
        (DiskLimits(max_model_bytes=1000, poll_s=0.01), r"its model takes \d+ bytes, at most 1000 are allowed here"),
        (DiskLimits(max_tensors=3, poll_s=0.01), "it lists 8 tensors, at most 3 are allowed"),
    ):
        with (
            DiskSubscriber(tmp_path, limits=limits) as subscriber,
            pytest.raises(DamagedVersion, match=message),
        ):
            subscriber.wait(WAIT_S)


def test_links_in_the_store_lead_nowhere(tmp_path: Path) -> None:
    root, other = tmp_path / "store", tmp_path / "other"
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), other) as publisher:
        publisher.publish(5)
    root.mkdir()
    (root / folder_of(other, 5).name).symlink_to(folder_of(other, 5))
    with (
        DiskSubscriber(root, limits=QUICK) as subscriber,
        pytest.raises(DeadlineExceeded, match="no whole version yet"),
    ):
        subscriber.wait(0.2)
    with DiskPublisher(TensorSource(tensors), root, keep=1, anchor_every=1) as publisher:
        publisher.publish(6)
        publisher.publish(7)
    assert (folder_of(other, 5) / "manifest.weightcast").exists()


def test_versions_that_are_pruned_while_an_engine_reads_are_no_damage(tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, keep=1, anchor_every=2) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        deadline_s = time.monotonic() + 4
        number = taken = 0
        while time.monotonic() < deadline_s and number < 60:
            number += 1
            step(tensors, number)
            publisher.publish(number)
            try:
                update = subscriber.wait(0.001)
            except DeadlineExceeded:
                continue
            taken += 1
            update.commit()
        while subscriber.serving is None or subscriber.serving.number < number:
            update = subscriber.wait(WAIT_S)
            if update.version.number == number:
                assert_same_bits(dict(update), tensors)
            update.commit()
        assert subscriber.spoiled == () and taken
