"""Stores of versions: what is written by a trainer is followed by engines, early, late, or long after."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sync.disk_parts import QUICK, clone, folder_of, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model, make_specs

from weightcast.sync import DiskPublisher, DiskReport, DiskSubscriber, TensorSpec
from weightcast.sync.disk.staged import StageStats
from weightcast.sync.errors import DeadlineExceeded, ModelMismatch, VersionError

ROWS = 400


def kinds(stats: StageStats) -> str:
    """The route in letters: "a" for an anchor, "d" for a delta."""
    return "".join("a" if taken.kind == "dense" else "d" for taken in stats.route)


@pytest.mark.parametrize("delta", ["auto", "on", "zstd", "off"])
def test_an_engine_follows_bit_for_bit(delta: Any, tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, delta=delta, anchor_every=4) as publisher,
        DiskSubscriber(tmp_path, engine="e", limits=QUICK) as subscriber,
    ):
        for number in range(1, 10):
            report = publisher.publish(number)
            assert report.is_anchor == (delta == "off" or number in (1, 5, 9))
            assert report.has_delta == (delta != "off" and number > 1)
            update = subscriber.wait(WAIT_S)
            assert update.version == report.version and update.specs == tuple(make_specs(tensors))
            assert kinds(update.stats) == ("a" if number == 1 or delta == "off" else "d")
            assert update.stats.num_bytes > 0 and update.stats.checksums_checked > len(tensors)
            assert_same_bits(dict(update), tensors)
            update.commit(pause_s=0.1)
            assert subscriber.serving == subscriber.version == report.version
            step(tensors, number)


def test_reports_count_what_lies_on_disk(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(1000, 64, dtype=torch.bfloat16)}
    with DiskPublisher(TensorSource(tensors), tmp_path) as publisher:
        first = publisher.publish(1)
        assert (first.dense_bytes, first.model_bytes, first.delta_bytes, first.density) == (128_000, 128_000, 0, None)
        tensors["w"].view(-1)[::100] = 1.0
        second = publisher.publish(2)
        assert second.density == 0.01 and second.dense_bytes == 0 and second.delta_bytes < 128_000 / 10
        assert second.sources[0].changed_elements == 640
        for report in (first, second):
            (number,) = {report.version.number}
            stored = [path for path in folder_of(tmp_path, number).iterdir() if path.name != "manifest.weightcast"]
            assert report.num_bytes == sum(path.stat().st_size for path in stored) and report.num_files == len(stored)
            assert report.place == str(folder_of(tmp_path, number)) and set(report.phases_s) == {
                "pack",
                "write",
                "meet",
            }
        unchanged = publisher.publish(3)
        assert (unchanged.num_bytes, unchanged.num_files, unchanged.density) == (0, 0, 0.0)


def test_a_late_engine_starts_from_the_nearest_anchor_and_a_slow_one_replays(tmp_path: Path) -> None:
    tensors = make_model(2, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, anchor_every=5) as publisher,
        DiskSubscriber(tmp_path, engine="slow", limits=QUICK) as slow,
    ):
        publisher.publish(1)
        held = slow.wait(WAIT_S)
        for number in range(2, 8):
            step(tensors, number)
            publisher.publish(number)
        held.commit()
        update = slow.wait(WAIT_S)
        while update.version.number < 7:  # it may have seen 7 only after 6
            update.commit()
            update = slow.wait(WAIT_S)
        assert "a" not in kinds(update.stats)
        assert_same_bits(dict(update), tensors)
        with DiskSubscriber(tmp_path, engine="late", limits=QUICK) as late:
            update = late.wait(WAIT_S)
            assert (update.version.number, kinds(update.stats)) == (7, "ad")
            assert_same_bits(dict(update), tensors)


def test_deltas_that_do_not_pay_make_anchors_until_they_pay_again(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(512, 64, dtype=torch.bfloat16)}
    noise = torch.Generator().manual_seed(1)

    def publish(number: int, share: float) -> DiskReport:
        flat = tensors["w"].view(-1)
        flat[: int(share * flat.numel())] = torch.randn(int(share * flat.numel()), generator=noise).bfloat16()
        return publisher.publish(number)

    with (
        DiskPublisher(TensorSource(tensors), tmp_path, keep=20) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        seen = []
        for number, share in enumerate((0.0, 0.01, 1.0, 1.0, 1.0, 0.01, 0.01), 1):
            report = publish(number, share)
            seen.append((report.is_anchor, report.has_delta))
            assert report.delta_bytes <= report.model_bytes  # what does not pay piece by piece is stored dense
            take(subscriber, tensors, number)
    # The third was found to be dense while it was written; the fourth and fifth are anchors alone.
    assert seen == [
        (True, False), (False, True), (False, True), (True, False), (True, False), (True, True), (False, True)
    ]  # fmt: skip


def test_deltas_that_piled_up_are_followed_by_an_anchor(tmp_path: Path) -> None:
    tensors = {"w": torch.zeros(512, 64, dtype=torch.bfloat16)}
    with DiskPublisher(TensorSource(tensors), tmp_path, keep=20, anchor_every=100) as publisher:
        anchors = []
        for number in range(1, 12):
            tensors["w"].view(torch.int16).view(-1)[number % 7 :: 7] += 1
            anchors.append(publisher.publish(number).is_anchor)
    # Each delta has about a seventh of the model's bytes: the fourth passes the half.
    assert anchors == [True, False, False, False, False, True, False, False, False, False, True]


def test_a_kept_tensor_stays_as_it_is(tmp_path: Path) -> None:
    tensors = make_model(4, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, anchor_every=3) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        for number in range(1, 8):
            publisher.publish(number)
            update = subscriber.wait(WAIT_S)
            if number % 2:
                kept.append((dict(update), clone(tensors)))
            update.commit()
            for got, wanted in kept:
                assert_same_bits(got, wanted)
            step(tensors, number)


def test_one_staged_copy_is_reused(tmp_path: Path) -> None:
    tensors = make_model(4, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        places = set()
        for number in range(1, 5):
            publisher.publish(number)
            update = subscriber.wait(WAIT_S)
            places.add(tuple(tensor.data_ptr() for _, tensor in update if tensor.numel()))
            update.commit()
            gc.collect()
            step(tensors, number)
        assert len(places) == 1


def test_a_refused_version_is_not_offered_again_and_is_a_base_all_the_same(tmp_path: Path) -> None:
    tensors = make_model(5, ROWS)
    with (
        DiskPublisher(TensorSource(tensors), tmp_path) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        publisher.publish(1)
        take(subscriber, tensors, 1)
        step(tensors, 1)
        publisher.publish(2)
        update = subscriber.wait(WAIT_S)
        with pytest.raises(VersionError, match=r"version 2 .* is still being loaded; commit\(\) or reject\(\)"):
            subscriber.wait(0.1)
        update.reject("no room")
        with pytest.raises(VersionError, match="was committed or rejected already"):
            dict(update)
        with pytest.raises(DeadlineExceeded, match=r"no whole version newer than 2 .* can be reached; it has 2"):
            subscriber.wait(0.1)
        assert subscriber.serving is not None and subscriber.serving.number == 1
        step(tensors, 2)
        publisher.publish(3)
        take(subscriber, tensors, 3)


def test_a_subscriber_that_comes_first_waits_for_the_store(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    tensors = make_model(6, ROWS)
    with DiskSubscriber(root, engine="early", limits=QUICK) as subscriber:
        with pytest.raises(
            DeadlineExceeded, match=r"'early' waited 0.1 s .* no whole version yet: start the publisher"
        ):
            subscriber.wait(0.1)
        with DiskPublisher(TensorSource(tensors), root) as publisher:
            publisher.publish(1)
            assert subscriber.specs(WAIT_S) == tuple(make_specs(tensors))
            take(subscriber, tensors, 1)


def test_a_restarted_trainer_outranks_the_old_one_which_is_fenced(tmp_path: Path) -> None:
    old, new = make_model(7, ROWS), make_model(8, ROWS)
    with (
        DiskPublisher(TensorSource(old), tmp_path) as first,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        first.publish(8)
        take(subscriber, old, 8)
        with DiskPublisher(TensorSource(new), tmp_path) as second:
            report = second.publish(1)
            assert report.is_anchor and report.version.epoch > first.epoch
            take(subscriber, new, 1)
            with pytest.raises(VersionError, match=rf"epoch {second.epoch} has taken over .* is fenced"):
                first.publish(9)
            step(new, 1)
            assert second.publish(2).has_delta
            take(subscriber, new, 2)
    with pytest.raises(VersionError, match=r"epoch 12 does not rise above \d+"):
        DiskPublisher(TensorSource(new), tmp_path, epoch=12).publish(3)


def test_an_engine_that_was_started_on_a_version_gets_only_newer_ones(tmp_path: Path) -> None:
    tensors = make_model(9, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path) as publisher:
        version = publisher.publish(1).version
        with DiskSubscriber(tmp_path, serving=version, limits=QUICK) as subscriber:
            with pytest.raises(DeadlineExceeded):
                subscriber.wait(0.2)
            step(tensors, 1)
            publisher.publish(2)
            update = subscriber.wait(WAIT_S)
            assert kinds(update.stats) == "ad"
            assert_same_bits(dict(update), tensors)


def test_a_store_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    tensors = make_model(1)
    expect = [*make_specs(tensors)[1:], TensorSpec("mine", torch.int8, (2,))]
    with (
        DiskPublisher(TensorSource(tensors), tmp_path) as publisher,
        DiskSubscriber(tmp_path, expect=expect, limits=QUICK) as subscriber,
    ):
        publisher.publish(1)
        with pytest.raises(
            ModelMismatch, match=r"version 1 .* another model: embed.weight: not expected.*; mine: expected"
        ):
            subscriber.wait(WAIT_S)
        with pytest.raises(DeadlineExceeded):
            subscriber.wait(0.1)


def test_old_versions_go_when_nothing_needs_them(tmp_path: Path) -> None:
    tensors = make_model(1, ROWS)
    with DiskPublisher(TensorSource(tensors), tmp_path, keep=2, anchor_every=4) as publisher:
        removed: list[int] = []
        for number in range(1, 11):
            removed += [version.number for version in publisher.publish(number).removed]
            step(tensors, number)
            left = sorted(
                int(path.name.split("-")[1]) for path in tmp_path.iterdir() if not path.name.startswith("run")
            )
            assert removed == [n for n in range(1, number + 1) if n not in left]
            # Versions 1, 5, 9 are anchors: the two newest, and all from the anchor that the older of them needs.
            first = max(n for n in (1, 5, 9) if n <= max(1, number - 1))
            assert left == list(range(first, number + 1))
