"""Versions that land in the engine's own tensors, over real sockets and memory: where, when, and of which model."""

import time

import pytest
import torch
from tests.sync.in_place_parts import (
    CHUNK_BYTES,
    COLUMNS,
    TORN,
    Fused,
    bump,
    copy_of,
    land,
    landing,
    make_layers,
    publishing,
)
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, bits, wait_until

from weightcast.sync import WeightPublisher, WeightSubscriber
from weightcast.sync.errors import (
    ConfigError,
    EngineError,
    ModelMismatch,
    SourceError,
    WireError,
)
from weightcast.sync.in_place import Held


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


def test_nothing_is_written_before_the_engine_waits_and_the_fleet_does_not_miss_it(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    before = copy_of(into)
    with (
        WeightPublisher(TensorSource(tensors), ipc, timeout_s=WAIT_S, lost_after_s=1.0) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS, into=into) as subscriber,
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


def test_tied_weights_land_once_and_must_have_one_value(ipc: str) -> None:
    tensors = make_layers(1)
    tensors["lm_head.weight"] = tensors["embed.weight"].clone()
    into = Fused().views()
    into = {"lm_head.weight": into["embed.weight"]} | into
    with (
        publishing(tensors, ipc) as publisher,
        landing(ipc, into) as subscriber,
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


def test_another_model_is_refused_with_nothing_written(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    into |= {"norm.weight": torch.zeros(6, dtype=torch.bfloat16), "more": torch.zeros(1)}
    with (
        WeightPublisher(TensorSource(tensors), ipc, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS, into=into) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1)
        lines = r"more: expected, .*norm.weight: expected bfloat16 \[6\], the publisher has bfloat16 \[5\]"
        with pytest.raises(ModelMismatch, match=lines):
            subscriber.wait(WAIT_S)
        with pytest.raises(EngineError, match="expected bfloat16"):
            publication.wait()
        assert subscriber.held == Held() and not bits(into["embed.weight"]).any()


def test_a_transport_that_cannot_be_had_is_refused_though_it_was_announced_before(ipc: str) -> None:
    tensors, into = make_layers(1), Fused().views()
    with (
        WeightPublisher(TensorSource(tensors), ipc, expose=(), timeout_s=WAIT_S) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS, into=into, transport="shared_memory") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        with pytest.raises(EngineError, match="'shared_memory' cannot be had"):
            publisher.publish(1)
        with pytest.raises(WireError, match="'shared_memory' cannot be had"):
            subscriber.wait(1.0)
        assert subscriber.held == Held()


def test_tensors_that_were_given_other_memory_are_not_waited_with(ipc: str) -> None:
    into = {"w": torch.nn.Parameter(torch.zeros(4, 3))}
    with WeightSubscriber(ipc, engine="e", limits=LIMITS, into=into) as subscriber:
        into["w"].data = torch.zeros(4, 3)
        with pytest.raises(ConfigError, match=r"into\['w'\] was given other memory: .*make a new subscriber"):
            subscriber.wait(0.1)


@pytest.mark.usefixtures("as_gpu")
def test_runs_land_in_views_where_a_stand_in_is_the_gpu(ipc: str) -> None:
    tensors, engine = make_layers(1), Fused()
    into = engine.views()
    options = {"into": into, "device": "cpu"}
    with (
        publishing(tensors, ipc, expose=("cuda_ipc",)) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS, transport="cuda_ipc", **options) as subscriber,  # type: ignore[arg-type]
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
        publishing(tensors, ipc, expose=("cuda_ipc",)) as publisher,
        WeightSubscriber(ipc, engine="e", limits=LIMITS, transport="zmq", into=into, device="cpu") as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            publication = publisher.begin(number)
            land(subscriber, into, tensors)
            assert publication.wait().engines[0].transport == "zmq"
            bump(tensors)
