"""Versions that land in the engine's own tensors, over real sockets and memory: whole, torn, and whole again."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests.sync.host_driver import HostDriver
from tests.sync.middle import Middle, pass_on
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, bits, make_model, random_bits
from tests.sync.peer import Peer
from tests.sync.table_runner import run_by_numpy

from weightcast.sync import FleetPolicy, TensorSpec, WeightPublisher, WeightSubscriber, device_passes
from weightcast.sync.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    ModelMismatch,
    PeerLost,
    SourceError,
    WireError,
)
from weightcast.sync.in_place import Held
from weightcast.sync.transports import cuda_ipc

CHUNK_BYTES = 4096
ROWS, COLUMNS = 24, 136
TORN = "are torn: .*do not serve from them; wait"


def make_layers(seed: int) -> dict[str, torch.Tensor]:
    """Names as a checkpoint has them, whose tensors an engine fuses; and a few of awkward kinds."""
    # Those of awkward sizes come last: what lies behind them in a source's memory is not aligned for a kernel.
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, rows) in enumerate((("q", 2 * ROWS), ("k", ROWS), ("v", ROWS), ("up", ROWS), ("gate", ROWS))):
        tensors[f"{name}_proj.weight"] = random_bits(torch.bfloat16, (rows, COLUMNS), 1000 * seed + number)
    for number, name in enumerate(("strided.weight", "direct.weight")):
        tensors[name] = random_bits(torch.bfloat16, (600, COLUMNS), 1000 * seed + 20 + number)
    for number in range(3):
        tensors[f"experts.{number}.weight"] = random_bits(torch.float32, (9, 5), 1000 * seed + 10 + number)
    return tensors | make_model(seed, rows=100)


def bump(tensors: Mapping[str, torch.Tensor]) -> None:
    """Change a few elements of every tensor."""
    for tensor in tensors.values():
        raw = bits(tensor) if tensor.is_contiguous() else tensor
        raw[::211] ^= 1


@dataclass
class Fused:
    """An engine's parameters: fused by rows (qkv), by columns (up and gate, with a margin), and by a dimension more."""

    qkv: torch.Tensor = field(default_factory=lambda: torch.zeros(4 * ROWS, COLUMNS, dtype=torch.bfloat16))
    wide: torch.Tensor = field(default_factory=lambda: torch.full((ROWS, 2 * COLUMNS + 8), 7.0, dtype=torch.bfloat16))
    large: torch.Tensor = field(default_factory=lambda: torch.zeros(600, 2 * COLUMNS + 6, dtype=torch.bfloat16))
    direct: torch.Tensor = field(default_factory=lambda: torch.zeros(700, COLUMNS, dtype=torch.bfloat16))
    experts: torch.Tensor = field(default_factory=lambda: torch.zeros(9, 3, 5))

    def views(self) -> dict[str, torch.Tensor]:
        """By the checkpoint's names."""
        into = {name: torch.zeros_like(tensor) for name, tensor in make_model(0, rows=100).items()}
        into["layer.0.weight"] = torch.nn.Parameter(into["layer.0.weight"])
        starts = {"q": 0, "k": 2 * ROWS, "v": 3 * ROWS}
        into |= {f"{n}_proj.weight": self.qkv[s : s + (2 if n == "q" else 1) * ROWS] for n, s in starts.items()}
        into["up_proj.weight"] = self.wide[:, :COLUMNS]
        into["gate_proj.weight"] = self.wide[:, COLUMNS + 8 :]
        into |= {"strided.weight": self.large[:, 3 : COLUMNS + 3], "direct.weight": self.direct[99:699]}
        return into | {f"experts.{number}.weight": self.experts[:, number] for number in range(3)}


def copy_of(into: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in into.items()}


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    yield f"ipc://{tmp_path}/publisher"


