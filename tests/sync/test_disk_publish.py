"""Stores of versions: what is written by a trainer is followed by engines, early, late, or long after."""

import gc
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.sync.disk_parts import QUICK, clone, folder_of, read_manifest, step, take
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_model, make_specs

from weightcast.sync import DiskPublisher, DiskReport, DiskSubscriber, ModuleSource, TensorSpec, materialize
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.disk.staged import StageStats
from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch, SourceError, VersionError

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


def test_an_anchor_is_an_hf_folder_and_any_version_becomes_one(tmp_path: Path) -> None:
    root, model = tmp_path / "store", torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Linear(50, 30)).bfloat16()
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text('{"model_type": "own"}')
    (config / "model.safetensors").write_text("no weights are taken from here")
    with DiskPublisher(ModuleSource(model), root, config_from=config, file_bytes=4096) as publisher:
        publisher.publish(1)
        anchor = folder_of(root, 1)
        checkpoint = open_checkpoint(anchor)
        with checkpoint.reader() as reader:
            assert_same_bits({name: reader.read_whole(name) for name in model.state_dict()}, dict(model.state_dict()))
        assert (anchor / "config.json").read_text() == '{"model_type": "own"}'
        first = clone(model.state_dict())
        with torch.no_grad():
            next(model.parameters())[3] += 1
        publisher.publish(2)
    assert not (folder_of(root, 2) / "model.safetensors.index.json").exists()
    done = materialize(root, tmp_path / "two", file_bytes=2000)
    assert (done.version.number, done.num_tensors, done.num_files, len(done.steps)) == (2, 4, 4, 2)
    loaded: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "two").glob("*.safetensors")):
        loaded |= load_file(path)
    assert_same_bits({name: loaded[name] for name in model.state_dict()}, dict(model.state_dict()))
    assert {spec.name for spec in open_checkpoint(tmp_path / "two").specs} == set(loaded)
    assert sorted(path.name for path in (tmp_path / "two").iterdir() if path.suffix == ".json") == [
        "config.json",
        "model.safetensors.index.json",
    ]
    materialize(root, tmp_path / "one", version=1)
    assert_same_bits({name: load_file(tmp_path / "one" / "model.safetensors")[name] for name in first}, first)
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        materialize(root, tmp_path / "one")
    with pytest.raises(VersionError, match=r"does not have version 7; the newest whole ones are: 1 \(epoch"):
        materialize(root, tmp_path / "seven", version=7)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_transformers_loads_an_anchor_and_a_delta_that_was_materialized(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path / "config")
    root, tokens = tmp_path / "store", torch.tensor([[1, 2, 3]])
    with DiskPublisher(ModuleSource(model), root, config_from=tmp_path / "config") as publisher, torch.no_grad():
        publisher.publish(1)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder_of(root, 1)).eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        model.lm_head.weight[:5] *= 2
        publisher.publish(2)
        materialize(root, tmp_path / "two")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_files_keep_their_limit_and_a_file_that_replaces_nothing(tmp_path: Path) -> None:
    tensors = {f"w{index}": torch.full((64, 32), float(index)) for index in range(10)}
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, file_bytes=20_000) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        report = publisher.publish(1)
        assert report.num_files == 6 and len(read_manifest(folder_of(tmp_path, 1)).dense) == 10
        take(subscriber, tensors, 1)
        for tensor in tensors.values():
            tensor.view(torch.int32)[:, ::9] += 1
        report = publisher.publish(2)
        assert report.has_delta and report.num_files == 1
        take(subscriber, tensors, 2)


def test_sealed_with_a_key(tmp_path: Path) -> None:
    tensors, key = make_model(1), b"k" * 32
    with DiskPublisher(TensorSource(tensors), tmp_path, key=key) as publisher:
        publisher.publish(1)
        step(tensors, 1)
        publisher.publish(2)
    with DiskSubscriber(tmp_path, key=key, limits=QUICK) as subscriber:
        take(subscriber, tensors, 2)
    assert is_refused_with(tmp_path, None) and is_refused_with(tmp_path, b"j" * 32)
    materialize(tmp_path, tmp_path / "out", key=key)


def is_refused_with(root: Path, key: bytes | None) -> bool:
    with DiskSubscriber(root, key=key, limits=QUICK) as subscriber:
        try:
            subscriber.wait(WAIT_S)
        except ValueError as error:
            return bool(re.search("fails its own seal: it was altered or was sealed with", str(error)))
    return False


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "delta": ({"delta": "maybe"}, "delta='maybe' is unknown; choose one of auto, on, off, zstd"),
    "anchor_every": ({"anchor_every": 0}, "anchor_every=0 .* at least 1"),
    "keep": ({"keep": 0}, "keep=0"),
    "file_bytes": ({"file_bytes": 10}, "file_bytes=10 at least 4096"),
    "key": ({"key": b"x"}, "16 to 64 bytes"),
    "url": ({"place": "nosuch://bucket/x"}, "cannot be reached by fsspec"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case: str, tmp_path: Path) -> None:
    settings, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        DiskPublisher(TensorSource(make_model(1)), **({"place": tmp_path} | settings))


def test_wrong_use(tmp_path: Path) -> None:
    tensors = make_model(1)
    source = TensorSource(tensors)
    with pytest.raises(ConfigError, match="is no folder"):
        DiskPublisher(source, tmp_path / "a", config_from=tmp_path / "none")
    with DiskPublisher(source, tmp_path / "b") as publisher:
        publisher.publish(3)
        for number in (3, 2, -1):
            with pytest.raises(VersionError, match=f"version {number} does not rise above 3"):
                publisher.publish(number)
        source.tensors["norm.weight"] = torch.zeros(4, dtype=torch.bfloat16)
        with pytest.raises(SourceError, match="model changed after its plan was made"):
            publisher.publish(4)
        source.tensors["norm.weight"] = torch.zeros(5, dtype=torch.bfloat16)
        with DiskSubscriber(tmp_path / "b", limits=QUICK) as subscriber:
            assert subscriber.wait(WAIT_S).version.number == 3
        report = publisher.publish(5)
        assert report.is_anchor and not report.has_delta  # what the failed one packed is no base
    with pytest.raises(ConfigError, match="must be above 0"):
        type(QUICK)(poll_s=0.0)


@pytest.mark.slow
def test_each_side_keeps_one_copy(tmp_path: Path) -> None:
    tensors = make_model(1, 1_200_000)
    model_bytes = sum(spec.num_bytes for spec in make_specs(tensors))
    assert model_bytes > 190e6
    process = psutil.Process()
    with (
        DiskPublisher(TensorSource(tensors), tmp_path, keep=1, anchor_every=3) as publisher,
        DiskSubscriber(tmp_path, limits=QUICK) as subscriber,
    ):
        before_bytes = process.memory_info().rss
        peaks = []
        for number in range(1, 5):
            publisher.publish(number)
            update = subscriber.wait(3 * WAIT_S)
            assert_same_bits(dict(update), tensors)
            update.commit()
            del update
            gc.collect()
            peaks.append((process.memory_info().rss - before_bytes) / model_bytes)
            # In place: a step's own temporary copies are the test's.
            tensors["embed.weight"].view(torch.int16)[::50, 7] += 1
    # The source's copy of its share, and the engine's staged copy.
    assert max(peaks) < 2.5, peaks
