"""A real vLLM server, fed by real publishers: one server for the whole file, because it takes half a minute to start.

The order of the tests does not matter: each publishes what it needs and reads what is served before.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.adapters.conftest import Checkpoint, free_port, make_checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import ServerUnderTest, TensorSource, wait_until

from weightcast.adapters.conformance import run_conformance
from weightcast.adapters.engine import parse_label, version_label
from weightcast.adapters.vllm.client import VLLMClient
from weightcast.adapters.vllm.driver import VLLMEngine
from weightcast.adapters.vllm.server import VLLMServer
from weightcast.sync import Version, WeightPublisher
from weightcast.sync.errors import DeadlineExceeded, EngineError, ModelMismatch

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Tied embeddings: the case in which vLLM's own reload leaves a CPU's output layer with the old weights."""
    return make_checkpoint(3, tmp_path_factory.mktemp("first"), tied=True)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(4, tmp_path_factory.mktemp("second"), tied=True)


@dataclass(frozen=True)
class Rig:
    """The server, the one address that it may follow, and the events of its worker."""

    client: VLLMClient
    address: str
    events: Path

    def tokens(self) -> tuple[int, ...]:
        return self.client.complete(PROMPT, NUM_TOKENS).token_ids


@pytest.fixture(scope="module")
def rig(first: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("vllm")
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = {"publisher": address, "events": str(folder / "worker.jsonl")}
    flags = ["--enforce-eager"]
    with VLLMServer(
        first.folder, log_path=folder / "log", dtype="float32", max_model_len=256, arguments=flags, settings=settings
    ) as server:
        yield Rig(server.client, address, folder / "worker.jsonl")


@contextmanager
def driver(rig: Rig, events: Path) -> Iterator[None]:
    """The driver as a process of its own."""
    command = [sys.executable, "-m", "weightcast.adapters.vllm.driver", "--engine", rig.client.url]
    command += ["--publisher", rig.address, "--events", str(events)]
    with subprocess.Popen(command) as process:
        try:
            yield
            assert process.poll() is None, "the driver ended before it was told to"
        finally:
            process.terminate()
            assert process.wait(20) == 0


def test_conformance(rig: Rig, first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    assert rig.tokens() == greedy_tokens(first.model), "vLLM and transformers must agree for the kit to mean anything"
    with driver(rig, tmp_path / "driver.jsonl"):
        engine = ServerUnderTest(rig.client, rig.address, members=2)
        tokens = greedy_tokens(second.model)
        run_conformance(engine, first.tensors, second.tensors, fresh_tokens=tokens, prompt=PROMPT)
    lines = [json.loads(line) for line in (tmp_path / "driver.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["prepare", "pause", "load", "resume", "serving"] * 2
    worker = [json.loads(line) for line in rig.events.read_text().splitlines()]
    assert [line["phase"] for line in worker][-6:] == ["prepare", "swap", "stage"] * 2


def test_the_report_of_a_version(rig: Rig, second: Checkpoint, tmp_path: Path) -> None:
    with (
        driver(rig, tmp_path / "driver.jsonl"),
        WeightPublisher(TensorSource(second.tensors), rig.address) as publisher,
    ):
        wait_until(lambda: len(publisher.fleet()) == 2, "worker and driver")
        report = publisher.publish(version=5, timeout_s=60)
        label = rig.client.weight_version()
    assert label == version_label(report.version)
    engines = {engine.engine: engine for engine in report.engines}
    assert {engine.state for engine in engines.values()} == {"serving"}
    assert engines["vllm"].num_bytes == sum(tensor.nbytes for tensor in second.tensors.values())
    assert engines["vllm"].checksums_checked >= len(second.tensors)
    assert 0 < engines["vllm/driver"].pause_s < 5
    assert [span.phase for span in engines["vllm/driver"].spans] == ["prepare", "pause", "load", "resume"]


@dataclass(frozen=True)
class Session:
    """A publisher whose version is staged and released, and an engine that no driver process drives."""

    engine: VLLMEngine
    label: str

    @property
    def version(self) -> Version:
        version = parse_label(self.label)
        assert version is not None
        return version


def take(session: Session) -> None:
    """What the follower does."""
    session.engine.prepare(session.version, ())
    session.engine.pause("wait", timeout_s=10)
    session.engine.load(session.version, ())
    session.engine.resume()


@contextmanager
def staged(rig: Rig, checkpoint: Checkpoint) -> Iterator[Session]:
    """Publish in a thread, as the trainer would wait for the engine, and hold the version before its load."""
    engine = VLLMEngine(rig.client, rig.address, staging_timeout_s=10)
    with WeightPublisher(TensorSource(checkpoint.tensors), rig.address, timeout_s=5) as publisher:
        engine.connect()
        publisher.wait_for_subscribers(1, 20)
        with pytest.raises(DeadlineExceeded, match="did not reach the fleet"):
            publisher.publish(version=1, timeout_s=2)  # nobody drives it: released, staged, not served
        released = publisher.fleet()[0].staged
        assert released is not None
        yield Session(engine, version_label(released))


def test_nothing_is_touched_before_the_load(rig: Rig, first: Checkpoint, second: Checkpoint) -> None:
    before, label = rig.tokens(), rig.client.weight_version()
    with staged(rig, second) as session:
        rig.client.start_weight_update()
        assert rig.tokens() == before  # the session is open, and the server serves
        with pytest.raises(ModelMismatch, match=r"asked for version '1\.1', the worker has staged"):
            rig.client.update_weights({"version": "1.1"})
        with pytest.raises(EngineError, match="without a matching start"):
            rig.client.finish_weight_update("1.1")
        assert (rig.tokens(), rig.client.weight_version()) == (before, label)
        rig.client.start_weight_update()  # the staged version was kept
        with pytest.raises(EngineError, match="finish_weight_update without a load"):
            rig.client.finish_weight_update("1.1")
        assert rig.client.weight_version() == label
        rig.client.update_weights({"version": session.label})
        rig.client.finish_weight_update(session.label)
    assert rig.tokens() == greedy_tokens(second.model)


def test_a_session_that_a_dead_driver_left_open_is_taken_over(rig: Rig, first: Checkpoint) -> None:
    with staged(rig, first) as session:
        rig.client.start_weight_update()  # and here the first driver dies
        take(session)
    assert rig.tokens() == greedy_tokens(first.model)
    assert rig.client.weight_version() == session.label


def test_a_worker_that_was_never_initialised_is_connected_by_its_driver(rig: Rig, second: Checkpoint) -> None:
    with staged(rig, second) as session:
        httpx.post(f"{rig.client.url}/shutdown_weight_transfer_engine", trust_env=False).raise_for_status()
        with pytest.raises(ModelMismatch, match="the worker follows no publisher; post init_weight_transfer_engine"):
            rig.client.start_weight_update()
        take(session)  # the publisher gives a late joiner the version that the fleet serves
    assert rig.tokens() == greedy_tokens(second.model)
    assert rig.client.weight_version() == session.label


def test_a_version_that_comes_too_late_for_a_pause_is_dropped(rig: Rig, first: Checkpoint) -> None:
    label, is_over = rig.client.weight_version(), threading.Event()

    def ask_on() -> list[int]:
        lengths = []
        while not is_over.is_set():
            answer = rig.client.complete(PROMPT, 240, n=8, temperature=1.0, ignore_eos=True)
            lengths.append(len(answer.token_ids))
        return lengths

    with staged(rig, first) as session, ThreadPoolExecutor(32) as pool:
        session.engine.prepare(session.version, ())
        asking = [pool.submit(ask_on) for _ in range(32)]
        try:
            with pytest.raises(DeadlineExceeded, match=r"/pause did not answer within 0\.1 s"):
                for _ in range(600):  # until one comes while requests run
                    session.engine.pause("wait", timeout_s=0.1)
                    session.engine.resume()
                    time.sleep(0.05)
        finally:
            is_over.set()
        assert {length for lengths in asking for length in lengths.result(60)} == {240}
        assert not rig.client.is_paused()
        assert rig.client.weight_version() == label
    with staged(rig, first) as session:
        take(session)
    assert rig.tokens() == greedy_tokens(first.model)


def test_a_worker_without_a_new_version_refuses_and_serves_on(rig: Rig) -> None:
    before = rig.tokens()
    VLLMEngine(rig.client, rig.address, staging_timeout_s=0.5).connect()
    with pytest.raises(
        ModelMismatch, match=r"engine memory is untouched: DeadlineExceeded: engine 'vllm' waited 0\.5 s"
    ):
        rig.client.start_weight_update()
    assert rig.tokens() == before


@pytest.mark.parametrize(
    ("init_info", "message"),
    [
        ({"publisher": "tcp://127.0.0.1:1"}, "this server takes weights from tcp://.* only, got tcp://127.0.0.1:1"),
        ({"publisher": 5600}, "publisher must be an address"),
        ({"publisher": "tcp://127.0.0.1:1", "timeout_s": 0}, "timeout_s must be a number of seconds above 0"),
        ({"publisher": "tcp://127.0.0.1:1", "port": 1}, "unexpected keyword argument 'port'"),
        ({}, "missing 1 required positional argument: 'publisher'"),
    ],
)
def test_an_init_that_cannot_be_met_is_explained(rig: Rig, init_info: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        rig.client.init_weight_transfer(init_info)


def test_an_operators_pause_outlasts_an_update(rig: Rig, second: Checkpoint) -> None:
    with staged(rig, second) as session:
        rig.client.pause("wait", timeout_s=10)
        take(session)
        assert rig.client.is_paused()
        rig.client.resume()
    assert rig.tokens() == greedy_tokens(second.model)
