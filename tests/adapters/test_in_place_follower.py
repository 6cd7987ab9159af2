"""An engine in whose own tensors versions land: when it pauses, what it says, and what it does when they break off."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from tests.adapters.conftest import Checkpoint, embedded_server, free_port
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import ServerUnderTest, TensorSource, wait_until

from weightcast.adapters.engine import version_label
from weightcast.adapters.in_place import InPlaceFollower
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.adapters.transformers.server import FollowerThread, main
from weightcast.sync import HeldRegion, ModuleSource, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, ModelMismatch

SHORT_S = 0.3


class Landing:
    """An engine that follows `address` in a thread, with no staged copy."""

    def __init__(self, folder: Path, address: str) -> None:
        self.engine = TransformersEngine(folder, name="engine-0")
        self._subscriber = WeightSubscriber(address, engine="engine-0", into=self.engine.own_tensors())
        self.follower = InPlaceFollower(self.engine, self._subscriber, pause_timeout_s=SHORT_S, land_timeout_s=SHORT_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.follower.run, args=(self._stop,), kwargs={"poll_s": 0.05})
        self._thread.start()

    @property
    def phase(self) -> str:
        return self.follower.state.phase

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)
        self._subscriber.close()
        assert not self._thread.is_alive()


class SlowSource(TensorSource):
    """A source whose last tensor can be packed when `may_go` is set."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.may_go = threading.Event()

    def held(self) -> list[HeldRegion]:
        *others, last = super().held()
        return [*others, HeldRegion(last.region, partial(self._wait_for, last))]

    def _wait_for(self, held: HeldRegion) -> torch.Tensor:
        assert self.may_go.wait(20)
        return held.live()


@pytest.fixture
def publisher(second: Checkpoint) -> Iterator[WeightPublisher]:
    with WeightPublisher(ModuleSource(second.model), "tcp://127.0.0.1:0", timeout_s=30) as publisher:
        yield publisher


@pytest.fixture
def landing(first: Checkpoint, publisher: WeightPublisher) -> Iterator[Landing]:
    landing = Landing(first.folder, publisher.address)
    try:
        publisher.wait_for_subscribers(1, 20)
        yield landing
    finally:
        landing.close()


def test_versions_land_in_the_models_own_memory(
    publisher: WeightPublisher, landing: Landing, first: Checkpoint, second: Checkpoint
) -> None:
    engine = landing.engine
    places = {name: tensor.data_ptr() for name, tensor in engine.own_tensors().items()}
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(first.model)
    for number in (1, 5):
        report = publisher.publish(number)
        done = engine.generate(PROMPT, NUM_TOKENS)
        assert (done.token_ids, done.weight_version) == (greedy_tokens(second.model), version_label(report.version))
        (line,) = report.engines
        assert line.state == "serving" and line.pause_s >= line.stage_s > 0
        assert [span.phase for span in line.spans] == ["stage", "check", "pause", "load", "resume"]
    assert {name: tensor.data_ptr() for name, tensor in engine.own_tensors().items()} == places
    wait_until(lambda: landing.follower.state.num_updates == 2, "the last state", 5)


def test_an_engine_that_cannot_pause_serves_on_and_tries_again(
    publisher: WeightPublisher, landing: Landing, first: Checkpoint, second: Checkpoint
) -> None:
    engine = landing.engine
    with engine.gate.admitted(1):  # a request that does not end
        with pytest.raises(DeadlineExceeded, match="engine-0 is staging"):
            publisher.publish(1, timeout_s=3 * SHORT_S)
        assert landing.follower.state.num_refused and "still running" in landing.follower.state.last_error
        assert engine.label == "default" and torch.equal(
            engine.own_tensors()["model.norm.weight"], first.tensors["model.norm.weight"]
        )
    publisher.publish(2)
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)


def test_torn_weights_are_not_served_and_the_next_version_mends_them(first: Checkpoint, second: Checkpoint) -> None:
    source = SlowSource(second.tensors)
    with WeightPublisher(source, "tcp://127.0.0.1:0", chunk_bytes=4096, timeout_s=30) as publisher:
        landing = Landing(first.folder, publisher.address)
        try:
            publisher.wait_for_subscribers(1, 20)
            publication = publisher.begin(1, hold=True)
            wait_until(lambda: "are torn" in landing.follower.state.last_error, "the transfer to break off", 10)
            assert landing.engine.gate.is_paused and landing.follower.state.serving is None
            source.may_go.set()
            report = publication.wait()
            done = landing.engine.generate(PROMPT, NUM_TOKENS)
            assert (done.token_ids, done.weight_version) == (greedy_tokens(second.model), version_label(report.version))
            wait_until(lambda: landing.phase == "serving", "the last state", 5)
            assert not landing.engine.gate.is_paused
        finally:
            source.may_go.set()
            landing.close()


def test_a_publisher_of_another_model_is_refused_with_nothing_touched(first: Checkpoint, second: Checkpoint) -> None:
    short = dict(second.tensors)
    lost = short.popitem()[0]
    engine = TransformersEngine(first.folder)
    with (
        WeightPublisher(TensorSource(short), "tcp://127.0.0.1:0", timeout_s=30) as publisher,
        WeightSubscriber(publisher.address, into=engine.own_tensors()) as subscriber,
    ):
        publisher.wait_for_subscribers(1, 20)
        with pytest.raises(EngineError, match=lost):
            publisher.publish(1)
        with pytest.raises(ModelMismatch, match=lost):
            InPlaceFollower(engine, subscriber).step(5)
    assert engine.generate(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(first.model)


def test_to_wait_for_an_announcement_is_for_those_who_land_in_place() -> None:
    with WeightSubscriber("tcp://127.0.0.1:1") as subscriber, pytest.raises(ConfigError, match="without into"):
        subscriber.wait_announced(0.1)


@pytest.mark.parametrize("where", [(), ("--publisher", "/shared/versions")], ids=["nobody", "a store"])
def test_the_server_says_where_it_cannot_be_had(where: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--in-place: .* give its address as --publisher"):
        main(["--model", str(tmp_path), "--port", "0", "--in-place", *where])


def test_a_store_is_refused_by_name(first: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="into does not apply to store"):
        FollowerThread(TransformersEngine(first.folder), "store", pause_mode="wait", in_place=True)


def test_the_server_lands_versions_in_its_model(first: Checkpoint, second: Checkpoint) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with embedded_server(first.folder, "--publisher", address, "--in-place") as client:
        ServerUnderTest(client, address, members=1).offer(second.tensors)
        assert client.complete(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)
        status = httpx.get(client.url + "/version", trust_env=False).json()
        assert (status["num_updates"], status["phase"], status["is_paused"]) == (1, "serving", False)
