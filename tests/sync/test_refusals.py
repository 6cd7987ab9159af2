"""Refusals over real sockets: what must not be served is not, and both sides are told why, by name."""

import threading
import time
from pathlib import Path

import pytest
import torch
import zmq
from tests.sync.parts import (
    LIMITS,
    WAIT_S,
    Engine,
    TensorSource,
    make_model,
    make_specs,
    on_all,
    publishers,
    random_bits,
    running,
)

from weightcast.sync import (
    PublishReport,
    Region,
    TensorSpec,
    Version,
    WeightPublisher,
    WeightSubscriber,
)
from weightcast.sync.errors import (
    AddressError,
    DeadlineExceeded,
    EngineError,
    ModelMismatch,
    PeerLost,
    SourceError,
)
from weightcast.sync.roster import Outgoing

CHUNK_BYTES = 4096
TCP = "tcp://127.0.0.1:0"


def test_the_deadline_names_the_engine_that_does_not_commit() -> None:
    with WeightPublisher(TensorSource(make_model(9)), TCP) as publisher:
        quick = Engine("quick", publisher.address)
        with running(quick), WeightSubscriber(publisher.address, engine="stuck", limits=LIMITS) as stuck:
            publisher.wait_for_subscribers(2)
            with pytest.raises(DeadlineExceeded, match="stuck is staged") as caught:
                publisher.publish(1, timeout_s=1.0)
            assert "quick is serving" in str(caught.value) and "deadline 1 s" in str(caught.value)
            stuck.wait(WAIT_S).commit()
            follower = threading.Thread(target=lambda: stuck.wait(WAIT_S).commit())
            follower.start()
            assert len(publisher.publish(2, timeout_s=WAIT_S).serving) == 2
            follower.join()


def test_an_engine_that_rejects_is_heard() -> None:
    with WeightPublisher(TensorSource(make_model(10)), TCP, timeout_s=WAIT_S) as publisher:
        good = Engine("good", publisher.address)
        bad = Engine("bad", publisher.address, refuse="no room in the cache")
        with running(good, bad):
            publisher.wait_for_subscribers(2)
            with pytest.raises(EngineError, match=r"bad is refused \(no room in the cache\)"):
                publisher.publish(1)
    assert good.numbers == [1] and bad.numbers == []


@pytest.mark.parametrize("difference", ["missing", "extra", "shape", "dtype"])
def test_an_engine_of_another_model_is_told_on_both_sides(difference: str) -> None:
    tensors = make_model(11)
    expect = make_specs(tensors)
    name = "norm.weight"
    if difference == "missing":
        expect = [spec for spec in expect if spec.name != name]
    elif difference == "extra":
        name = "lm_head.weight"
        expect.append(TensorSpec(name, torch.bfloat16, (5,)))
    else:
        changed = (
            TensorSpec(name, torch.bfloat16, (6,)) if difference == "shape" else TensorSpec(name, torch.half, (5,))
        )
        expect = [changed if spec.name == name else spec for spec in expect]
    with (
        WeightPublisher(TensorSource(tensors), TCP, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(publisher.address, engine="other", expect=expect, limits=LIMITS) as subscriber,
    ):
        for _ in range(2):
            with pytest.raises(ModelMismatch, match=f"'other' .* {name}: "):
                subscriber.wait(WAIT_S)
        with pytest.raises(EngineError, match=f"other is refused .*{name}"):
            publisher.publish(1)
        assert subscriber.serving is None


def test_an_address_in_use_is_refused(address: str) -> None:
    tensors = make_model(12)
    with WeightPublisher(TensorSource(tensors), address) as first:
        with pytest.raises(AddressError, match="in use by another process"):
            WeightPublisher(TensorSource(tensors), first.address)
        engine = Engine("engine-0", first.address)
        with running(engine):
            first.wait_for_subscribers(1, WAIT_S)
            assert first.publish(1).serving == ("engine-0",)


def test_a_stale_ipc_file_is_no_obstacle(ipc: str) -> None:
    Path(ipc.removeprefix("ipc://")).touch()
    with WeightPublisher(TensorSource(make_model(13)), ipc) as publisher:
        assert publisher.publish(1).version.number == 1


def test_sources_that_make_no_whole_model_are_refused_by_name() -> None:
    tensors = {"w": random_bits(torch.float32, (8, 2), 1)}
    source = TensorSource(tensors, regions=[Region("w", (0, 0), (5, 2))])
    with WeightPublisher(source, TCP) as publisher, pytest.raises(SourceError, match="w: 10 of 16 elements are held"):
        publisher.publish(1)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (TensorSource({"w": torch.zeros(4)}, 1, 2), "lists other tensors than rank 0"),
        (TensorSource({"w": torch.zeros(8)}, 1, 3), "rank 1 of 3 joined a publisher of 2"),
        (TensorSource({"w": torch.zeros(8)}, 1, 2, [Region("w", (1,), (3,))]), "overlaps"),
    ],
)
def test_every_rank_hears_of_a_source_that_does_not_fit(other: TensorSource, match: str) -> None:
    first = TensorSource({"w": torch.zeros(8)}, 0, 2)
    with WeightPublisher(first, TCP, timeout_s=WAIT_S) as zero, WeightPublisher(other, zero.address) as one:
        for error in on_all([zero, one], lambda publisher: publisher.publish(1)):
            assert isinstance(error, SourceError) and match in str(error), error


