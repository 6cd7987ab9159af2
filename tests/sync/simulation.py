"""A fleet without sockets or clocks: coordinators, engines and a network that a test may disturb.

Control messages keep their order, and a broken connection loses what was under way and comes back under another
routing id, as TCP and ZeroMQ do. Chunk requests are lost when the test says so.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from tests.sync.parts import bits
from tests.sync.simulated_trainer import SPECS, Trainer, model_of

from weightcast.sync import FleetPolicy, Limits, Region, Version
from weightcast.sync.effects import Effect, Request, Tell
from weightcast.sync.engine_tensors import EngineTensors
from weightcast.sync.in_place import Held, InPlaceSubscription
from weightcast.sync.messages import (
    Announce,
    ChunkHeader,
    Message,
    Published,
    decode,
    encode,
)
from weightcast.sync.packer import PackMode
from weightcast.sync.roster import Outgoing
from weightcast.sync.snapshot import ABSENT
from weightcast.sync.subscription import Subscription
from weightcast.sync.wanted import WantedRegions, whole

# Engines are the first to give up: a publisher that never missed them must announce anew all the same.
LIMITS = Limits(credit_chunks=2, chunk_timeout_s=1.0, lost_after_s=2.0, ping_every_s=0.5)
# An engine of this name wants parts: of rows that it cuts through, of one source alone, and nothing of a tensor.
WANTS_PARTS = "c"
WANTED: WantedRegions = {
    "w": (Region("w", (1, 0), (3, 1500)),),
    "still": (Region("still", (100,), (100,)),),
    "scale": (),
}


# An engine of this name lands versions in its own tensors, while it lends them.
IN_PLACE = "d"
SCRIBBLE = 77


@dataclass
class SimulatedEngine:
    """An engine: its side of the protocol, its link to the coordinator, and what it served."""

    name: str
    subscription: Subscription
    peer: bytes
    up: deque[bytes] = field(default_factory=deque)
    down: deque[bytes] = field(default_factory=deque)
    asked: deque[Request] = field(default_factory=deque)
    served: list[Version] = field(default_factory=list)
    silent: bool = False
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    has_scribbled: bool = False

    def lend(self) -> list[Effect]:
        """Let versions land in the engine's own tensors, which nothing has touched so far."""
        assert isinstance(self.subscription, InPlaceSubscription)
        self.check_untouched()
        return self.subscription.lend(0.0)

    def take_back(self) -> None:
        """Have them back, as they are."""
        assert isinstance(self.subscription, InPlaceSubscription)
        self.subscription.take_back()
        self.kept = {name: tensor.clone() for name, tensor in self.own.items()}

    def check_untouched(self) -> None:
        """Outside of that nothing is written, and what is said of the tensors is so."""
        subscription = self.subscription
        if not isinstance(subscription, InPlaceSubscription):
            return
        if not subscription._is_lent:
            assert all(torch.equal(self.kept[name], tensor) for name, tensor in self.own.items())
        if (version := subscription.held.version) is not None and not self.has_scribbled:
            assert all(torch.equal(self.own[name], tensor) for name, tensor in model_of(version).items())
        if subscription.held == Held():
            assert not any(tensor.any() for tensor in self.own.values()) or self.has_scribbled

    def scribble(self) -> None:
        """The engine writes to its own tensors, as it may when it does not lend them."""
        self.own["w"][1, 5:40] = SCRIBBLE
        self.kept["w"].copy_(self.own["w"])
        self.has_scribbled = True