def land(subscriber: WeightSubscriber, into: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> int:
    """Wait for a version, which must be these tensors' and lie in the engine's own; the bytes that came for it."""
    update = subscriber.wait(WAIT_S)
    got = dict(update)
    assert all(got[name] is tensor for name, tensor in into.items()) and len(update) == len(into)
    assert_same_bits(got, tensors)
    assert subscriber.held == Held(update.version)
    update.commit()
    return update.stats.num_bytes


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 1 << 20], ids=["small", "large"])
@pytest.mark.parametrize("transport", ["zmq", "tcp", "shared_memory"])
def test_versions_land_in_views_of_fused_parameters(transport: str, chunk_bytes: int) -> None:
    tensors, engine = make_layers(1), Fused()
    into = engine.views()
    with (
        WeightPublisher(
            TensorSource(tensors),
            "tcp://127.0.0.1:0",
            chunk_bytes=chunk_bytes,
            delta="on",
            expose=("tcp", "shared_memory"),
            timeout_s=WAIT_S,
        ) as publisher,
        WeightSubscriber(publisher.address, engine="e", limits=LIMITS, into=into, transport=transport) as subscriber,
    ):
        assert subscriber.held == Held() and subscriber.announced is None
        publisher.wait_for_subscribers(1)
        for number in (1, 2, 3):
            publication = publisher.begin(number)
            num_bytes = land(subscriber, into, tensors)
            assert publication.wait().engines[0].transport == transport
            assert (
                number == 1 or transport == "shared_memory" or num_bytes < sum(t.nbytes for t in tensors.values()) / 4
            )
            assert bool((engine.wide[:, COLUMNS : COLUMNS + 8] == 7).all()), "what is not named stays as it is"
            assert not engine.large[:, :3].any() and not engine.large[:, COLUMNS + 3 :].any()
            assert not engine.direct[:99].any() and not engine.direct[699].any()
            bump(tensors)


def test_nothing_is_written_before_the_engine_waits_and_the_fleet_does_not_miss_it(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    before = copy_of(into)
    with (
        WeightPublisher(TensorSource(tensors), address, timeout_s=WAIT_S, lost_after_s=1.0) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        wait_until(lambda: subscriber.announced is not None)
        time.sleep(1.5)
        assert [engine.state(subscriber.announced) for engine in publisher.fleet()] == ["staging"]
        assert subscriber.held == Held()
        assert_same_bits(copy_of(into), before)
        land(subscriber, into, tensors)
        assert publication.wait().serving == ("e",) and subscriber.announced is None


def test_a_deadline_tears_and_the_next_wait_goes_on_where_it_was(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher,
        Middle(address) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(DeadlineExceeded, match=r"no version newer than None was announced$"):
            subscriber.wait(0.1)
        middle.alter = lambda index, header, body: [] if index == 3 else [[header, body]]
        publication = publisher.begin(1)
        with pytest.raises(DeadlineExceeded, match=f"version 1 .* lacks 1 chunks.*the tensors of engine 'e' {TORN}"):
            subscriber.wait(2.0)
        assert subscriber.held == Held(is_torn=True)
        middle.alter = pass_on
        torn = copy_of(into)
        time.sleep(2 * LIMITS.chunk_timeout_s)
        assert_same_bits(copy_of(into), torn)
        assert land(subscriber, into, tensors) < 1.5 * CHUNK_BYTES, "what had landed is not fetched again"
        assert publication.wait().serving == ("e",)


def test_a_delta_on_torn_tensors_begins_from_what_each_chunk_has(address: str) -> None:
    """Version 2 stops half way, and version 3 comes as what changed since 2 here and since 1 there."""
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
        ) as publisher,
        Middle(address) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into, transport="zmq") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        dense_bytes = land(subscriber, into, tensors)
        publication.wait()
        bump(tensors)
        middle.alter = lambda index, header, body: [] if index % 2 else [[header, body]]
        publication = publisher.begin(2, timeout_s=2.0)
        with pytest.raises(DeadlineExceeded, match=TORN):
            subscriber.wait(1.0)
        with pytest.raises(DeadlineExceeded, match="did not reach the fleet"):
            publication.wait()
        bump({name: tensor for name, tensor in tensors.items() if "proj" in name})
        middle.alter = pass_on
        publication = publisher.begin(3)
        assert land(subscriber, into, tensors) < dense_bytes / 4
        publication.wait()


def test_a_version_that_replaces_one_on_its_way_lands_over_it(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
        ) as publisher,
        Middle(address, lambda index, header, body: [] if index == 2 else [[header, body]]) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into, transport="zmq") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with ThreadPoolExecutor(1) as pool:
            landing = pool.submit(land, subscriber, into, tensors)
            with pytest.raises(DeadlineExceeded):
                publisher.publish(1, timeout_s=1.0)
            bump(tensors)
            middle.alter = pass_on
            assert publisher.publish(2).serving == ("e",)
            assert landing.result() < sum(tensor.nbytes for tensor in tensors.values()) / 2


