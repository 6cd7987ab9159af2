"""The SGLang updater against the stand-in that we ship: its routes over HTTP, its receiving over real gloo groups."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from tests.adapters.conftest import Checkpoint
from tests.adapters.trainer_side import wait_until

from weightcast.adapters.engine import specs_of, version_label
from weightcast.adapters.sglang.client import SGLangClient
from weightcast.adapters.sglang.conformance_server import ConformanceServer
from weightcast.adapters.sglang.engine import SGLangEngine, follow
from weightcast.adapters.sglang.updater import SGLangTarget, SGLangUpdater
from weightcast.sync import DiskPublisher, FleetPolicy, ModuleSource, WeightPublisher
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, ModelMismatch, PeerLost
from weightcast.sync.version import Version

KEY = "a key"
PROMPT = (1, 2, 3)
TIMEOUT_S = 60.0

Tensors = dict[str, torch.Tensor]


def make_tensors(seed: int) -> Tensors:
    """Every element size in a mixed order, scalars and empty tensors among them."""
    torch.manual_seed(seed)
    return {
        "a.codes": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
        "a.weight": torch.randn(33, 5).to(torch.bfloat16),
        "a.scale": torch.randn(()),
        "b.blocks": torch.randn(9).to(torch.float8_e4m3fn),
        "b.none": torch.empty(0, 4),
        "b.bias": torch.randn(3, dtype=torch.float64),
        "c.weight": torch.randn(40, 40),
    }


def sums_of(tensors: Tensors) -> dict[str, str]:
    """What the stand-in says of the same tensors."""
    return {
        name: xxhash.xxh3_128_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        for name, tensor in sorted(tensors.items())
    }


@pytest.fixture(scope="module")
def started() -> Iterator[list[ConformanceServer]]:
    """Two engines, one of them of two workers."""
    with ConformanceServer(tp_size=2, admin_key=KEY) as one, ConformanceServer(tp_size=1, admin_key=KEY) as two:
        yield [one, two]


@pytest.fixture
def servers(started: list[ConformanceServer]) -> list[ConformanceServer]:
    """The engines, without what another test left of a session."""
    for server in started:
        server.state.workers.ask("end_weight_update", {})
        server.state.is_paused = False
    return started


@pytest.fixture
def clients(servers: list[ConformanceServer]) -> Iterator[list[SGLangClient]]:
    """A client of each."""
    made = [SGLangClient(server.url, admin_key=KEY, timeout_s=TIMEOUT_S) for server in servers]
    yield made
    for client in made:
        client.close()


def make_updater(clients: list[SGLangClient], group_name: str, **options: Any) -> SGLangUpdater:
    """One group for all."""
    targets = [SGLangTarget(f"engine-{i}", client, 2 - i) for i, client in enumerate(clients)]
    return SGLangUpdater(targets, backend="gloo", group_name=group_name, **({"timeout_s": TIMEOUT_S} | options))


@pytest.mark.parametrize("bucket_bytes", [None, 1, 600, 1 << 20])
def test_every_worker_of_every_engine_gets_every_bit(
    servers: list[ConformanceServer], clients: list[SGLangClient], bucket_bytes: int | None
) -> None:
    with make_updater(clients, f"bits-{bucket_bytes}", bucket_bytes=bucket_bytes) as updater:
        for number in (1, 2):
            tensors = make_tensors(number)
            if bucket_bytes is None:
                with pytest.raises(ConfigError, match=r"b\.blocks is torch\.float8_e4m3fn"):
                    updater.update("0", specs_of(tensors.items()), tensors.__getitem__)
                del tensors["b.blocks"]
            label = f"{bucket_bytes}.{number}"
            num_bytes = updater.update(label, specs_of(tensors.items()), tensors.__getitem__, pause="retract")
            assert num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            for server, client in zip(servers, clients, strict=True):
                ranks = [answer["checksums"] for answer in server.state.workers.ask("weights_checker", {})]
                assert len(ranks) == len(server.state.workers.processes)
                assert ranks == [sums_of(tensors)] * len(ranks)
                assert client.weight_version() == label and not server.state.is_paused


def test_an_update_is_the_calls_that_sglang_wants_in_their_order(
    servers: list[ConformanceServer], clients: list[SGLangClient]
) -> None:
    tensors = make_tensors(3)
    with make_updater(clients[:1], "order", bucket_bytes=100) as updater:
        updater.connect()
        servers[0].state.log.clear()
        updater.update("7", specs_of(tensors.items()), tensors.__getitem__, pause="abort")
        calls = [route for route, _ in servers[0].state.log]
        updates = [body for route, body in servers[0].state.log if route == "update_weights_from_distributed"]
        expected = ["pause_generation", "begin_weight_update", *["update_weights_from_distributed"] * len(updates)]
        assert calls == [*expected, "end_weight_update", "flush_cache", "continue_generation"]
        assert len(updates) > 2 and [body.get("weight_version") for body in updates[:-1]] == [None] * (len(updates) - 1)
        assert updates[-1]["weight_version"] == "7"
        assert not any(body["flush_cache"] for body in updates)
        assert {body["load_format"] for body in updates} == {"flattened_bucket"}


def test_keys_routes_and_absent_servers(servers: list[ConformanceServer], clients: list[SGLangClient]) -> None:
    assert clients[0].is_healthy()
    with SGLangClient(servers[0].url, admin_key="wrong") as stranger, pytest.raises(ConfigError, match="admin_key"):
        stranger.begin_weight_update()
    with SGLangClient(servers[0].url) as stranger, pytest.raises(ConfigError, match="refuses the key"):
        stranger.pause("abort")
    with pytest.raises(ConfigError, match="has no route /nowhere"):
        clients[0]._call("POST", "/nowhere")
    with SGLangClient("http://127.0.0.1:9") as nobody:
        assert not nobody.is_healthy()
        with pytest.raises(PeerLost, match="still running"):
            nobody.weight_version()
    clients[0].update_weight_version("by hand")
    assert clients[0].weight_version() == "by hand"
    assert servers[0].state.log[-1] == (
        "update_weight_version",
        {"new_version": "by hand", "abort_all_requests": False},
    )


def test_what_sglang_refuses_is_an_error_with_its_reason(clients: list[SGLangClient]) -> None:
    with pytest.raises(EngineError, match="no weight-update session is open"):
        clients[0].end_weight_update()
    with pytest.raises(EngineError, match=r"does not exist"):
        clients[0].destroy_group("unknown")
    with pytest.raises(EngineError, match="must run between begin_weight_update"):
        clients[0].update_from_distributed({"names": [], "dtypes": [], "shapes": []})


def test_an_unaligned_bucket_would_be_refused_as_sglang_does(clients: list[SGLangClient]) -> None:
    clients[1].begin_weight_update()
    with make_updater(clients[1:], "unaligned") as updater:
        updater._engines = (SGLangTarget("engine-1", clients[1], 1),)
        updater._offsets, updater._size = {"engine-1": 1}, 2
        updater.connect()
        body = {
            "names": ["byte", "word"],
            "dtypes": ["uint8", "float32"],
            "shapes": [[1], [1]],
            "load_format": "flattened_bucket",
            "group_name": updater.group_name,
        }
        with pytest.raises(EngineError, match="Unaligned received tensor word: byte offset 1"):
            clients[1].update_from_distributed(body)
    clients[1].end_weight_update()


def test_an_engine_that_refuses_breaks_the_broadcast_off_and_is_named(clients: list[SGLangClient]) -> None:
    tensors = make_tensors(4)
    with make_updater(clients, "refusing", bucket_bytes=600) as updater:
        updater.connect()
        clients[1].begin_weight_update()
        with pytest.raises(EngineError, match=r"engine-1: .*already open"):
            updater.update("8", specs_of(tensors.items()), tensors.__getitem__)
        clients[0].end_weight_update()
        clients[1].end_weight_update()
        clients[1].destroy_group(updater.group_name)
        start_s = time.monotonic()
        with pytest.raises(EngineError, match=r"engine-[01]: .*parts of two versions and are left paused"):
            updater.update("9", specs_of(tensors.items()), tensors.__getitem__)
        assert time.monotonic() - start_s < TIMEOUT_S / 2
        assert updater.poisoned == {"engine-0", "engine-1"} and not updater.is_connected


def test_a_worker_that_is_lost_does_not_hang_the_trainer_and_a_new_engine_is_met() -> None:
    tensors = make_tensors(5) | {"large": torch.randn(1 << 22)}
    specs = specs_of(tensors.items())
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with ConformanceServer() as server, SGLangClient(server.url, timeout_s=TIMEOUT_S) as client:
            targets = [SGLangTarget("engine-0", client)]
            with SGLangUpdater(targets, backend="gloo", timeout_s=5.0) as updater:
                updater.update("1", specs, tensors.__getitem__)
                os.kill(server.state.workers.processes[0].pid, number)
                start_s = time.monotonic()
                with pytest.raises((EngineError, DeadlineExceeded, PeerLost)):
                    updater.update("2", specs, tensors.__getitem__)
                assert time.monotonic() - start_s < 9.0
    with (
        ConformanceServer() as server,
        SGLangClient(server.url, timeout_s=TIMEOUT_S) as client,
        SGLangUpdater([SGLangTarget("engine-0", client)], backend="gloo", timeout_s=TIMEOUT_S) as updater,
    ):
        updater.update("3", specs, tensors.__getitem__)
        assert client.weight_version() == "3"


def test_workers_that_do_not_come_are_a_deadline() -> None:
    with ConformanceServer() as server, SGLangClient(server.url) as client:
        updater = SGLangUpdater([SGLangTarget("engine-0", client, num_workers=2)], backend="gloo", timeout_s=2.0)
        with pytest.raises(DeadlineExceeded):
            updater.connect()
        assert not updater.is_connected


def test_tensors_that_are_not_what_was_announced_are_refused_before_they_are_sent(clients: list[SGLangClient]) -> None:
    tensors = make_tensors(6)
    specs = specs_of(tensors.items())
    with make_updater(clients[:1], "announced") as updater:
        tensors["c.weight"] = tensors["c.weight"][:-1]
        with pytest.raises(EngineError, match=r"c\.weight is torch\.float32 \[39, 40\]"):
            updater.update("9", specs, tensors.__getitem__)
    clients[0].end_weight_update()


@pytest.mark.parametrize("place", ["address", "store"])
def test_a_server_follows_a_publisher(place: str, first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    source = ModuleSource(second.model)
    with (
        ConformanceServer(tp_size=2, admin_key=KEY) as server,
        SGLangClient(server.url, admin_key=KEY) as client,
        WeightPublisher(source, "tcp://127.0.0.1:0", timeout_s=TIMEOUT_S)
        if place == "address"
        else DiskPublisher(source, tmp_path / "store", timeout_s=TIMEOUT_S, policy=FleetPolicy.all()) as publisher,
    ):
        to = publisher.address if isinstance(publisher, WeightPublisher) else publisher.place

        def run() -> None:
            try:
                follow(
                    *(server.url, to, stop),
                    num_workers=2,
                    backend="gloo",
                    bucket_bytes=1 << 16,
                    admin_key=KEY,
                    model=first.folder,
                    events=tmp_path / "events.jsonl",
                )
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            publisher.wait_for_subscribers(1)
            report = publisher.publish(1)
            wait_until(
                lambda: client.weight_version() == version_label(report.version), "the label", timeout_s=TIMEOUT_S
            )
            held = [answer["checksums"] for answer in server.state.workers.ask("weights_checker", {})]
            assert held == [sums_of({n: t.detach() for n, t in second.tensors.items()})] * 2
        finally:
            stop.set()
            thread.join(TIMEOUT_S)
        assert errors == [] and '"serving"' in (tmp_path / "events.jsonl").read_text()


def test_the_engine_refuses_a_set_that_its_checkpoint_has_not(clients: list[SGLangClient]) -> None:
    tensors = make_tensors(7)
    with make_updater(clients[:1], "engine") as updater:
        engine = SGLangEngine(updater, clients[0], expect=specs_of(tensors.items()))
        version = Version(1, 1)
        with pytest.raises(ModelMismatch, match=r"c\.weight"):
            engine.prepare(version, specs_of(list(tensors.items())[:-1]))
        with pytest.raises(ConfigError, match="choose one of abort, keep"):
            engine.pause("wait", 1.0)
        engine.prepare(version, specs_of(tensors.items()))
        engine.pause("keep", 10.0)
        engine.load(version, tensors.items())
        engine.resume()
        before = engine.generate(PROMPT, 5)
        assert before.weight_version == "1.1" and len(before.token_ids) == 5 and before.finish_reason == "length"
        tensors["a.codes"][0, 0] ^= 1
        engine.pause("abort", 10.0)
        engine.load(Version(1, 2), tensors.items())
        engine.resume()
        assert engine.generate(PROMPT, 5).token_ids != before.token_ids
