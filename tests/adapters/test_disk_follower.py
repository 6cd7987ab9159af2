"""The follower over a store of versions: an engine is kept in step with no publisher in reach."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.conftest import Checkpoint, embedded_server
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens

from weightcast.adapters.engine import version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.keys import read_store_key
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.adapters.transformers.server import FollowerThread
from weightcast.sync import CurveKeys, DiskLimits, DiskPublisher, DiskSubscriber, FleetPolicy, ModuleSource
from weightcast.sync.errors import AddressError, ConfigError, DamagedVersion, DeadlineExceeded


def carry(folder: str, store: Path, *, damaged: bool = False) -> None:
    """Bring a version's folder to another place, where it appears whole, or whole but for one byte."""
    partial = store / ".carried"
    shutil.copytree(folder, partial)
    if damaged:
        file = partial / "manifest.weightcast"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    partial.rename(store / Path(folder).name)


def test_an_engine_follows_a_store_in_another_place(first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    engine = TransformersEngine(first.folder, name="engine-0")
    store, limits = tmp_path / "there", DiskLimits(poll_s=0.02)
    store.mkdir()
    with (
        DiskPublisher(ModuleSource(second.model), tmp_path / "here", anchor_every=2) as publisher,
        DiskSubscriber(store, engine=engine.name, expect=engine.expected_specs(), limits=limits) as subscriber,
    ):
        follower = EngineFollower(engine, subscriber)
        with pytest.raises(DeadlineExceeded):
            follower.step(0.1)
        report = publisher.publish(1)
        carry(report.place, store)
        assert follower.step(60)
        assert follower.state.serving == subscriber.serving == report.version
        said = engine.generate(PROMPT, NUM_TOKENS)
        assert said.token_ids == greedy_tokens(second.model) and said.weight_version == version_label(report.version)
        carry(publisher.publish(2).place, store, damaged=True)
        with pytest.raises(DamagedVersion, match=r"manifest.weightcast of version 2"):
            follower.step(60)
        assert engine.generate(PROMPT, NUM_TOKENS) == said and follower.state.healthy
        carry(publisher.publish(3).place, store)
        assert follower.step(60) and follower.state.num_updates == 2


def test_the_embedded_engine_agrees_over_a_sealed_store(first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    store, key_file, key = tmp_path / "store", tmp_path / "key", os.urandom(32)
    key_file.write_bytes(key)
    key_file.chmod(0o600)
    policy, source = FleetPolicy.all(minimum=1), ModuleSource(second.model)
    with (
        DiskPublisher(source, store, key=key, policy=policy, config_from=second.folder, timeout_s=60) as publisher,
        embedded_server(first.folder, "--publisher", str(store), "--key-file", str(key_file)) as client,
    ):
        publisher.wait_for_subscribers(1)
        report = publisher.publish(1)
        assert [(engine.engine, engine.state) for engine in report.engines] == [("transformers", "serving")]
        assert report.engines[0].pause_s > 0
        assert [span.phase for span in report.engines[0].spans] == ["prepare", "pause", "load", "resume"]
        said = client.complete(PROMPT, NUM_TOKENS)
        assert said.token_ids == greedy_tokens(second.model) and said.weight_version == version_label(report.version)
    assert TransformersEngine(Path(report.place)).generate(PROMPT, NUM_TOKENS).token_ids == said.token_ids


@pytest.mark.parametrize(
    ("address", "flags", "message"),
    [
        ("127.0.0.1:5600", {}, "did you mean 'tcp://127.0.0.1:5600'"),
        ("store", {"keys": CurveKeys(b"p" * 40, b"s" * 40)}, "keys does not apply to store: .*--key-file"),
        ("tcp://127.0.0.1:1", {"key": b"k" * 32}, "key does not apply to tcp://127.0.0.1:1: .*--keys"),
    ],
)
def test_what_does_not_fit_the_address_is_refused_by_name(
    first: Checkpoint, address: str, flags: dict[str, Any], message: str
) -> None:
    engine = TransformersEngine(first.folder)
    with pytest.raises((AddressError, ConfigError), match=message):
        FollowerThread(engine, address, pause_mode="wait", **flags)


def test_the_key_of_a_store_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "key"
    assert read_store_key(None) is None
    with pytest.raises(ConfigError, match="there is no key file"):
        read_store_key(file)
    file.write_bytes(b"k" * 32)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="open to others; chmod 600 it"):
        read_store_key(file)
    file.chmod(0o600)
    assert read_store_key(file) == b"k" * 32
    file.write_bytes(b"k" * 65)
    with pytest.raises(ConfigError, match="has 65 bytes, a store's key at most 64"):
        read_store_key(file)