def test_an_abandoned_version_is_not_to_be_served_and_the_next_one_begins_from_it(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    policy = FleetPolicy.all()
    other = [TensorSpec("other", torch.float32, (2,))]
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", policy=policy, timeout_s=WAIT_S
        ) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into, transport="zmq") as subscriber,
    ):
        with WeightSubscriber(address, engine="refuses", limits=LIMITS, expect=other):
            publisher.wait_for_subscribers(2)
            publication = publisher.begin(1)
            with pytest.raises(
                DeadlineExceeded, match=r"version 1 .*, which is whole and was not released; do not serve"
            ):
                subscriber.wait(3.0)
            with pytest.raises(EngineError, match="did not reach the fleet under the policy all"):
                publication.wait()
            assert subscriber.held == Held(is_torn=True) and subscriber.serving is None
        wait_until(lambda: len(publisher.fleet()) == 1)
        bump(tensors)
        publication = publisher.begin(2)
        assert land(subscriber, into, tensors) < sum(tensor.nbytes for tensor in tensors.values()) / 4
        assert publication.wait().serving == ("e",)


def test_what_the_engine_changed_itself_is_noticed_and_fetched(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
        ) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into, transport="zmq") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            publication = publisher.begin(number)
            num_bytes = land(subscriber, into, tensors)
            assert publication.wait().engines[0].num_repeats > 0 or number == 1
            into["gate_proj.weight"].mul_(3)
            bump(tensors)
        assert 0 < num_bytes < 5 * into["gate_proj.weight"].nbytes


def test_a_publisher_that_is_killed_leaves_torn_tensors_which_its_successor_makes_whole() -> None:
    rows = 5000
    into = {name: torch.zeros_like(tensor) for name, tensor in make_model(0, rows).items()}
    with Peer("publish", "tcp://127.0.0.1:0", 0, 1, rows) as publisher:
        address = publisher.hear()
        with (
            Middle(address) as middle,
            WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
        ):
            publisher.tell(version=1, engines=1)
            land(subscriber, into, make_model(1, rows))
            assert publisher.hear() == ["e"]
            middle.alter = lambda index, header, body: [[header, body]] if index < 2 else []
            publisher.tell(version=2, engines=1)
            with pytest.raises(DeadlineExceeded, match=TORN):
                subscriber.wait(1.0)
            publisher.signal(signal.SIGKILL)
            publisher.process.wait()
            with pytest.raises(PeerLost, match=f"was silent .* may not serve the tensors it landed in .*{TORN}"):
                subscriber.wait(WAIT_S)
            assert subscriber.held == Held(is_torn=True)
            middle.alter = pass_on
            with Peer("publish", address, 0, 1, rows) as successor:
                successor.hear()
                successor.tell(version=1, engines=1)
                land(subscriber, into, make_model(1, rows))
                assert successor.hear() == ["e"]


