"""Engines that prepare for what is staged: the fleet hears of a version only when they have, over real sockets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, make_model

from weightcast.sync import HostShare, PublishReport, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import DeadlineExceeded, EngineError, PeerLost, VersionError

TCP = "tcp://127.0.0.1:0"
MODEL = make_model(5)


@contextmanager
def pair(**more: object) -> Iterator[tuple[WeightPublisher, WeightSubscriber]]:
    """A publisher, and one engine that prepares."""
    with (
        WeightPublisher(TensorSource(MODEL), TCP) as publisher,
        WeightSubscriber(publisher.address, engine="careful", limits=LIMITS, prepares=True, **more) as subscriber,  # type: ignore[arg-type]
    ):
        publisher.wait_for_subscribers(1)
        yield publisher, subscriber


class Publish(threading.Thread):
    """A publish under way, as a trainer waits for it."""

    def __init__(self, publisher: WeightPublisher, number: int, timeout_s: float = WAIT_S) -> None:
        super().__init__()
        self._publication = publisher.begin(number, timeout_s=timeout_s)
        self.report: PublishReport | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.report = self._publication.wait()
        except (DeadlineExceeded, EngineError) as error:
            self.error = error


def test_a_version_is_not_released_before_the_engine_is_prepared() -> None:
    with pair() as (publisher, subscriber):
        publish = Publish(publisher, 1)
        preview = subscriber.preview(WAIT_S)
        assert_same_bits(dict(preview), MODEL)
        with pytest.raises(DeadlineExceeded, match="is staged, and the engine prepares for it"):
            subscriber.wait(0.3)
        assert subscriber.released is None and publisher.fleet()[0].staged is None
        assert preview.accept(read=True) and len(preview) == 0
        with pytest.raises(VersionError, match="was accepted or refused already"):
            preview.refuse("too late")
        update = subscriber.wait(WAIT_S)
        assert (update.version, len(update), update.specs) == (preview.version, 0, preview.specs)
        with pytest.raises(DeadlineExceeded):
            subscriber.preview(0.1)  # it loads one
        update.commit()
        publish.join(WAIT_S)
        assert publish.report is not None and publish.report.serving == ("careful",)


def test_tensors_that_are_still_needed_come_with_the_update() -> None:
    with pair(share=HostShare("workers")) as (publisher, subscriber):
        for number, read in ((1, False), (2, True), (3, False)):
            publish = Publish(publisher, number)
            preview = subscriber.preview(WAIT_S)
            assert_same_bits(dict(preview), MODEL)
            assert preview.accept(read=read)
            update = subscriber.wait(WAIT_S)
            if not read:
                assert_same_bits(dict(update), MODEL)
            update.commit()
            publish.join(WAIT_S)
            assert publish.error is None


def test_a_version_that_cannot_be_prepared_is_refused_before_anybody_serves_it() -> None:
    with pair() as (publisher, subscriber):
        publish = Publish(publisher, 1)
        subscriber.preview(WAIT_S).refuse("no kernel takes it")
        publish.join(WAIT_S)
        assert isinstance(publish.error, EngineError) and "no kernel takes it" in str(publish.error)
        assert subscriber.serving is None
        publish = Publish(publisher, 2)
        assert subscriber.preview(WAIT_S).accept(read=False)
        subscriber.wait(WAIT_S).commit()
        publish.join(WAIT_S)
        assert publish.error is None


def test_a_newer_version_replaces_one_that_is_being_prepared() -> None:
    with pair() as (publisher, subscriber):
        late = Publish(publisher, 1, timeout_s=1.0)
        old = subscriber.preview(WAIT_S)
        late.join(WAIT_S)
        assert isinstance(late.error, DeadlineExceeded)
        publish = Publish(publisher, 2)
        while (new := subscriber.preview(WAIT_S)).version == old.version:
            pass
        assert not old.accept(read=True)
        assert new.accept(read=True)
        update = subscriber.wait(WAIT_S)
        assert update.version.number == 2
        update.commit()
        publish.join(WAIT_S)
        assert publish.error is None


def test_closing_ends_whoever_waits_for_a_version_to_prepare() -> None:
    with pair() as (publisher, subscriber):
        publish = Publish(publisher, 1, timeout_s=1.0)
        preview = subscriber.preview(WAIT_S)
        subscriber.close()
        assert not preview.accept(read=True)
        with pytest.raises(PeerLost, match="the subscriber was closed"):
            subscriber.preview(WAIT_S)
        publish.join(WAIT_S)
        assert publisher.fleet() == ()
