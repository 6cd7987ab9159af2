"""The follower over a store of versions: an engine is kept in step with no publisher in reach."""

import shutil
from pathlib import Path

import pytest
from tests.adapters.conftest import Checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens

from weightcast.adapters.engine import version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.sync import DiskLimits, DiskPublisher, DiskSubscriber, ModuleSource
from weightcast.sync.errors import DamagedVersion, DeadlineExceeded


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
