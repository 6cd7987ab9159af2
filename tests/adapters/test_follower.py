"""The follower between a real publisher and a real engine, in one process: what it commits, refuses and reports."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters.conftest import Checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import TensorSource, wait_until

from weightcast.adapters.engine import version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.sync import ModuleSource, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import DeadlineExceeded, EngineError

SHORT_S = 0.2


class Following:
    """An engine that follows `address` in a thread."""

    def __init__(self, folder: Path, address: str, events: Path) -> None:
        self.events = events
        self.error: EngineError | None = None
        self.engine = TransformersEngine(folder, name="engine-0")
        self._subscriber = WeightSubscriber(address, engine=self.engine.name)
        self.follower = EngineFollower(self.engine, self._subscriber, pause_timeout_s=SHORT_S, events=events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.follower.run(self._stop, poll_s=0.05)
        except EngineError as error:
            self.error = error

    def phases(self) -> list[str]:
        return [json.loads(line)["phase"] for line in self.events.read_text().splitlines()]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)
        self._subscriber.close()
        assert not self._thread.is_alive()


@pytest.fixture
def publisher(second: Checkpoint) -> Iterator[WeightPublisher]:
    with WeightPublisher(ModuleSource(second.model), "tcp://127.0.0.1:0", timeout_s=30) as publisher:
        yield publisher


@pytest.fixture
def following(first: Checkpoint, publisher: WeightPublisher, tmp_path: Path) -> Iterator[Following]:
    following = Following(first.folder, publisher.address, tmp_path / "events.jsonl")
    try:
        publisher.wait_for_subscribers(1, 20)
        yield following
    finally:
        following.close()


def test_a_version_is_served_reported_and_drawn(
    publisher: WeightPublisher, following: Following, second: Checkpoint
) -> None:
    report = publisher.publish(version=3)
    done = following.engine.generate(PROMPT, NUM_TOKENS)
    assert (done.token_ids, done.weight_version) == (greedy_tokens(second.model), version_label(report.version))
    (engine,) = report.engines
    assert (engine.engine, engine.state) == ("engine-0", "serving")
    assert 0 < engine.pause_s < SHORT_S
    assert [span.phase for span in engine.spans] == ["stage", "check", "prepare", "pause", "load", "resume"]
    wait_until(lambda: "serving" in following.phases(), "the last line", 5)
    assert following.phases() == ["stage", "prepare", "pause", "load", "resume", "serving"]
    for line in following.events.read_text().splitlines():
        fields = json.loads(line)
        assert (fields["process"], fields["version"], fields["epoch"]) == ("engine", 3, report.version.epoch)
        assert fields["start_s"] <= fields["end_s"]


def test_versions_follow_one_another(publisher: WeightPublisher, following: Following) -> None:
    for number in (1, 2, 7):
        version = publisher.publish(version=number).version
        assert following.engine.label == version_label(version)
    assert following.follower.state.num_updates == 3


def test_a_version_that_comes_too_late_for_a_pause_is_refused_and_the_next_one_taken(
    publisher: WeightPublisher, following: Following, second: Checkpoint
) -> None:
    engine = following.engine
    with engine.gate.admitted(1):  # a request that does not end
        with pytest.raises(EngineError, match=r"engine-0 is refused.*still running 0\.2 s after a pause"):
            publisher.publish(version=1)
        assert engine.label == "default"
        assert not engine.gate.is_paused
    publisher.publish(version=2)
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)
    assert following.follower.state.num_refused == 1


def test_a_poisoned_engine_stops_following(publisher: WeightPublisher, following: Following) -> None:
    following.engine._targets.popitem()  # so that the copy of the next version breaks off in its middle
    with pytest.raises(EngineError, match=r"engine-0 is refused.*broke off"):
        publisher.publish(version=1)
    wait_until(lambda: following.error is not None, "the follower to end", 10)
    assert following.follower.state.phase == "poisoned"
    assert following.phases()[-1] == "poisoned"
    with pytest.raises(EngineError, match="restart the engine"):
        following.follower.step(0.1)


def test_the_loop_survives_its_publisher_and_follows_the_next(
    first: Checkpoint, second: Checkpoint, tmp_path: Path
) -> None:
    short = dict(second.tensors)
    lost = short.popitem()[0]
    with WeightPublisher(TensorSource(short), "tcp://127.0.0.1:0", timeout_s=30) as torn:
        address = torn.address
        following = Following(first.folder, address, tmp_path / "events.jsonl")
        torn.wait_for_subscribers(1, 20)
        with pytest.raises(EngineError, match=lost):
            torn.publish(version=1)
    try:
        assert following.engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(first.model)
        with WeightPublisher(TensorSource(second.tensors), address, timeout_s=30) as whole:
            whole.wait_for_subscribers(1, 20)
            whole.publish(version=1)
        assert following.engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)
    finally:
        following.close()


def test_waiting_for_nothing_ends_at_its_deadline(first: Checkpoint, publisher: WeightPublisher) -> None:
    engine = TransformersEngine(first.folder, name="alone")
    with WeightSubscriber(publisher.address, engine=engine.name) as subscriber, pytest.raises(DeadlineExceeded):
        EngineFollower(engine, subscriber).step(0.3)
