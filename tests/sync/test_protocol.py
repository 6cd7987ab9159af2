"""The protocol under every order of faults that hypothesis thinks of: promises hold, and peace brings agreement."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from tests.sync.fleet_rules import ENGINE, FleetRules
from tests.sync.simulation import IN_PLACE, World

from weightcast.sync import FleetPolicy, Version
from weightcast.sync.in_place import InPlaceSubscription
from weightcast.sync.packer import PackMode

NAMES = ("a", "b", "c", IN_PLACE)


class Fleet(FleetRules):
    """Four engines, two sources, and lives of a trainer that follow each other."""

    names = NAMES

    @initialize(
        policy=st.sampled_from([FleetPolicy.all(), FleetPolicy.quorum(1), FleetPolicy.quorum(2)]),
        mode=st.sampled_from(["off", "on", "zstd"]),
    )
    def begin(self, policy: FleetPolicy, mode: PackMode) -> None:
        self.world = World(policy, mode)
        for name in NAMES:
            self.world.start_engine(name)

    @rule(timeout_s=st.sampled_from([1.0, 30.0]))
    def publish(self, timeout_s: float) -> None:
        self.begin_version(timeout_s)

    @rule(rank=st.sampled_from([0, 1]), count=st.integers(1, 30))
    def pack(self, rank: int, count: int) -> None:
        self.world.send(self.world.trainer.pack(rank, count, self.world.now_s))
        self.world.note_release()

    @rule(name=ENGINE, count=st.integers(1, 6))
    def converse(self, name: str, count: int) -> None:
        engine = self.world.engines[name]
        for _ in range(count):
            self.world.deliver_up(engine)
            self.world.note_release()
            self.world.deliver_down(engine)

    @rule(name=ENGINE, count=st.integers(1, 6))
    def fetch(self, name: str, count: int) -> None:
        for _ in range(count):
            self.world.deliver_chunk(self.world.engines[name])

    @rule(name=ENGINE)
    def lose_a_request(self, name: str) -> None:
        if self.world.engines[name].asked:
            self.world.engines[name].asked.popleft()

    @rule(name=ENGINE)
    def take(self, name: str) -> None:
        self.world.check_take(self.world.engines[name])

    @rule(lends=st.booleans())
    def begin_or_end_a_wait(self, lends: bool) -> None:
        engine = self.world.engines[IN_PLACE]
        if lends:
            self.world.do(engine, engine.lend())
        else:
            engine.take_back()

    @rule()
    def scribble(self) -> None:
        engine = self.world.engines[IN_PLACE]
        assert isinstance(engine.subscription, InPlaceSubscription)
        if not engine.subscription._is_lent:
            engine.scribble()

    @rule(name=ENGINE)
    def stop_or_continue(self, name: str) -> None:
        self.world.engines[name].silent = not self.world.engines[name].silent

    @invariant()
    def nobody_goes_back(self) -> None:
        for engine in self.world.engines.values():
            assert engine.served == sorted(set(engine.served))
            assert engine.subscription.serving == (engine.served[-1] if engine.served else None)
            engine.check_untouched()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self._settle()
            self.publish(30.0)
            self._settle()
            newest = Version(self.world.epoch, self.world.trainer.number)
            served = {name: engine.served[-1:] for name, engine in self.world.engines.items()}
            assert served == {name: [newest] for name in NAMES}
            published = self.world.trainer.published[-1]
            assert published.version == newest and published.error == ""

    def _settle(self) -> None:
        """No more faults, and time enough for every limit to pass."""
        for engine in self.world.engines.values():
            engine.silent = False
        for _ in range(40):
            self.pack(0, 100)
            self.pack(1, 100)
            self.world.advance(0.6)
            for engine in self.world.engines.values():
                if engine.subscription.taken is not None:
                    self.world.commit(engine)
                if engine.name == IN_PLACE:
                    self.world.do(engine, engine.lend())
                for _ in range(25):
                    self.world.deliver_up(engine)
                    self.world.note_release()
                    self.world.deliver_down(engine)
                    self.world.deliver_chunk(engine)
                if self.world.check_take(engine):
                    self.world.commit(engine)


Fleet.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestFleet = Fleet.TestCase
