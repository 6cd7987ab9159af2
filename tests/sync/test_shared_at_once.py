"""Who receives for its host reads as all do, under a lease: also a version that was there, and released, at once."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.sync.packed import CHUNK_BYTES, answer, make_packed
from tests.sync.parts import LIMITS, WAIT_S, TensorSource, assert_same_bits, make_model, make_specs
from tests.sync.slice_share import TCP
from tests.sync.slice_wants import assert_slices, make_layers, slices_of

from weightcast.sync import FleetPolicy, HostShare, WeightPublisher, WeightSubscriber
from weightcast.sync.effects import Effect, Request, Tell
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.pool import SharedPool
from weightcast.sync.limits import Limits
from weightcast.sync.messages import PROTOCOL, Announce, Layout, Release, Sealed, Staged, Welcome
from weightcast.sync.records import Offer
from weightcast.sync.shadow import Shadow
from weightcast.sync.shared_subscription import SharedSubscription

NUM_ROUNDS = 8
NUM_WORKERS = 2


def deliver(
    subscription: SharedSubscription, tensors: dict[str, torch.Tensor], pool: SharedPool, *, must_lend: bool
) -> list[Effect]:
    """Version 1 comes into a pool, and the fleet has released it already; what the subscription says at the end."""
    packed = make_packed(tensors)
    snapshot = packed.pack(1)
    specs, version = tuple(packed.specs), snapshot.version
    offers = (Offer(0, "tcp://127.0.0.1:1", packed.regions),)
    for message in (
        Welcome(PROTOCOL, 1, specs),
        Layout(1, CHUNK_BYTES, offers),
        Announce(version, ()),
        Sealed(version, packed.digests()),
        Release(version),
    ):
        subscription.receive(message, 0.0)
    pool.begin()
    effects = subscription.stage(Shadow(pool), 0.0, must_lend=must_lend)
    while requests := [effect.message for effect in effects if isinstance(effect, Request)]:
        assert not subscription.is_ready and not subscription.awaits_lease
        effects = []
        for request in requests:
            assert request.count == 1
            effects += subscription.land(0, *answer(snapshot, request.index), 0.0)
    pool.finish(version)
    return effects


def says_staged(effects: list[Effect]) -> bool:
    """Whether the fleet is told that the version is staged."""
    return any(isinstance(effect, Tell) and isinstance(effect.message, Staged) for effect in effects)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_model(3)


@pytest.fixture
def pool(tensors: dict[str, torch.Tensor]) -> Iterator[SharedPool]:
    made = SharedPool.create(make_specs(tensors))
    yield made
    made.close()


@pytest.mark.parametrize("prepares", [False, True], ids=["loads", "prepares"])
def test_what_lies_where_others_read_is_neither_taken_nor_told_of_before_it_is_lent(
    tensors: dict[str, torch.Tensor], pool: SharedPool, prepares: bool
) -> None:
    subscription = SharedSubscription("engine", None, Limits(), 0.0)
    subscription.prepares = prepares
    assert not says_staged(deliver(subscription, tensors, pool, must_lend=True))
    arrival, staged = subscription.arrival, pool.staged()
    assert arrival is not None and staged is not None and arrival.is_staged
    assert subscription.awaits_lease
    assert not subscription.is_ready and not subscription.awaits_engine
    readable = pool.map_again()
    lease = Lease(readable, staged, lambda: None)
    assert says_staged(subscription.lend(lease)) == subscription.is_ready == (not prepares)
    assert subscription.awaits_engine and not subscription.awaits_lease
    assert arrival.lease is lease and subscription.leases == (lease,)
    assert arrival.tensors is not None
    assert_same_bits(dict(arrival.tensors), tensors)
    assert all(arrival.tensors[name].data_ptr() == readable.tensors[name].data_ptr() for name in tensors)


def test_what_an_engine_received_by_itself_needs_no_lease(tensors: dict[str, torch.Tensor], pool: SharedPool) -> None:
    subscription = SharedSubscription("engine", None, Limits(), 0.0)
    assert says_staged(deliver(subscription, tensors, pool, must_lend=False))
    assert subscription.is_ready and not subscription.awaits_lease and subscription.leases == ()


def test_a_released_version_that_is_read_at_once_is_taken_under_a_lease_and_shared(base: Path) -> None:
    """The engine already waits when all of it comes, within one step of the subscriber's thread."""
    tensors = make_layers(1)
    wants = [slices_of(rank, NUM_WORKERS) for rank in range(NUM_WORKERS)]
    specs = tuple(make_specs(tensors))
    both_took = threading.Barrier(NUM_WORKERS)
    share = HostShare("engine", base=base, workers=NUM_WORKERS, gather_s=WAIT_S)

    def follow(publisher: WeightPublisher, rank: int) -> str:
        settings = {"engine": f"worker-{rank}", "limits": LIMITS, "share": share, "want": wants[rank]}
        with WeightSubscriber(publisher.address, **settings) as worker:  # type: ignore[arg-type]
            update = worker.wait(WAIT_S)
            assert_slices(update, wants[rank](specs), tensors)
            taken = worker._subscription.taken
            assert taken is not None and taken.lease is not None and not taken.lease.is_void
            update.commit()
            both_took.wait(WAIT_S)  # who would be left alone before it has joined again waits for another worker
            return update.stats.transport

    for number in range(1, NUM_ROUNDS + 1):
        with (
            WeightPublisher(
                TensorSource(tensors),
                TCP,
                policy=FleetPolicy.quorum(1),
                delta="off",
                in_place=True,
                expose=("shared_memory",),
                timeout_s=WAIT_S,
            ) as publisher,
            WeightSubscriber(publisher.address, engine="first", limits=LIMITS) as first,
            ThreadPoolExecutor(NUM_WORKERS) as threads,
        ):
            publication = publisher.begin(number, hold=True)
            update = first.wait(WAIT_S)  # released, and not over before it commits
            transports = sorted(threads.map(follow, [publisher] * NUM_WORKERS, range(NUM_WORKERS)))
            assert transports == ["host", "shared_memory"]
            update.commit()
            publication.wait()
