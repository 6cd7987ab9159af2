"""Versions that are copied while the trainer goes on, with its next step held back until they are."""

import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.sync.parts import LIMITS, WAIT_S, Engine, TensorSource, assert_same_bits, random_bits, running

from weightcast.sync import HeldRegion, Publication, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import SourceError

TCP = "tcp://127.0.0.1:0"


class SlowSource(TensorSource):
    """The view of its last tensor is there when `allowed` is set, or not at all once `broken` is set."""

    def __init__(self) -> None:
        super().__init__({name: random_bits(torch.bfloat16, (64, 32), seed) for seed, name in enumerate("abc")})
        self.allowed = threading.Event()
        self.broken = False

    def held(self) -> list[HeldRegion]:
        *others, last = super().held()
        return [*others, replace(last, live=partial(self._wait, last))]

    def _wait(self, held: HeldRegion) -> torch.Tensor:
        assert self.allowed.wait(WAIT_S)
        view = held.live()
        return view[:1] if self.broken else view


def is_packed_within(publication: Publication, seconds: float) -> bool:
    thread = threading.Thread(target=publication.settle, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def test_the_copy_goes_on_behind_and_packed_says_when_the_weights_may_change() -> None:
    source = SlowSource()
    with WeightPublisher(source, TCP, chunk_bytes=4096, timeout_s=WAIT_S, delta="on") as publisher:
        engine = Engine("e", publisher.address, limits=LIMITS)
        with running(engine):
            publisher.wait_for_subscribers(1)
            for number in (1, 2):
                source.allowed.clear()
                wanted = {name: tensor.clone() for name, tensor in source.tensors.items()}
                publication = publisher.begin(number, hold=True)
                assert not is_packed_within(publication, 0.2)
                source.allowed.set()
                pack = publication.packed()
                assert pack.phase == "pack" and pack.end_s - pack.start_s > 0.1
                for tensor in source.tensors.values():
                    tensor.view(torch.int16).add_(1)
                report = publication.wait()
                assert report.serving == ("e",) and report.phases_s["pack"] == pack.end_s - pack.start_s
                assert_same_bits(engine.tensors, wanted)


def test_a_copy_that_fails_is_raised_where_it_is_waited_for_and_the_next_version_goes_on() -> None:
    source = SlowSource()
    source.broken = True
    source.allowed.set()
    with (
        WeightPublisher(source, TCP, timeout_s=WAIT_S) as publisher,
        WeightSubscriber(publisher.address, engine="e", limits=LIMITS) as subscriber,
    ):
        publisher.wait_for_subscribers(1)
        publication = publisher.begin(1, hold=True)
        for wait in (publication.packed, publication.wait):
            with pytest.raises(SourceError, match=r"the live view of c.* has the shape"):
                wait()
        with pytest.raises(SourceError, match="the live view of c"):
            publisher.begin(2)
        source.broken = False
        publication = publisher.begin(3, hold=True)
        update = subscriber.wait(WAIT_S)
        assert update.version.number == 3
        assert_same_bits(dict(update), source.tensors)
        update.commit()
        assert publication.wait().serving == ("e",)


def test_a_publisher_is_closed_when_nobody_reads_the_weights_any_more() -> None:
    source = SlowSource()
    publisher = WeightPublisher(source, TCP, timeout_s=WAIT_S)
    publication = publisher.begin(1, hold=True)
    threading.Timer(0.3, source.allowed.set).start()
    started_s = time.monotonic()
    publisher.close()
    assert time.monotonic() - started_s > 0.2
    assert is_packed_within(publication, 0.0)
