"""The follower over a store of versions: an engine is kept in step with no publisher in reach."""

from pathlib import Path

import pytest
from tests.adapters.conftest import Checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens

from weightcast.adapters.engine import version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.sync import DiskLimits, DiskPublisher, DiskSubscriber, ModuleSource
from weightcast.sync.errors import DamagedVersion, DeadlineExceeded


def test_an_engine_follows_a_store(first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    engine = TransformersEngine(first.folder, name="engine-0")
    store, limits = tmp_path / "versions", DiskLimits(poll_s=0.02)
    with (
        DiskPublisher(ModuleSource(second.model), store, anchor_every=2) as publisher,
        DiskSubscriber(store, engine=engine.name, expect=engine.expected_specs(), limits=limits) as subscriber,
    ):
        follower = EngineFollower(engine, subscriber)
        with pytest.raises(DeadlineExceeded):
            follower.step(0.1)
        version = publisher.publish(1).version
        assert follower.step(20)
        assert follower.state.serving == subscriber.serving == version
        said = engine.generate(PROMPT, NUM_TOKENS)
        assert said.token_ids == greedy_tokens(second.model) and said.weight_version == version_label(version)
        file = Path(publisher.publish(2).place) / "manifest.weightcast"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(DamagedVersion, match=r"manifest.weightcast of version 2"):
            follower.step(20)
        assert engine.generate(PROMPT, NUM_TOKENS) == said and follower.state.healthy
        publisher.publish(3)
        assert follower.step(20) and follower.state.num_updates == 2
