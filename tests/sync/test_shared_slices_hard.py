"""Workers of one host that want slices, where memory, leases or the receiver fail, or all come and go in haste."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.sync.haste import check_haste
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, make_specs, wait_until
from tests.sync.slice_share import (
    CHUNK_BYTES,
    TCP,
    Subscribe,
    change,
    is_member,
    publish,
    transports,
)
from tests.sync.slice_wants import WantOf, assert_slices, make_layers, slices_of

from weightcast.sync import FleetPolicy, HostShare, Region, Update, WeightPublisher, WeightSubscriber
from weightcast.sync.cut_source import cut_source
from weightcast.sync.errors import ConfigError, StorageError
from weightcast.sync.host import leader as leaders
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.host.worker import HostWorker
from weightcast.sync.wanted import WantedRegions, whole


@pytest.mark.parametrize("is_staged", [True, False], ids=["with its version", "without"])
def test_the_heir_wants_boxes_that_the_one_before_did_not_receive(
    sharing: Subscribe, monkeypatch: pytest.MonkeyPatch, is_staged: bool
) -> None:
    """Its own version, received by itself, is not the host's; and what it lacks of the host's it fetches."""
    tensors = make_layers(8)
    wants = [slices_of(rank, 4) for rank in range(2)]
    specs = tuple(make_specs(tensors))
    source = cut_source(TensorSource(tensors), [want(specs) for want in wants])
    with WeightPublisher(source, TCP, chunk_bytes=CHUNK_BYTES, delta="on", timeout_s=WAIT_S) as p:
        first = sharing(p.address, "first", wants[0])
        p.wait_for_subscribers(1)
        quarter = publish(p, 1, tensors, {first: wants[0]}).num_bytes
        if not is_staged:
            monkeypatch.setattr(HostWorker, "_receive", lambda *_, **__: [])  # not begun when the other leaves
        heir = sharing(p.address, "heir", wants[1])
        if is_staged:
            wait_until(lambda: any(e.engine == "heir" and e.staged is not None for e in p.fleet()))
        else:
            wait_until(lambda: is_member(heir))
        first.close()
        wait_until(lambda: heir._loop._worker is not None and isinstance(heir._loop._worker._member, HostLeader))
        monkeypatch.undo()
        update = heir.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (1, "zmq")
        assert_slices(update, wants[1](specs), tensors)
        assert 0.8 * quarter < update.stats.num_bytes < 1.3 * quarter, "its own, and not the host's once more"
        update.commit()
        change(tensors, 2)
        again = sharing(p.address, "first", wants[0])
        update = again.wait(WAIT_S)
        assert update.stats.transport == "host", "which has it still"
        assert_slices(update, wants[0](specs), make_layers(8))
        update.commit()
        report = publish(p, 2, tensors, {heir: wants[1], again: wants[0]})
        assert transports(report) == {"host": 1, "zmq": 1}
        assert report.num_bytes < (1.5 if is_staged else 0.5) * quarter


def test_who_loads_for_longer_than_its_lease_when_the_union_grows_has_what_it_took(
    sharing: Subscribe, caplog: pytest.LogCaptureFixture
) -> None:
    """The next version comes to other memory, so nothing was overwritten under it; nobody waits for it any longer."""
    tensors = make_layers(9)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    wants = [slices_of(rank, 4) for rank in range(3)]
    specs = tuple(make_specs(tensors))
    policy = FleetPolicy.quorum(1)
    with WeightPublisher(TensorSource(tensors), TCP, policy=policy, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        first = sharing(p.address, "first", wants[0], 2, lease_s=0.5)
        wait_until(lambda: is_member(first))
        slow = sharing(p.address, "slow", wants[1], 2, lease_s=0.5)
        p.wait_for_subscribers(2)
        publication = p.begin(1, timeout_s=2.0)
        held = slow.wait(WAIT_S)
        first.wait(WAIT_S).commit()
        publication.wait()
        late = sharing(p.address, "late", wants[2], 2, lease_s=0.5)
        late.wait(WAIT_S).commit()
        change(tensors, 2)
        publication = p.begin(2, timeout_s=10.0)
        for engine, want in ((first, wants[0]), (late, wants[2])):
            update = engine.wait(WAIT_S)
            assert_slices(update, want(specs), tensors)
            update.commit()
        assert "kept version 1" in caplog.text
        held.check()
        assert_slices(held, wants[1](specs), before)
        held.commit()
        update = slow.wait(WAIT_S)
        assert (update.version.number, update.stats.transport) == (2, "host")
        assert_slices(update, wants[1](specs), tensors)
        update.commit()
        publication.wait()


def cross(specs: Sequence) -> WantedRegions:  # type: ignore[type-arg]
    """Some rows of every matrix."""
    return {s.name: (Region(s.name, (8, 0), (16, s.shape[1])),) if len(s.shape) == 2 else () for s in specs}


def test_boxes_that_cross_those_of_another_are_put_together(sharing: Subscribe) -> None:
    tensors = make_layers(6)
    columns: WantOf = lambda specs: {  # noqa: E731
        s.name: (Region(s.name, (0, 5), (s.shape[0], 7)),) if len(s.shape) == 2 else (s.whole(),) for s in specs
    }
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {
            sharing(p.address, name, want, 2): want for name, want in (("rows", cross), ("columns", columns))
        }
        p.wait_for_subscribers(2)
        for number in (1, 2):
            change(tensors, number)
            assert transports(publish(p, number, tensors, engines)) == {"host": 1, "zmq": 1}


def test_without_memory_for_a_larger_union_the_present_one_goes_on(
    sharing: Subscribe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = make_layers(7)
    wants = [slices_of(rank, 4) for rank in range(2)]
    with WeightPublisher(TensorSource(tensors), TCP, chunk_bytes=CHUNK_BYTES, timeout_s=WAIT_S) as p:
        engines: dict[WeightSubscriber, WantOf | None] = {sharing(p.address, "w0", wants[0]): wants[0]}
        p.wait_for_subscribers(1)
        publish(p, 1, tensors, engines)
        late = sharing(p.address, "late", wants[1])
        late.wait(WAIT_S).commit()
        engines[late] = wants[1]

        def fail(*_: object) -> SharedPool:
            raise StorageError(12, "no memory for the weights")

        monkeypatch.setattr(leaders, "make_pool", fail)
        caplog.set_level(logging.WARNING)
        report = publish(p, 2, tensors, engines)
        assert transports(report) == {"zmq": 2} and "what all want does not fit" in caplog.text
        monkeypatch.undo()
        assert transports(publish(p, 3, tensors, engines)) == {"host": 1, "zmq": 1}


def test_the_first_version_is_refused_where_there_is_no_memory_for_it(
    sharing: Subscribe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> SharedPool:
        raise StorageError(12, "no memory for the weights")

    tensors = make_layers(7)
    wants = [slices_of(rank, 4) for rank in range(2)]
    with WeightPublisher(TensorSource(tensors), TCP, policy=FleetPolicy.quorum(2), timeout_s=WAIT_S) as p:
        monkeypatch.setattr(leaders, "make_pool", fail)
        engines: dict[WeightSubscriber, WantOf | None] = {
            sharing(p.address, f"w{rank}", wants[rank], 2): wants[rank] for rank in range(2)
        }
        p.wait_for_subscribers(2)
        publication = p.begin(1)
        for engine in engines:
            with pytest.raises(ValueError, match=r"cannot receive for its host: .* no memory for the weights"):
                engine.wait(WAIT_S)
        with pytest.raises(Exception, match="did not reach the fleet"):
            publication.wait()
        monkeypatch.undo()
        assert transports(publish(p, 2, tensors, engines)) == {"host": 1, "zmq": 1}


def test_terms_of_a_share_are_checked() -> None:
    for settings in ({"workers": 0}, {"gather_s": -1.0}, {"gather_s": float("inf")}):
        with pytest.raises(ConfigError, match="needs workers of at least 1 or None, and seconds for gather_s"):
            HostShare("engine", **settings)


def test_versions_in_haste_and_workers_with_other_slices_each_time_never_mix(base: Path) -> None:
    """Unions grow, shrink and are handed on all the time; all that an engine took is one version's bits."""
    specs = tuple(make_specs(make_layers(0)))
    wants = [None, whole, *(slices_of(rank, 4) for rank in range(4)), slices_of(1, 2), cross]

    def draw(dice: random.Random) -> tuple[dict[str, Any], WantOf | None]:
        return {"gather_s": dice.choice([0.0, 0.05])}, dice.choice(wants)

    def check(update: Update, want: WantOf | None) -> None:
        expected = make_layers(update.version.number)
        if want is None:
            assert_same_bits(dict(update), expected)
        else:
            assert_slices(update, want(specs), expected)

    check_haste(base, make_layers, draw, check, chunk_bytes=CHUNK_BYTES)
