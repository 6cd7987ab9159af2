"""Writers that are killed, and disks that are full: what was there stays, and nothing half written is ever taken."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.ranks import ROOT
from tests.sync.disk_job import count_calls, make_writer
from tests.sync.disk_parts import QUICK, clone, disk_publishers, folder_of, publish_all, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import DiskPublisher, DiskSubscriber, Region
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.errors import DeadlineExceeded, PeerLost, StorageError


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: the order of syncs is the next test's business."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def states() -> dict[int, dict[str, torch.Tensor]]:
    """What versions 1 to 6 of the victim hold."""
    tensors = make_model(1, 16)
    made = {}
    for number in range(1, 7):
        step(tensors, number)
        made[number] = clone(tensors)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("delta", ["zstd", "off"])
def test_a_writer_killed_at_any_call_leaves_the_last_whole_version(delta: str, quick_folder: Path) -> None:
    tmp_path = quick_folder
    command = [sys.executable, "-m", "tests.sync.disk_job", "sweep", str(tmp_path), delta]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1]["said"] == ["published", "published"] and not lines[-1]["killed"], done.stderr
    assert len(lines) > 40 and {line["said"][-1] for line in lines[:-1]} >= {
        "mkdir",
        "open",
        "write",
        "fsync",
        "rename",
    }
    wanted = states()
    for line in lines:
        root, published = tmp_path / str(line["at"]), line["said"].count("published")
        listing = list_versions(root, check=True)
        assert listing.faults == (), line
        numbers = [row.version.number for row in listing.versions]
        # The version that was being written is whole or not there; what was published before always is.
        assert numbers[-1] in (4 + published, 5 + published), line
        assert all(row.route is not None for row in listing.versions if row.version.number >= 4), line
        with DiskSubscriber(root, limits=QUICK) as subscriber:
            update = subscriber.wait(WAIT_S)
            assert update.version.number == numbers[-1]
            assert_same_bits(dict(update), wanted[numbers[-1]])
        if line["at"] % 5 == 0:  # the next life of the trainer takes over and clears away
            publish, tensors = make_writer(root, delta)
            publish(7)
            assert list_versions(root, check=True).unfinished == ()
            assert not [path for path in root.rglob(".tmp-*")]
            with DiskSubscriber(root, limits=QUICK) as subscriber:
                take(subscriber, tensors, 7)


def test_files_are_synced_before_they_are_named_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    publish, _ = make_writer(tmp_path, "auto")
    publish(1)
    with monkeypatch.context() as patch:
        for name in ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, getattr(os, name))  # so that they are put back
        count_calls(lambda number, name: calls.append(name))
        publish(2)
    text = " ".join(calls)
    written = [part for part in text.split("rename") if "write" in part]
    assert text.count("rename") == 2 == len(written)  # the delta file and the manifest
    for part in written:
        assert part.rstrip().endswith("fsync") and part.rindex("write") < part.rindex("fsync")
    assert all(part.lstrip().startswith("fsync") for part in text.split("rename")[1:])


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may be larger: a disk that is full in the middle of a write."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


@pytest.mark.parametrize("limit_bytes", [3000, 300, 10])
def test_a_full_disk_says_so_and_costs_no_earlier_version(limit_bytes: int, tmp_path: Path) -> None:
    tensors = make_model(1, 100)
    with DiskPublisher(TensorSource(tensors), tmp_path, delta="off") as publisher:
        publisher.publish(1)
        before = clone(tensors)
        step(tensors, 1)
        with (
            file_limit(limit_bytes),
            pytest.raises(StorageError, match=r"could not be written: File too large; .* Make room"),
        ):
            publisher.publish(2)
        assert [row.version.number for row in list_versions(tmp_path, check=True).versions] == [1]
        assert not list(tmp_path.rglob(".tmp-*")) and not list(tmp_path.rglob("*-00000002/*.safetensors"))
        with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
            take(subscriber, before, 1)
            publisher.publish(3)
            take(subscriber, tensors, 3)
        assert list_versions(tmp_path).unfinished == ()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting needs rights that this process lacks; the limits above stand for a full disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    tensors = make_model(1, 300)  # 50 KiB
    with DiskPublisher(TensorSource(tensors), small_disk, delta="off", keep=1) as publisher:
        publisher.publish(1)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(120 << 10))
        step(tensors, 1)
        with pytest.raises(StorageError, match="No space left on device; every earlier version is as it was"):
            publisher.publish(2)
        assert [row.version.number for row in list_versions(small_disk, check=True).versions] == [1]
        filler.unlink()
        for number in range(3, 12):  # with room for two, old ones go in time
            publisher.publish(number)
        with DiskSubscriber(small_disk, limits=QUICK) as subscriber:
            take(subscriber, tensors, 11)


def test_a_full_disk_of_one_rank_is_told_to_the_others(tmp_path: Path) -> None:
    tensors = make_model(1, 100)
    names = list(tensors)
    wholes = {name: Region(name, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in tensors.items()}
    shares = [[wholes[name] for name in names[:1]], [wholes[name] for name in names[1:]]]
    with disk_publishers(tensors, shares, tmp_path, timeout_s=WAIT_S) as made:
        publish_all(made, 1)
        copy = made[1]._copy
        assert copy is not None
        write = made[1]._store.write

        def full(folder: str, name: str, buffers: object) -> None:
            if name.endswith(".safetensors"):
                with file_limit(100):  # of the whole process, so only while this rank writes
                    write(folder, name, buffers)  # type: ignore[arg-type]
            write(folder, name, buffers)  # type: ignore[arg-type]

        made[1]._store.write = full  # type: ignore[method-assign]
        step(tensors, 1)
        zero, one = publish_all(made, 2)
        assert isinstance(one, StorageError) and isinstance(zero, PeerLost), (zero, one)
        assert "source rank 1 failed: StorageError" in str(zero) and "File too large" in str(zero)
        made[1]._store.write = write  # type: ignore[method-assign]
        publish_all(made, 3)
        with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
            take(subscriber, tensors, 3)
        assert len(list_versions(tmp_path, check=True).versions) == 2


def test_a_rank_that_does_not_come_meets_the_deadline(tmp_path: Path) -> None:
    tensors = make_model(1)
    wholes = [Region(name, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in tensors.items()]
    with disk_publishers(tensors, [wholes, wholes], tmp_path, timeout_s=0.3) as made:
        with pytest.raises(DeadlineExceeded, match=r"for the source ranks \[1\] to join"):
            made[0].publish(1)
        with pytest.raises(DeadlineExceeded, match=r"source rank 1 waited .* for rank 0 to"):
            made[1].publish(1)
        publish_all(made, 2, timeout_s=WAIT_S)
        with pytest.raises(DeadlineExceeded, match=r"parts of version 3 .* from the source ranks \[1\]"):
            made[0].publish(3)
        with pytest.raises(DeadlineExceeded, match=r"rank 0 to begin version 4; every rank must publish it"):
            made[1].publish(4)
        assert [row.version.number for row in list_versions(tmp_path, check=True).versions] == [2]
        reports = publish_all(made, 5, timeout_s=WAIT_S)
        assert not [report for report in reports if isinstance(report, Exception)], reports
        with DiskSubscriber(tmp_path, limits=QUICK) as subscriber:
            take(subscriber, tensors, 5)
    assert folder_of(tmp_path, 5).is_dir()