def test_a_missing_rank_is_named() -> None:
    source = TensorSource({"w": torch.zeros(8)}, 0, 3)
    with WeightPublisher(source, TCP) as publisher, pytest.raises(DeadlineExceeded, match=r"source ranks \[1, 2\]"):
        publisher.publish(1, timeout_s=0.3)


def test_a_rank_that_does_not_publish_is_named() -> None:
    with publishers(make_model(14), 2, TCP) as made:
        with pytest.raises(DeadlineExceeded, match=r"not packed in time by the source ranks \[1\]"):
            made[0].publish(1, timeout_s=0.5)
        reports = on_all(made, lambda publisher: publisher.publish(2, timeout_s=WAIT_S))
        assert all(isinstance(report, PublishReport) for report in reports), reports


def test_a_publisher_that_closes_at_once_is_heard_by_all() -> None:
    def publish(publisher: WeightPublisher) -> PublishReport:
        report = publisher.publish(1)
        publisher.close()
        return report

    for _ in range(3):
        with publishers(make_model(15), 2, TCP, timeout_s=WAIT_S) as made:
            engine = Engine("engine-0", made[0].address)
            with running(engine):
                reports = on_all(made, publish)
                assert all(isinstance(report, PublishReport) for report in reports), reports
                # Were the goodbye lost, silence would be noticed in the end, and said in other words.
                deadline_s = time.monotonic() + WAIT_S
                while not engine.errors and time.monotonic() < deadline_s:
                    time.sleep(0.01)
                assert [type(error) for error in engine.errors] == [PeerLost]
                assert "the publisher was closed" in str(engine.errors[0])


def test_a_publisher_whose_link_was_ended_can_be_closed() -> None:
    with publishers(make_model(15), 2, TCP, timeout_s=WAIT_S) as (_, one):
        link = one._loop

        def end(now_s: float) -> list[Outgoing]:
            raise zmq.Again

        link.submit(end)
        link._thread.join(WAIT_S)
        with pytest.raises(PeerLost, match="ended the link of source rank 1"):
            one.publish(1)
        one.close()


def test_a_publisher_of_an_older_epoch_is_fenced() -> None:
    tensors = make_model(16)
    with WeightPublisher(TensorSource(tensors), TCP, epoch=20) as newer:
        newer.publish(1)
        address = newer.address
        subscriber = WeightSubscriber(address, engine="e", limits=LIMITS)
        subscriber.wait(WAIT_S).commit()
    with subscriber, WeightPublisher(TensorSource(make_model(17)), address, epoch=19, timeout_s=WAIT_S) as older:
        older.wait_for_subscribers(1)
        with pytest.raises(EngineError, match="has met a later publisher"):
            older.publish(9)
        with pytest.raises((DeadlineExceeded, PeerLost)):
            subscriber.wait(0.2)
        assert subscriber.serving == subscriber.released == Version(20, 1)
