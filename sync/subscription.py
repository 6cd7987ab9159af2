"""The subscription: an engine's side of the protocol, without sockets or clocks.

    idle -> staging -> staged -> ready -> (the engine takes it, loads it) -> serving

A version is staged while the engine goes on serving; it is ready when every check has passed and the fleet released
it. A newer version replaces one that is still on its way; while the engine loads one, a newer one waits. Every
method takes the time and returns what to send; a thread elsewhere carries it out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightcast.sync.arrival import Arrival, Effect, Limits, Tell
from weightcast.sync.errors import ModelMismatch, PeerLost, WeightcastError, WireError
from weightcast.sync.messages import (
    PROTOCOL,
    Announce,
    Bye,
    ChunkHeader,
    Failed,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Release,
    Serving,
    Span,
    Welcome,
)
from weightcast.sync.regions import TensorSpec
from weightcast.sync.staging import BufferPool, Staging, read_announce
from weightcast.sync.version import Version, find_model_differences

MAX_DIFFERENCES_SHOWN = 5


class Subscription:
    """See the module. `now_s` is a monotonic clock; `wall_offset_s` added to it gives seconds since 1970."""

    def __init__(
        self,
        engine: str,
        role: str,
        expect: Sequence[TensorSpec] | None,
        limits: Limits,
        wall_offset_s: float,
    ) -> None:
        self.engine = engine
        self.role = role
        self.serving: Version | None = None
        self.released: Version | None = None
        self.specs: tuple[TensorSpec, ...] | None = None
        self.epoch: int | None = None
        self.arrival: Arrival | None = None
        self.taken: Arrival | None = None
        self.error: WeightcastError | None = None
        self._expect = None if expect is None else tuple(expect)
        self._limits = limits
        self._wall_offset_s = wall_offset_s
        self._waiting: Announce | None = None
        self._pool = BufferPool()
        self._heard_s: float | None = None
        self._pinged_s = -1e9
        self._greeted_s = -1e9
        self._is_met = False
        self.is_dismissed = False

    @property
    def is_ready(self) -> bool:
        """Whether a version may be taken."""
        arrival = self.arrival
        return arrival is not None and arrival.is_staged and self._is_released(arrival.announce.version)

    @property
    def is_fenced(self) -> bool:
        """Whether the fleet has moved on to a version that this engine does not serve."""
        return self.released is not None and (self.serving is None or self.serving < self.released)

    def _is_released(self, version: Version) -> bool:
        return self.released is not None and self.released >= version

    # What comes in

    def leave(self) -> list[Effect]:
        """Say goodbye."""
        return [Tell(Bye())]

    def describe(self) -> str:
        """In one sentence, where this subscription is: for errors and status pages."""
        if self.specs is None:
            return "no publisher has answered there"
        arrival = self.arrival
        if arrival is None:
            return f"no version newer than {self.serving} was announced"
        return arrival.describe()

    def hello(self) -> list[Effect]:
        """Make this engine known."""
        return [Tell(Hello(PROTOCOL, self.engine, self.role, self.serving))]

    def _greet_again(self, now_s: float) -> list[Effect]:
        """Every ping that queued up while nobody was there gets its pong; one greeting answers them all."""
        if now_s - self._greeted_s < self._limits.ping_every_s:
            return []
        self._greeted_s = now_s
        return self.hello()

    def receive(self, message: Message, now_s: float) -> list[Effect]:
        """A message of the coordinator."""
        self._heard_s = now_s
        if isinstance(message, Welcome):
            self._is_met = True
            return self._welcome(message)
        if isinstance(message, Announce):
            return self._announced(message, now_s)
        if isinstance(message, Release):
            # A forgotten publisher that still runs may not lower what the fleet has released.
            if message.version.epoch == self.epoch:
                self.released = message.version if self.released is None else max(self.released, message.version)
        elif isinstance(message, Pong):
            if not message.known or not self._is_met:
                return self._greet_again(now_s)
        elif isinstance(message, Goodbye):
            self.error = PeerLost(f"the publisher ended or refused engine {self.engine!r}: {message.reason}")
            # Two engines of one name would otherwise put each other out for ever.
            self.is_dismissed = message.final
            self._drop_unreleased()
        else:
            raise WireError(f"the publisher sent a {type(message).__name__}, which publishers do not send")
        return []

    def _welcome(self, message: Welcome) -> list[Effect]:
        if message.protocol != PROTOCOL:
            self.error = WireError(
                f"the publisher speaks protocol {message.protocol}, this is {PROTOCOL}; "
                "use the same weightcast on both sides"
            )
            return []
        if self.epoch is not None and message.epoch < self.epoch:
            # A forgotten trainer that still runs: whatever it announces is older than what was seen.
            return []
        if message.epoch != self.epoch:
            self._drop_unreleased()
            self.released = None
        self.epoch = message.epoch
        self.specs = message.specs
        self.error = self._compare_model(message.specs)
        return []

    def _compare_model(self, specs: tuple[TensorSpec, ...]) -> ModelMismatch | None:
        if self._expect is None:
            return None
        lines = find_model_differences(self._expect, specs)
        if not lines:
            return None
        more = f"; and {len(lines) - MAX_DIFFERENCES_SHOWN} more" if len(lines) > MAX_DIFFERENCES_SHOWN else ""
        return ModelMismatch(
            f"engine {self.engine!r} and the publisher have different models: "
            f"{'; '.join(lines[:MAX_DIFFERENCES_SHOWN])}{more}. Start the engine on a checkpoint of the model "
            "that is being trained, or give it the right publisher's address"
        )

    def _announced(self, announce: Announce, now_s: float) -> list[Effect]:
        version = announce.version
        if self.epoch is not None and version.epoch < self.epoch:
            reason = f"engine {self.engine!r} has met a later publisher (epoch {self.epoch}); this one is fenced"
            return [Tell(Failed(version, reason))]
        if self.specs is None or version.epoch != self.epoch:
            return []
        if isinstance(self.error, ModelMismatch):
            return [Tell(Failed(version, str(self.error)[:4000]))]
        if self.serving is not None and version <= self.serving:
            if version == self.serving:
                return [Tell(Serving(version, 0.0, ()))]
            reason = f"engine {self.engine!r} serves version {self.serving}, which is newer"
            return [Tell(Failed(version, reason))]
        if self.taken is not None:
            self._waiting = announce
            return []
        if self.arrival is not None and self.arrival.announce.version == version:
            # The coordinator met this engine anew: say again what it may have missed.
            return self._tell_staged() if self.arrival.is_staged else []
        return self._begin(announce, now_s)

    def _begin(self, announce: Announce, now_s: float) -> list[Effect]:
        self.error = None
        self.arrival = None
        if self.role == "observer":
            self.arrival = Arrival(announce, None, self._limits, now_s, now_s, tensors={})
            return []
        assert self.specs is not None
        try:
            manifest, layouts = read_announce(announce, self.specs)
            self.arrival = Arrival(announce, Staging(manifest, layouts, self._pool), self._limits, now_s)
        except WireError as error:
            return self._refuse(announce.version, error)
        except MemoryError:
            num_bytes = sum(spec.num_bytes for spec in self.specs)
            reason = f"engine {self.engine!r} has no memory for the {num_bytes} bytes of version {announce.version}"
            return self._refuse(announce.version, WireError(reason))
        return self.arrival.begin(now_s) or self._tell_staged()

    def land(self, rank: int, header: ChunkHeader, buffer: npt.NDArray[np.uint8], now_s: float) -> list[Effect]:
        """A chunk of the source `rank` came; `buffer` holds its bytes."""
        arrival = self.arrival
        if arrival is None or not arrival.wants(rank, header):
            return []
        if not header.held:
            # The source has packed a newer version, whose announcement is on its way.
            self.arrival = None
            return []
        try:
            effects = arrival.land(rank, header.index, buffer, now_s)
        except WireError as error:
            return self._refuse(arrival.announce.version, error)
        return self._tell_staged() if arrival.is_staged else effects

    def _tell_staged(self) -> list[Effect]:
        arrival = self.arrival
        if arrival is None or arrival.staging is None:
            return []
        return [Tell(arrival.make_staged(self._wall_offset_s))]

    def _refuse(self, version: Version, error: WeightcastError) -> list[Effect]:
        # Without its traceback, whose frames would keep the refused version's memory.
        self.error = error.with_traceback(None)
        self.arrival = None
        return [Tell(Failed(version, str(error)[:4000]))]

    def give_up(self, reason: str) -> list[Effect]:
        """Refuse the version that is on its way."""
        if self.arrival is None or self.arrival.is_staged:
            return []
        return self._refuse(self.arrival.announce.version, WireError(reason))

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
        self.serving = self.taken.announce.version
        return [Tell(Serving(self.serving, pause_s, spans)), *self._let_go(now_s)]

    def reject(self, reason: str, now_s: float) -> list[Effect]:
        """The engine could not load the version that it took, and goes on with the one before."""
        assert self.taken is not None
        return [Tell(Failed(self.taken.announce.version, reason[:4000])), *self._let_go(now_s)]

    def _let_go(self, now_s: float) -> list[Effect]:
        self.taken = None
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else self._announced(waiting, now_s)

    # What time does

    def tick(self, now_s: float) -> list[Effect]:
        """Ping, ask again for chunks that did not come, and notice a coordinator that fell silent."""
        if self.is_dismissed:
            return []
        effects: list[Effect] = []
        if now_s - self._pinged_s >= self._limits.ping_every_s:
            self._pinged_s = now_s
            effects.append(Tell(Ping()))
        if self._heard_s is not None and now_s - self._heard_s > self._limits.lost_after_s:
            self._heard_s = None
            # What was dropped must be announced again, even by a publisher that did not miss this engine.
            self._is_met = False
            self._lose()
        return effects if self.arrival is None else effects + self.arrival.repeat_overdue(now_s)

    def _lose(self) -> None:
        what = f"engine {self.engine!r}: the publisher was silent for {self._limits.lost_after_s:g} s"
        arrival = self.arrival
        if arrival is not None and arrival.staging is not None and not arrival.is_staged:
            what += f" while version {arrival.announce.version} lacked {arrival.staging.num_missing} chunks"
        serves = f"goes on serving version {self.serving}" if self.serving else "keeps the weights it has"
        self.error = PeerLost(f"{what}; the engine {serves} and takes the next version of whoever publishes here")
        self._drop_unreleased()
