"""Workers of one host that share a copy of slices: how they are made, what they take, and who of them receives."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from tests.sync.parts import LIMITS, WAIT_S, assert_same_bits, bits
from tests.sync.slice_wants import WantOf, assert_slices

from weightcast.sync import HostShare, PublishReport, WeightPublisher, WeightSubscriber
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.wanted import Want

TCP = "tcp://127.0.0.1:0"
CHUNK_BYTES = 4096
# Those who come within this time are received for together; tests that cannot wait for more say how many come.
GATHER_S = 0.5
Subscribe = Callable[..., WeightSubscriber]


def subscribing(stack: ExitStack, base: Path) -> Subscribe:
    """Makes workers of this host that share a copy, and end with the stack."""

    def make(
        address: str, name: str, want: Want | None, workers: int | None = None, lease_s: float = 30.0
    ) -> WeightSubscriber:
        share = HostShare("engine", base=base, workers=workers, gather_s=GATHER_S, lease_s=lease_s)
        made = WeightSubscriber(address, engine=name, limits=LIMITS, share=share, want=want, transport="zmq")
        return stack.enter_context(made)

    return make


def leader_of(engines: Sequence[WeightSubscriber]) -> HostLeader:
    """Of those that lead, the one."""
    workers = [engine._loop._worker for engine in engines]
    (member,) = (w._member for w in workers if w is not None and isinstance(w._member, HostLeader))
    return member


def is_member(engine: WeightSubscriber) -> bool:
    """Whether it has joined the workers of its host."""
    worker = engine._loop._worker
    return worker is not None and worker._member is not None


def publish(
    publisher: WeightPublisher,
    number: int,
    tensors: dict[str, torch.Tensor],
    engines: Mapping[WeightSubscriber, WantOf | None],
) -> PublishReport:
    """Publish; each engine takes what it wants, and commits."""
    publication = publisher.begin(number)
    for engine, want in engines.items():
        update = engine.wait(WAIT_S)
        assert update.version.number == number
        if want is None:
            assert update.wanted is None
            assert_same_bits(dict(update), tensors)
        else:
            assert_slices(update, want(update.specs), tensors)
        update.commit()
    return publication.wait()


def change(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Other bits in a few elements of every tensor."""
    for tensor in tensors.values():
        bits(tensor)[seed % 7 :: 211] ^= 0x5A


def transports(report: PublishReport) -> Counter[str]:
    """How many engines received it how."""
    return Counter(engine.transport for engine in report.engines)
