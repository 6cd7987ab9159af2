"""What befalls every simulated fleet: the rules that state machines of hypothesis have in common."""

from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tests.sync.simulation import World

ENGINE = st.runner().flatmap(lambda machine: st.sampled_from(machine.names))
"""One of the machine's engines, by name."""


class FleetRules(RuleBasedStateMachine):
    """Engines load, fail and come again, connections break, time passes, and lives of a trainer follow each other."""

    names: ClassVar[tuple[str, ...]]
    world: World

    def begin_version(self, timeout_s: float) -> None:
        """All sources begin to pack the next version, rank 0 as the last one."""
        trainer = self.world.trainer
        trainer.number += 1
        for rank in (1, 0):
            self.world.send(trainer.begin(rank, self.world.now_s, timeout_s))
            self.world.note_release()

    @rule(name=ENGINE)
    def damage_a_chunk(self, name: str) -> None:
        self.world.deliver_chunk(self.world.engines[name], damage=True)

    @rule(name=ENGINE, well=st.booleans())
    def finish_loading(self, name: str, well: bool) -> None:
        engine = self.world.engines[name]
        if engine.subscription.taken is None:
            return
        if well:
            self.world.commit(engine)
        else:
            self.world.do(engine, engine.subscription.reject("no", self.world.now_s))

    @rule(name=ENGINE)
    def restart_engine(self, name: str) -> None:
        self.world.start_engine(name)

    @rule(name=ENGINE)
    def break_connection(self, name: str) -> None:
        self.world.break_connection(self.world.engines[name])

    @precondition(lambda self: self.world.epoch < 4)
    @rule()
    def replace_trainer(self) -> None:
        self.world.replace_trainer()

    @rule(seconds=st.sampled_from([0.3, 1.1, 2.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.world.advance(seconds)
        self.world.note_release()