def test_damage_beyond_repair_tears_and_a_rejected_version_stays(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()

    def damage(index: int, header: bytes, body: bytes) -> list[list[bytes]]:
        return [[header, bytes([body[0] ^ 1]) + body[1:] if index == 1 else body]]

    with (
        WeightPublisher(TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as publisher,
        Middle(address, damage) as middle,
        WeightSubscriber(middle.address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        with pytest.raises(WireError, match=TORN):
            subscriber.wait(WAIT_S)
        with pytest.raises(EngineError):
            publication.wait()
        middle.alter = pass_on
        publication = publisher.begin(2)
        update = subscriber.wait(WAIT_S)
        update.reject("no")
        with pytest.raises(EngineError, match="no"):
            publication.wait()
        assert subscriber.serving is None and subscriber.held == Held(update.version)
        assert_same_bits(copy_of({name: into[name] for name in tensors}), tensors)


def test_tied_weights_land_once_and_must_have_one_value(address: str) -> None:
    tensors = make_layers(1)
    tensors["lm_head.weight"] = tensors["embed.weight"].clone()
    into = Fused().views()
    into = {"lm_head.weight": into["embed.weight"]} | into
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S
        ) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into, transport="zmq") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            publication = publisher.begin(number)
            num_bytes = land(subscriber, into, tensors)
            assert number == 1 or num_bytes < sum(tensor.nbytes for tensor in tensors.values()) / 4
            publication.wait()
            bump(tensors)
        tensors["embed.weight"].add_(1)
        publication = publisher.begin(3)
        says = (
            f"embed.weight and lm_head.weight are one tensor in engine 'e', and version 3 .* different values.*{TORN}"
        )
        with pytest.raises(SourceError, match=says):
            subscriber.wait(WAIT_S)
        with pytest.raises(EngineError, match="different values"):
            publication.wait()
        assert subscriber.held == Held(is_torn=True)
        tensors["lm_head.weight"].copy_(tensors["embed.weight"])
        publication = publisher.begin(4)
        land(subscriber, into, tensors)
        publication.wait()


def test_another_model_is_refused_with_nothing_written(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    into |= {"norm.weight": torch.zeros(6, dtype=torch.bfloat16), "more": torch.zeros(1)}
    with (
        WeightPublisher(TensorSource(tensors), address, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        lines = r"more: expected, .*norm.weight: expected bfloat16 \[6\], the publisher has bfloat16 \[5\]"
        with pytest.raises(ModelMismatch, match=lines):
            subscriber.wait(WAIT_S)
        with pytest.raises(EngineError, match="expected bfloat16"):
            publication.wait()
        assert subscriber.held == Held() and not bits(into["embed.weight"]).any()


def test_a_transport_that_cannot_be_had_is_refused_though_it_was_announced_before(address: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(TensorSource(tensors), address, expose=(), timeout_s=WAIT_S) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, into=into, transport="shared_memory") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(EngineError, match="'shared_memory' cannot be had"):
            publisher.publish(1)
        with pytest.raises(WireError, match="'shared_memory' cannot be had"):
            subscriber.wait(1.0)
        assert subscriber.held == Held()


def test_tensors_that_were_given_other_memory_are_not_waited_with(address: str) -> None:
    into = {"w": torch.nn.Parameter(torch.zeros(4, 3))}
    with WeightSubscriber(address, engine="e", limits=LIMITS, into=into) as subscriber:
        into["w"].data = torch.zeros(4, 3)
        with pytest.raises(ConfigError, match=r"into\['w'\] was given other memory: .*make a new subscriber"):
            subscriber.wait(0.1)


@pytest.mark.parametrize("runner", [None, run_by_numpy], ids=["by-torch", "by-tables"])
def test_runs_land_in_views_where_a_stand_in_is_the_gpu(
    address: str, monkeypatch: pytest.MonkeyPatch, runner: object
) -> None:
    driver = HostDriver()
    monkeypatch.setattr(device_passes, "find_runner", lambda device: runner)
    monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
    tensors, engine = make_layers(1), Fused()
    into = engine.views()
    options = {"into": into, "device": "cpu"}
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", expose=("cuda_ipc",), timeout_s=WAIT_S
        ) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, transport="cuda_ipc", **options) as subscriber,  # type: ignore[arg-type]
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2, 3):
            publication = publisher.begin(number)
            land(subscriber, into, tensors)
            assert publication.wait().engines[0].transport == "cuda_ipc"
            assert bool((engine.wide[:, COLUMNS : COLUMNS + 8] == 7).all())
            if number == 2:
                into["up_proj.weight"].add_(1)
            bump(tensors)
    into = Fused().views()
    with (
        WeightPublisher(
            TensorSource(tensors), address, chunk_bytes=CHUNK_BYTES, delta="on", expose=("cuda_ipc",), timeout_s=WAIT_S
        ) as publisher,
        WeightSubscriber(address, engine="e", limits=LIMITS, transport="zmq", into=into, device="cpu") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            publication = publisher.begin(number)
            land(subscriber, into, tensors)
            assert publication.wait().engines[0].transport == "zmq"
            bump(tensors)