class World:
    """All of it."""

    def __init__(self, policy: FleetPolicy, mode: PackMode) -> None:
        self.now_s = 0.0
        self.policy = policy
        self.epoch = 1
        self.mode: PackMode = mode
        self.trainer: Trainer = Trainer(1, policy, mode)
        self.engines: dict[str, SimulatedEngine] = {}
        self.wants: dict[str, WantedRegions] = {WANTS_PARTS: WANTED}
        self.released_at: dict[Version, set[str]] = {}
        self.seen: Counter[str] = Counter()
        self._peers = 0

    def _new_peer(self) -> bytes:
        self._peers += 1
        return b"e%d" % self._peers

    def start_engine(self, name: str) -> None:
        """A new process of this name; one that ran is gone without a word."""
        own = {name: torch.zeros_like(tensor) for name, tensor in model_of(Version(0, 0)).items()}
        if name == IN_PLACE:
            subscription: Subscription = InPlaceSubscription(name, EngineTensors(own), LIMITS, 0.0)
        else:
            subscription = Subscription(name, "receiver", SPECS, LIMITS, 0.0)
        subscription.model.want = self.wants.get(name)
        self.engines[name] = SimulatedEngine(name, subscription, self._new_peer(), own=own)
        self.engines[name].kept = {name: tensor.clone() for name, tensor in own.items()}
        self.do(self.engines[name], subscription.hello())

    def do(self, engine: SimulatedEngine, effects: list[Effect]) -> None:
        """Carry out what a subscription decided."""
        for effect in effects:
            if isinstance(effect, Tell):
                engine.up.append(encode(effect.message))
            else:
                assert isinstance(effect, Request), "these sources say of no chunk that it is ready"
                engine.asked.append(effect)

    def send(self, outgoing: list[Outgoing]) -> None:
        """Carry out what the coordinator decided."""
        engines = {engine.peer: engine for engine in self.engines.values()}
        for out in outgoing:
            if isinstance(out.message, Published) and out.peer == b"s0":
                self.trainer.published.append(out.message)
            if out.peer in engines:
                engines[out.peer].down.append(encode(out.message))

    def deliver_up(self, engine: SimulatedEngine) -> None:
        """One message to the coordinator."""
        if engine.up and not engine.silent:
            message = decode(engine.up.popleft())
            self.send(self.trainer.coordinator.receive(engine.peer, message, self.now_s))

    def deliver_down(self, engine: SimulatedEngine) -> None:
        """One message to the engine."""
        if engine.down and not engine.silent:
            message: Message = decode(engine.down.popleft())
            self.do(engine, engine.subscription.receive(message, self.now_s))

    def deliver_chunk(self, engine: SimulatedEngine, damage: bool = False) -> None:
        """One request is answered."""
        if not engine.asked or engine.silent:
            return
        request = engine.asked.popleft()
        snapshot = self.trainer.snapshots.get(request.rank)
        if request.address != f"at-{self.trainer.coordinator.epoch}-{request.rank}":
            return
        version, index = request.message.version, request.message.index
        is_held = snapshot is not None and snapshot.version == version
        if snapshot is not None and is_held and not snapshot.is_ready(index):
            engine.asked.append(request)
            return
        body = snapshot.body(index, request.message.base) if snapshot is not None and is_held else ABSENT
        data = None if body.data is None else np.frombuffer(body.data, np.uint8).copy()
        header = ChunkHeader(version, index, body.encoding, body.base, body.hash())
        if damage and data is not None:
            data[0] ^= 1
        self.seen[body.encoding] += 1
        self.do(engine, engine.subscription.land(request.rank, header, data, self.now_s))

    def break_connection(self, engine: SimulatedEngine) -> None:
        """What was under way is lost, in both directions; ZeroMQ reconnects under another routing id."""
        engine.up.clear()
        engine.down.clear()
        engine.peer = self._new_peer()

    def replace_trainer(self) -> None:
        """A new life of the publisher at the same address."""
        self.epoch += 1
        self.trainer = Trainer(self.epoch, self.policy, self.mode)
        for engine in self.engines.values():
            self.break_connection(engine)

    def check_take(self, engine: SimulatedEngine) -> bool:
        """Let the engine take what is ready, and hold every promise against it."""
        subscription = engine.subscription
        if subscription.taken is not None or not subscription.is_ready:
            return False
        arrival = subscription.take()
        version = arrival.announce.version
        assert isinstance(arrival.announce, Announce) and arrival.tensors is not None
        assert list(arrival.tensors) == list(model_of(version))
        self.check_bits(engine, version, arrival.tensors)
        if engine.name == IN_PLACE:
            assert all(arrival.tensors[name] is tensor for name, tensor in engine.own.items())
            engine.has_scribbled = False
            engine.take_back()
        assert version in self.released_at, f"{version} was taken, and never released"
        assert not engine.served or version > engine.served[-1], f"{engine.served} and then {version}"
        return True

    def check_bits(self, engine: SimulatedEngine, version: Version, tensors: Mapping[str, torch.Tensor]) -> None:
        """Where an engine reads, the tensors are those of a version."""
        boxes, expected = self.wants.get(engine.name, whole(SPECS)), model_of(version)
        for name, tensor in tensors.items():
            for box in boxes[name]:
                assert torch.equal(bits(tensor[box.slices]), bits(expected[name][box.slices])), (
                    engine.name,
                    version,
                    box,
                )

    def commit(self, engine: SimulatedEngine) -> None:
        """The engine serves what it took."""
        taken = engine.subscription.taken
        assert taken is not None
        engine.served.append(taken.announce.version)
        self.do(engine, engine.subscription.commit(0.1, (), self.now_s))

    def note_release(self) -> None:
        """Under `all`, every receiver that answers and did not refuse has staged what is released."""
        coordinator = self.trainer.coordinator
        version = coordinator.released
        if version is None or version in self.released_at:
            return
        states = {status.engine: status.state(version) for status in coordinator.engines.values()}
        self.released_at[version] = set(states)
        if coordinator.policy.kind == "all":
            assert set(states.values()) <= {"staged", "serving", "lost"}, states

    def advance(self, seconds: float) -> None:
        """Time passes for everyone."""
        self.now_s += seconds
        self.send(self.trainer.coordinator.tick(self.now_s))
        self.note_release()
        for engine in self.engines.values():
            if not engine.silent:
                self.do(engine, engine.subscription.tick(self.now_s))
