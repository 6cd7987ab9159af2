"""Stores of versions as folders that others read, their limits and keys, and what is refused."""

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

from weightcast.sync import DiskPublisher, DiskSubscriber, ModuleSource, materialize
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import ConfigError, SourceError, VersionError

ROWS = 400


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
