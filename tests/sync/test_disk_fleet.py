"""Engines that agree over a store: released together or not at all, each told why."""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.sync.disk_fleet_parts import (
    LOST_AFTER_S,
    Publishing,
    has_staged,
    make_publisher,
    wait_until,
)
from tests.sync.disk_job import cut_columns
from tests.sync.disk_parts import QUICK, clone, disk_publishers, folder_of, publish_all, read_manifest, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import (
    DiskLimits,
    DiskObserver,
    DiskPublisher,
    DiskSubscriber,
    FleetPolicy,
    materialize,
)
from weightcast.sync.disk.fleet_records import FLEET, RELEASE, Member, Release, member_file
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.disk.records import Hashing, seal, unseal
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, WeightcastError
from weightcast.sync.version import Version


def test_nobody_is_given_a_version_before_all_have_it(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    with (
        make_publisher(tensors, tmp_path) as publisher,
        DiskSubscriber(tmp_path, engine="one", limits=QUICK, agree=True) as one,
    ):
        publisher.wait_for_subscribers(1)
        # The second follows by what the publisher's run says, and looks seldom: it is late with every version.
        with DiskSubscriber(tmp_path, engine="two", limits=DiskLimits(poll_s=0.5)) as two:
            publisher.wait_for_subscribers(2)
            for number in range(1, 4):
                publishing = Publishing(publisher, number)
                wait_until(partial(has_staged, tmp_path, "one", number), "the first engine")
                if not has_staged(tmp_path, "two", number):
                    with pytest.raises(
                        DeadlineExceeded, match=f"version {number} .* the fleet has not released it yet"
                    ):
                        one.wait(0.01)
                updates = [subscriber.wait(WAIT_S) for subscriber in (one, two)]
                assert [update.version.number for update in updates] == [number] * 2
                assert (folder_of(tmp_path, number) / RELEASE).is_file()
                for update in updates:
                    assert_same_bits(dict(update), tensors)
                updates[0].commit(pause_s=0.5)
                publishing.join(0.1)
                assert publishing.is_alive(), "it returned before the fleet served the version"
                updates[1].commit()
                report = publishing.end()
                assert {engine.engine: engine.state for engine in report.engines} == {
                    "one": "serving",
                    "two": "serving",
                }
                figures = {engine.engine: engine for engine in report.engines}
                assert figures["one"].pause_s == 0.5 and figures["one"].num_bytes > 0
                assert figures["two"].checksums_checked > len(tensors) and figures["two"].transport == "disk"
                assert [span.phase for span in report.spans] == ["pack", "write", "meet", "stage", "commit"]
                assert one.released == report.version and not one.is_fenced
                step(tensors, number)
        # It left, and is not waited for.
        taking = threading.Thread(target=lambda: one.wait(WAIT_S).commit())
        taking.start()
        assert [engine.engine for engine in publisher.publish(4).engines] == ["one"]
        taking.join()
    assert list((tmp_path / "engines").glob("member-*")) == []
    assert list_versions(tmp_path, check=True).faults == ()
    materialize(tmp_path, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


def test_a_version_that_not_all_have_is_named_and_the_next_goes_on_from_it(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    with (
        make_publisher(tensors, tmp_path, FleetPolicy.all(minimum=2), keep=1) as publisher,
        DiskSubscriber(tmp_path, engine="one", limits=QUICK) as one,
    ):
        with pytest.raises(
            DeadlineExceeded, match=r"version 1 .* not released under the policy all\(2\): one is staged"
        ):
            publisher.publish(1, timeout_s=1.0)
        with pytest.raises(DeadlineExceeded, match="the fleet has not released it yet"):
            one.wait(0.1)
        step(tensors, 1)
        with DiskSubscriber(tmp_path, engine="two", limits=QUICK) as two:
            publishing = Publishing(publisher, 2)
            for subscriber in (one, two):
                take(subscriber, tensors, 2)
            report = publishing.end()
            assert report.has_delta and not report.is_anchor  # it goes on from what was not released
            served = clone(tensors)
            step(tensors, 2)
            listing = list_versions(tmp_path)
            assert [row.is_released for row in listing.versions] == [False, True]
            assert [(engine.engine, engine.serving) for engine in listing.engines] == [
                ("one", report.version),
                ("two", report.version),
            ]
        # A policy that is not met leaves what is served in the store, however few versions are kept.
        with pytest.raises(DeadlineExceeded, match=r"version 3 .* not released .*one is staged"):
            publisher.publish(3, timeout_s=0.5)
        with DiskSubscriber(tmp_path, engine="late", limits=QUICK, agree=False) as everything:
            take(everything, tensors, 3)
        with DiskSubscriber(tmp_path, engine="late", limits=QUICK) as late:
            take(late, served, 2)
            wait_until(lambda: has_staged(tmp_path, "late", 3), "the late engine to go on")


def test_a_refusal_is_told_at_once_under_all_and_fences_under_a_quorum(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    names = ("one", "two", "three")
    with make_publisher(tensors, tmp_path, FleetPolicy.quorum(2)) as publisher:
        made = [DiskSubscriber(tmp_path, engine=name, limits=QUICK, agree=True) for name in names]
        try:
            publisher.wait_for_subscribers(3)
            publishing = Publishing(publisher, 1)
            for subscriber in made[:2]:
                take(subscriber, tensors, 1)
            made[2].wait(WAIT_S).reject("no room")
            states = {engine.engine: (engine.state, engine.reason) for engine in publishing.end().engines}
            assert states == {"one": ("serving", ""), "two": ("serving", ""), "three": ("refused", "no room")}
            wait_until(lambda: made[2].released is not None, "the third to see the release")
            assert made[2].is_fenced and not made[0].is_fenced
            step(tensors, 1)
            publishing = Publishing(publisher, 2)
            for subscriber in made:
                take(subscriber, tensors, 2)
            assert {engine.state for engine in publishing.end().engines} == {"serving"}
            assert not made[2].is_fenced
        finally:
            for subscriber in made:
                subscriber.close()
    alien = make_model(2, 100)
    with (
        make_publisher(tensors, tmp_path) as publisher,
        DiskSubscriber(tmp_path, engine="alien", expect=TensorSource(alien).specs(), limits=QUICK) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        started_s = time.monotonic()
        with pytest.raises(EngineError, match=r"alien is refused \(version 1 .* is of another model"):
            publisher.publish(1)
        assert time.monotonic() - started_s < WAIT_S / 2  # not at the deadline
        with pytest.raises(WeightcastError, match="of another model"):
            subscriber.wait(WAIT_S)


def test_an_observer_is_told_of_released_versions_and_waited_for(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    with (
        make_publisher(tensors, tmp_path) as publisher,
        DiskSubscriber(tmp_path, engine="worker", limits=QUICK, agree=True) as worker,
        DiskObserver(tmp_path, engine="driver", agree=True) as driver,
    ):
        wait_until(lambda: len(publisher.fleet()) == 2, "worker and driver")
        publishing = Publishing(publisher, 1)
        update = driver.wait(WAIT_S)
        assert (update.version.number, len(list(update)), len(update.specs)) == (1, 0, len(tensors))
        take(worker, tensors, 1)
        publishing.join(0.2)
        assert publishing.is_alive(), "it did not wait for the driver"
        update.commit(pause_s=0.125)
        report = publishing.end()
        assert {engine.engine: engine.pause_s for engine in report.engines} == {"worker": 0.0, "driver": 0.125}
        with pytest.raises(DeadlineExceeded, match=r"no version newer than 1 .* may be served yet"):
            driver.wait(0.05)


def test_every_rank_learns_what_became_of_a_version(tmp_path: Path) -> None:
    tensors = make_model(1, 300)
    options: dict[str, object] = {"policy": FleetPolicy.all(minimum=1), "lost_after_s": LOST_AFTER_S}
    with (
        disk_publishers(tensors, cut_columns(tensors, 2), tmp_path, **options) as made,
    ):
        errors = publish_all(made, 1, timeout_s=1.0)
        assert len({str(error) for error in errors}) == 1 and isinstance(errors[1], DeadlineExceeded)
        assert "all(1): no engine is connected" in str(errors[1])
        with DiskSubscriber(tmp_path, engine="one", limits=QUICK) as subscriber:
            taking = threading.Thread(target=lambda: take(subscriber, tensors, 2))
            taking.start()
            reports: list[Any] = publish_all(made, 2)
            taking.join()
        assert [[engine.state for engine in report.engines] for report in reports] == [["serving"]] * 2


def test_a_key_seals_what_engines_and_publisher_say(tmp_path: Path) -> None:
    tensors, key = make_model(1, 200), b"k" * 32
    with (
        make_publisher(tensors, tmp_path, FleetPolicy.all(minimum=1), key=key) as publisher,
        DiskSubscriber(tmp_path, engine="one", limits=QUICK, key=key) as one,
    ):
        # A stranger's engine is not counted, and a stranger's release is none.
        unkeyed = Member("two", "life", "receiver", 1, None, None, None, "", 0.0, 0.0, 0, 0, (), 0.0)
        (tmp_path / "engines").mkdir(exist_ok=True)
        (tmp_path / "engines" / member_file("two")).write_bytes(seal(unkeyed, Hashing()))
        publishing = Publishing(publisher, 1)
        take(one, tensors, 1)
        assert [engine.engine for engine in publishing.end().engines] == ["one"]
        step(tensors, 1)
        old = (folder_of(tmp_path, 1) / RELEASE).read_bytes()
        one.close()
        with pytest.raises(DeadlineExceeded):
            publisher.publish(2, timeout_s=0.3)
        with DiskSubscriber(tmp_path, engine="three", limits=QUICK, key=key) as three:
            update = three.wait(WAIT_S)
            assert update.version.number == 1
            update.commit()
            folder = folder_of(tmp_path, 2)
            forged = Release(read_forged(tmp_path, key), b"x" * 16)
            for raw in (old, seal(forged, Hashing()), seal(forged, Hashing(key)), old[:30]):
                (folder / RELEASE).write_bytes(raw)
                with pytest.raises(DeadlineExceeded, match="the fleet has not released it yet"):
                    three.wait(0.15)


def read_forged(root: Path, key: bytes) -> Version:
    """The version of the manifest of version 2."""
    from weightcast.sync.disk.records import VersionManifest

    return unseal((folder_of(root, 2) / "manifest.weightcast").read_bytes(), VersionManifest, Hashing(key)).version


def test_without_a_policy_nothing_is_written_and_nobody_waits(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path) as publisher,
        DiskSubscriber(tmp_path, engine="one", limits=QUICK) as one,
        DiskSubscriber(tmp_path, engine="strict", limits=QUICK, agree=True) as strict,
    ):
        report = publisher.publish(1)
        take(one, tensors, 1)
        assert report.engines == () and one.released is None and not one.is_fenced
        assert FLEET not in {file.name for file in read_manifest(folder_of(tmp_path, 1)).files}
        written = {path.name for path in (tmp_path / "engines").iterdir() if not path.name.startswith(".tmp-")}
        assert written == {member_file("strict")}
        with pytest.raises(DeadlineExceeded, match="its publisher needs a policy"):
            wait_until(lambda: has_staged(tmp_path, "strict", 1), "the strict engine")
            strict.wait(0.1)
        with pytest.raises(ConfigError, match="give it a policy"):
            publisher.wait_for_subscribers(1)
