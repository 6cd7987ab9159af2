"""The subscription: an engine's side of the protocol, without sockets or clocks.

    idle -> staging -> staged -> ready -> (the engine takes it, loads it) -> serving

A version is staged while the engine goes on serving; it is ready when every check has passed and the fleet released
it. A newer version replaces one that is still on its way; while the engine loads one, a newer one waits. Every
method takes the time and returns what to send; a thread elsewhere carries it out.
"""

from collections.abc import Mapping, Sequence

from weightcast.sync.acquaintance import Acquaintance
from weightcast.sync.arrival import Arrival
from weightcast.sync.arrival_words import describe_arrival, make_staged
from weightcast.sync.effects import Effect, Tell
from weightcast.sync.errors import ModelMismatch, PeerLost, WeightcastError, WireError
from weightcast.sync.landing import Body
from weightcast.sync.limits import Limits
from weightcast.sync.messages import (
    PROTOCOL,
    Announce,
    Bye,
    ChunkHeader,
    Failed,
    Goodbye,
    Hello,
    Layout,
    Message,
    Ping,
    Pong,
    Release,
    Sealed,
    Serving,
    Welcome,
)
from weightcast.sync.model_view import ModelView
from weightcast.sync.opening import open_arrival
from weightcast.sync.records import Span
from weightcast.sync.regions import TensorSpec
from weightcast.sync.shadow import Shadow
from weightcast.sync.version import Version


