"""Workers of one host under every order of events that hypothesis thinks of: nobody reads what is being written."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from tests.sync.fleet_rules import FleetRules
from tests.sync.host_simulation import HostWorld
from tests.sync.simulation import WANTED

from weightcast.sync import FleetPolicy, Region, Version
from weightcast.sync.packer import PackMode
from weightcast.sync.wanted import WantedRegions

NAMES = ("a", "b", "c")
ENGINE = st.sampled_from(NAMES)
# Boxes that cross those of `WANTED`, and some beside them.
OTHERS: WantedRegions = {
    "w": (Region("w", (0, 700), (2, 900)),),
    "still": (Region("still", (0,), (100,)),),
    "scale": (Region("scale", (), ()),),
}


class Turn(NamedTuple):
    """Of one worker's thread, and its engine."""

    name: str
    num_steps: int
    num_chunks: int
    takes: bool


TURN = st.builds(
    Turn, ENGINE, st.sampled_from([2, 2, 1, 0]), st.sampled_from([100, 100, 3, 0]), st.sampled_from([True, True, False])
)


class Host(FleetRules):
    """Three workers of one host, two sources, and lives of a trainer that follow each other."""

    names = NAMES
    world: HostWorld

    @initialize(
        policy=st.sampled_from([FleetPolicy.all(), FleetPolicy.quorum(1), FleetPolicy.quorum(2)]),
        mode=st.sampled_from(["off", "on"]),
        lease_s=st.sampled_from([1e-3, 60.0]),
        wants=st.dictionaries(ENGINE, st.sampled_from([WANTED, OTHERS])),
        preparing=st.sets(ENGINE),
    )
    def begin(
        self,
        policy: FleetPolicy,
        mode: PackMode,
        lease_s: float,
        wants: dict[str, WantedRegions],
        preparing: set[str],
    ) -> None:
        self.base = Path(tempfile.mkdtemp())
        self.base.chmod(0o755)
        self.world = HostWorld(policy, mode, self.base, lease_s, wants, preparing)
        for name in NAMES:
            self.world.start_engine(name)

    @rule(timeout_s=st.sampled_from([1.0, 30.0]), packs=st.booleans())
    def publish(self, timeout_s: float, packs: bool) -> None:
        self.begin_version(timeout_s)
        if packs:
            self.pack(1)
            self.pack(0)

    @rule(rank=st.sampled_from([0, 1]))
    def pack(self, rank: int) -> None:
        self.world.send(self.world.trainer.pack(rank, 100, self.world.now_s))
        self.world.note_release()

    @rule(publishes=st.booleans(), turns=st.lists(TURN, min_size=8, max_size=16))
    def take_turns(self, publishes: bool, turns: list[Turn]) -> None:
        """What comes in, what the worker makes of it, what it fetches then; the engine may look before it goes on.

        Faults lie between turns: in each list of them there is time for a version to come all the way.
        """
        if publishes:
            self.publish(30.0, packs=True)
        for turn in turns:
            engine = self.world.engines[turn.name]
            for _ in range(6):
                self.world.deliver_up(engine)
                self.world.note_release()
                self.world.deliver_down(engine)
            for _ in range(turn.num_steps):
                self.world.step_worker(engine)
            for _ in range(turn.num_chunks):
                self.world.deliver_chunk(engine)
            if turn.takes:
                self.world.check_take(engine)
            self.world.check_held(engine)

    @invariant()
    def nobody_loads_what_is_being_written(self) -> None:
        for engine in self.world.engines.values():
            assert engine.served == sorted(set(engine.served))
            self.world.check_held(engine)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.settle(lambda: False, 20.0)
            self.publish(3000.0, packs=True)
            newest = Version(self.world.epoch, self.world.trainer.number)
            engines = self.world.engines.values()
            self.world.settle(lambda: all(engine.served[-1:] == [newest] for engine in engines), 3000.0)
            assert [engine.served[-1:] for engine in engines] == [[newest]] * len(NAMES)
        finally:
            self.world.close()
            shutil.rmtree(self.base)


Host.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestHost = Host.TestCase
