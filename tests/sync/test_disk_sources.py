"""Many sources write one store: cut regions, replicas, restarts, processes of their own; no collective is issued."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import ROOT
from tests.sync.disk_job import cut_columns
from tests.sync.disk_parts import QUICK, disk_publishers, folder_of, publish_all, read_manifest, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model, make_specs, split_rows
from tests.sync.test_no_collectives import no_collectives  # noqa: F401  (a fixture)

from weightcast.sync import DiskPublisher, DiskReport, DiskSubscriber, Region, materialize
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.errors import CheckpointMismatch, DeadlineExceeded, PeerLost, SourceError, VersionError


def shares_of(kind: str, tensors: dict[str, torch.Tensor]) -> list[list[Region]]:
    """The regions of each rank: whole tensors dealt out, rows, columns (both with replicas), or all on every rank."""
    specs = make_specs(tensors)
    if kind == "pipeline":
        return [[spec.whole() for spec in specs[start::3]] for start in range(3)]
    if kind == "rows":
        cuts = [split_rows(spec, 2) for spec in specs]
        return [[cut[rank] for cut in cuts] for rank in range(2)]
    if kind == "columns":
        return cut_columns(tensors, 3)
    return [[spec.whole() for spec in specs]] * 2


@pytest.mark.parametrize("delta", ["auto", "zstd"])
@pytest.mark.parametrize("kind", ["pipeline", "rows", "columns", "replicas"])
def test_every_cut_of_a_model_comes_together(kind: str, delta: str, tmp_path: Path) -> None:
    tensors = make_model(3, 500)
    root = tmp_path / "store"
    with (
        disk_publishers(tensors, shares_of(kind, tensors), root, delta=delta, anchor_every=3) as made,
        DiskSubscriber(root, limits=QUICK) as subscriber,
    ):
        for number in range(1, 5):
            reports = publish_all(made, number)
            assert all(isinstance(report, DiskReport) for report in reports), reports
            versions = {(report.version, report.is_anchor) for report in reports}  # type: ignore[attr-defined]
            assert len(versions) == 1
            assert [source.rank for source in reports[0].sources] == list(range(len(made)))  # type: ignore[attr-defined]
            take(subscriber, tensors, number)
            step(tensors, number)
    is_whole = kind in ("pipeline", "replicas")
    for row in list_versions(root, check=True).versions:
        assert row.faults == () and row.is_hf_folder == (row.is_anchor and is_whole)
        if not is_whole:
            with pytest.raises(CheckpointMismatch):
                open_checkpoint(root / row.folder)
    materialize(root, tmp_path / "hf", version=4)
    wanted = make_model(3, 500)
    for number in range(1, 4):
        step(wanted, number)
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same_bits({name: loaded[name] for name in wanted}, wanted)


def test_replicas_share_the_work(tmp_path: Path) -> None:
    tensors = make_model(3, 500)
    with disk_publishers(tensors, shares_of("replicas", tensors), tmp_path) as made:
        report: Any = publish_all(made, 1)[0]
    sizes = [source.dense_bytes for source in report.sources]
    assert sum(sizes) == report.model_bytes and min(sizes) > 0.25 * sum(sizes)
    manifest = read_manifest(folder_of(tmp_path, 1))
    assert {file.name[:12] for file in manifest.files} == {"model-r00000", "model-r00001", "model.safete"}


def test_ranks_that_do_not_make_a_model_are_told(tmp_path: Path) -> None:
    tensors = make_model(3)
    specs = make_specs(tensors)
    with disk_publishers(tensors, [[specs[0].whole()], [specs[1].whole()]], tmp_path, timeout_s=1.0) as made:
        zero, one = publish_all(made, 1)
        assert isinstance(zero, SourceError) and "do not make a whole model" in str(zero)
        assert isinstance(one, DeadlineExceeded)
    with DiskPublisher(TensorSource(tensors, 0, 2), tmp_path, timeout_s=2.0) as zero_of_two:
        other = TensorSource(make_model(3, rows=65), 1, 2)
        with DiskPublisher(other, tmp_path, timeout_s=1.0) as one_of_two:
            zero, one = publish_all([zero_of_two, one_of_two], 1)
            assert isinstance(zero, DeadlineExceeded) and "ranks [1] to join" in str(zero)
            assert isinstance(one, DeadlineExceeded)


def test_a_rank_that_lost_its_base_writes_all_it_has(tmp_path: Path) -> None:
    tensors = make_model(3, 200)
    with (
        disk_publishers(tensors, shares_of("rows", tensors), tmp_path, timeout_s=WAIT_S) as made,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        publish_all(made, 1)
        take(subscriber, tensors, 1)
        # As when it gave up waiting for a manifest that was written after all.
        made[1]._held = None
        step(tensors, 1)
        report: Any = publish_all(made, 2)[0]
        assert report.has_delta and report.sources[1].delta_bytes > 10 * report.sources[0].delta_bytes
        take(subscriber, tensors, 2)
        step(tensors, 2)
        report = publish_all(made, 3)[0]
        assert report.sources[1].delta_bytes < 3 * report.sources[0].delta_bytes
        take(subscriber, tensors, 3)


def test_a_job_that_is_restarted_meets_anew_beside_the_traces_of_the_old(tmp_path: Path) -> None:
    tensors = make_model(3, 200)
    shares = shares_of("rows", tensors)
    with disk_publishers(tensors, shares, tmp_path, timeout_s=WAIT_S) as old:
        publish_all(old, 1)
        # Rank 1 of the new job is there first, and finds only the old run.
        with (
            disk_publishers(tensors, shares, tmp_path, timeout_s=WAIT_S) as new,
            DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
        ):
            take(subscriber, tensors, 1)
            step(tensors, 1)
            results = publish_all(new[::-1], 1)
            assert all(isinstance(result, DiskReport) for result in results), results
            take(subscriber, tensors, 1)
            for result in publish_all(old, 2, timeout_s=2.0):
                assert isinstance(result, VersionError) and "is fenced" in str(result)
        assert len([path for path in tmp_path.iterdir() if path.name.startswith("run-")]) >= 1


def test_publishing_issues_no_collective(no_collectives: None, tmp_path: Path) -> None:  # noqa: F811
    tensors = make_model(41)
    with (
        disk_publishers(tensors, shares_of("rows", tensors), tmp_path) as made,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        for number in (1, 2):
            publish_all(made, number)
            take(subscriber, tensors, number)
            step(tensors, number)


@contextmanager
def source_process(root: Path, rank: int) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "tests.sync.disk_job", "source", str(root), str(rank)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=env, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: "subprocess.Popen[str]", number: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.mark.slow
def test_two_processes_write_and_one_is_killed(tmp_path: Path) -> None:
    wanted = make_model(1, 300)
    with (
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
        source_process(tmp_path, 0) as zero,
        source_process(tmp_path, 1) as one,
    ):
        assert hear(zero) == hear(one) == "ready"
        for number in (1, 2, 3):
            step(wanted, number)
            for process in (zero, one):
                tell(process, number)
            assert hear(zero) == hear(one) == [number, number == 1, number > 1]
            take(subscriber, wanted, number)
        one.send_signal(signal.SIGKILL)
        one.wait()
        with source_process(tmp_path, 0) as new_zero, source_process(tmp_path, 1) as new_one:
            assert hear(new_zero) == hear(new_one) == "ready"
            fresh = make_model(1, 300)
            step(fresh, 1)
            for process in (new_one, new_zero):
                tell(process, 1)
            assert hear(new_zero) == hear(new_one) == [1, True, False]
            take(subscriber, fresh, 1)
            tell(zero, 4)
            assert "is fenced" in hear(zero)


def test_a_failure_reaches_rank_zero(tmp_path: Path) -> None:
    tensors = make_model(3, 200)
    with disk_publishers(tensors, shares_of("columns", tensors), tmp_path, timeout_s=WAIT_S) as made:
        publish_all(made, 1)
        copy = made[2]._copy
        assert copy is not None
        copy._held = tuple(type(item)(item.region, lambda: torch.zeros(1, 1, 1, 1)) for item in copy._held)
        results = publish_all(made, 2)
        assert isinstance(results[2], SourceError)
        for result in results[:2]:
            assert isinstance(result, PeerLost) and "source rank 2 failed: SourceError" in str(result)