class Subscription:
    """See the module. `now_s` is a monotonic clock; `wall_offset_s` added to it gives seconds since 1970."""

    def __init__(
        self, engine: str, role: str, expect: Sequence[TensorSpec] | None, limits: Limits, wall_offset_s: float
    ) -> None:
        self.engine = engine
        self.role = role
        self.serving: Version | None = None
        self.released: Version | None = None
        self.model = ModelView(engine, expect)
        self.arrival: Arrival | None = None
        self.taken: Arrival | None = None
        self.error: WeightcastError | None = None
        self._missed: Version | None = None
        self._limits = limits
        self._wall_offset_s = wall_offset_s
        self.reached: Mapping[int, str] = {}
        """The source ranks whose memory this engine reads by itself, and the kind of it; set before `Announce`."""
        self._waiting: Announce | None = None
        self._sealed: Sealed | None = None
        self.prepares = False  # see `preview.py`
        self.shadow = Shadow()
        self.known = Acquaintance(limits)

    @property
    def is_ready(self) -> bool:
        """Whether a version may be taken."""
        arrival, released = self.arrival, self.released
        return arrival is not None and arrival.is_prepared and released is not None and released >= arrival.version

    @property
    def awaits_engine(self) -> bool:
        """Whether a version may be taken, or looked at before the fleet hears of it."""
        arrival = self.arrival
        return self.is_ready or (arrival is not None and arrival.is_readable and arrival.waits_for_engine)

    @property
    def is_dismissed(self) -> bool:
        """Whether the publisher said that this engine need not come back."""
        return self.known.is_dismissed

    @property
    def is_fenced(self) -> bool:
        """Whether the fleet has moved on to a version that this engine does not serve."""
        return self.released is not None and (self.serving is None or self.serving < self.released)

    def _must_wait(self, version: Version) -> bool:
        """Whether `version` waits until the engine has loaded the one that it took."""
        return self.taken is not None

    # What comes in

    def leave(self) -> list[Effect]:
        """Say goodbye."""
        return [Tell(Bye())]

    def describe(self) -> str:
        """In one sentence, where this subscription is: for errors and status pages."""
        if self.model.specs is None:
            return "no publisher has answered there"
        if self.arrival is None:
            if self._missed is not None and (self.serving is None or self._missed > self.serving):
                return f"its sources had version {self._missed} no longer, and no newer one was announced"
            return f"no version newer than {self.serving} was announced"
        return describe_arrival(self.arrival)

    def hello(self) -> list[Effect]:
        """Make this engine known."""
        return [Tell(Hello(PROTOCOL, self.engine, self.role, self.serving))]

    def receive(self, message: Message, now_s: float) -> list[Effect]:
        """A message of the coordinator."""
        self.known.hear(message, now_s)
        if isinstance(message, Welcome):
            return self._welcome(message)
        if isinstance(message, Layout):
            self.model.lay_out(message)
            return []
        if isinstance(message, Announce):
            return self._announced(message, now_s)
        if isinstance(message, Sealed):
            return self._seal(message, now_s)
        if isinstance(message, Release):
            # A forgotten publisher that still runs may not lower what the fleet has released.
            if message.version.epoch == self.model.epoch:
                self.released = message.version if self.released is None else max(self.released, message.version)
        elif isinstance(message, Pong):
            return self.hello() if self.known.must_greet(message, now_s) else []
        elif isinstance(message, Goodbye):
            self.error = PeerLost(f"the publisher ended or refused engine {self.engine!r}: {message.reason}")
            self._drop_unreleased()
        else:
            raise WireError(f"the publisher sent a {type(message).__name__}, which publishers do not send")
        return []

    def _welcome(self, message: Welcome) -> list[Effect]:
        if self.model.is_older(message.epoch):
            # A forgotten trainer that still runs: whatever it announces is older than what was seen.
            return []
        if message.epoch != self.model.epoch:
            self._drop_unreleased()
            self.released = None
        self.model.welcome(message)
        self.error = self.model.error
        return []

    def _announced(self, announce: Announce, now_s: float) -> list[Effect]:
        version = announce.version
        if self.model.is_older(version.epoch):
            reason = f"engine {self.engine!r} has met a later publisher (epoch {self.model.epoch}); this one is fenced"
            return [Tell(Failed(version, reason))]
        if self.model.specs is None or version.epoch != self.model.epoch:
            return []
        if isinstance(self.error, ModelMismatch):
            return [Tell(Failed(version, str(self.error)[:4000]))]
        if self.serving is not None and version <= self.serving:
            if version == self.serving:
                return [Tell(Serving(version, 0.0, ()))]
            return [Tell(Failed(version, f"engine {self.engine!r} serves version {self.serving}, which is newer"))]
        if self._must_wait(version):
            self._waiting = announce
            return []
        if self.arrival is not None and self.arrival.version == version:
            # The coordinator met this engine anew: say again what it may have missed.
            return self.tell_staged() if self.arrival.is_staged else []
        return self._begin(announce, now_s)

    def _begin(self, announce: Announce, now_s: float) -> list[Effect]:
        self.error = None
        self.arrival = None
        if self.role == "observer":
            self.arrival = Arrival(announce, None, 0, self._limits, now_s, staged_s=now_s, tensors={})
            return []
        return self._stage(announce, now_s, now_s)

    def _stage(self, announce: Announce, started_s: float, now_s: float, *, must_lend: bool = False) -> list[Effect]:
        try:
            self.arrival = open_arrival(
                self.engine, announce, self.model, self.shadow, self._limits, self.reached, started_s
            )
        except WireError as error:
            return self._refuse(announce.version, error)
        self.arrival.must_lend, self.arrival.waits_for_engine = must_lend, self.prepares
        effects = self.arrival.begin(now_s)
        return effects + (self._seal(self._sealed, now_s) if self._sealed is not None else [])

    def _seal(self, sealed: Sealed, now_s: float) -> list[Effect]:
        """Every source has packed the version; it may come before the engine begins to fetch it."""
        self._sealed = sealed
        arrival = self.arrival
        if arrival is None or arrival.version != sealed.version or arrival.staging is None or arrival.is_staged:
            return []
        try:
            effects = arrival.seal(sealed.digests, now_s)
        except WireError as error:
            return self._refuse(sealed.version, error)
        return self.tell_staged() if arrival.is_staged else effects

    def land(
        self, rank: int, header: ChunkHeader, body: Body | None, now_s: float, *, is_hashed: bool = True
    ) -> list[Effect]:
        """A chunk of the source `rank` came, with its body; see `Staging.land`."""
        arrival = self.arrival
        if arrival is None or not arrival.wants(rank, header):
            return []
        if header.encoding == "absent":
            # The source packs a newer version, whose announcement is on its way; or what it had in place has changed.
            self.arrival, self._missed = None, header.version
            return []
        try:
            effects = arrival.land(rank, header, body, now_s, is_hashed=is_hashed)
        except WireError as error:
            return self._refuse(arrival.version, error)
        return self.tell_staged() if arrival.is_staged else effects

    def ask(self, rank: int, header: ChunkHeader, now_s: float) -> list[Effect]:
        """The source `rank` is asked for chunks that were to be read, and could not be."""
        arrival = self.arrival
        return [] if arrival is None or not arrival.wants(rank, header) else arrival.ask_for(rank, header, now_s)

    def stop_reaching(self, rank: int, now_s: float) -> list[Effect]:
        """The memory of the source `rank` cannot be read any more."""
        self.reached = {other: kind for other, kind in self.reached.items() if other != rank}
        return [] if self.arrival is None else self.arrival.send_again(rank, now_s)

    def tell_staged(self) -> list[Effect]:
        """Say that a version is staged, once the engine is prepared for it."""
        if self.arrival is None or self.role == "observer" or not self.arrival.is_prepared:
            return []
        return [Tell(make_staged(self.arrival, self._wall_offset_s))]

    def _refuse(self, version: Version, error: WeightcastError) -> list[Effect]:
        # Without its traceback, whose frames would keep the refused version's memory.
        self.error = error.with_traceback(None)
        self.arrival = None
        return [Tell(Failed(version, str(error)[:4000]))]

    def give_up(self, reason: str) -> list[Effect]:
        """Refuse the version that is on its way."""
        if self.arrival is None or self.arrival.is_staged:
            return []
        return self._refuse(self.arrival.version, WireError(reason))

    def _drop_unreleased(self) -> None:
        self._waiting = None
        if not self.is_ready:
            self.arrival = None

    # What the engine does

    def take(self) -> Arrival:
        """The ready version, which the engine now loads; a newer one waits until it is done."""
        assert self.is_ready and self.arrival is not None
        self.taken, self.arrival = self.arrival, None
        return self.taken

    def commit(self, pause_s: float, spans: tuple[Span, ...], now_s: float) -> list[Effect]:
        """The engine serves the version that it took."""
        assert self.taken is not None
        self.serving = self.taken.version
        return [Tell(Serving(self.serving, pause_s, spans)), *self._let_go(now_s)]

    def reject(self, reason: str, now_s: float) -> list[Effect]:
        """The engine could not load the version that it took, and goes on with the one before."""
        assert self.taken is not None
        return [Tell(Failed(self.taken.version, reason[:4000])), *self._let_go(now_s)]

    def _let_go(self, now_s: float) -> list[Effect]:
        self.taken = None
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else self._announced(waiting, now_s)

    # What time does

    def tick(self, now_s: float) -> list[Effect]:
        """Ping, ask again for chunks that did not come, and notice a coordinator that fell silent."""
        if self.is_dismissed:
            return []
        effects: list[Effect] = [Tell(Ping())] if self.known.is_ping_due(now_s) else []
        if self.known.is_lost(now_s):
            self._lose()
        return effects if self.arrival is None else effects + self.arrival.repeat_overdue(now_s)

    def _lose(self) -> None:
        what = f"engine {self.engine!r}: the publisher was silent for {self._limits.lost_after_s:g} s"
        arrival = self.arrival
        if arrival is not None and arrival.staging is not None and not arrival.is_staged:
            what += f" while version {arrival.version} lacked {arrival.staging.num_missing} chunks"
        serves = self.shadow.describe_engine(self.serving)
        self.error = PeerLost(f"{what}; the engine {serves} and takes the next version of whoever publishes here")
        self._drop_unreleased()
