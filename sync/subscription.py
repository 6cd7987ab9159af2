"""The subscription: an engine's side of the protocol, without sockets or clocks.

    idle -> staging -> staged -> ready -> (the engine takes it, loads it) -> serving

A version is staged while the engine goes on serving; it is ready when every check has passed and the fleet released
it. A newer version replaces one that is still on its way; while the engine loads one, a newer one waits. Every
method takes the time and returns what to send; a thread elsewhere carries it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from weightcast.sync.errors import ModelMismatch, PeerLost, WeightcastError, WireError
from weightcast.sync.messages import (
    PROTOCOL,
    Announce,
    Bye,
    ChunkHeader,
    ChunkRequest,
    Failed,
    Goodbye,
    Hello,
    Message,
    Ping,
    Pong,
    Release,
    Serving,
    Span,
    Staged,
    Welcome,
)
from weightcast.sync.regions import TensorSpec
from weightcast.sync.staging import BufferPool, Staging, read_announce
from weightcast.sync.version import Version, find_model_differences

MAX_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the source `rank` at `address` for a chunk; its chunks have at most `chunk_bytes`."""

    rank: int
    address: str
    chunk_bytes: int
    message: ChunkRequest


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a message to the coordinator."""

    message: Message


Effect = Request | Tell


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient a subscription is, and how much it asks for at once."""

    credit_chunks: int = 8
    """Chunks asked for and not yet received, a source; times the chunk's size, what may be under way."""
    chunk_timeout_s: float = 10.0
    """A chunk that has not come after this is asked for again."""
    chunk_attempts: int = 3
    """How often a chunk may arrive damaged before the version is refused."""
    ping_every_s: float = 0.5
    lost_after_s: float = 10.0
    """A coordinator that was silent for this long is lost."""


@dataclass(slots=True)
class Arrival:
    """A version on its way in, and the clock of it."""

    announce: Announce
    staging: Staging | None
    started_s: float
    staged_s: float = 0.0
    tensors: dict[str, torch.Tensor] | None = None
    asked_s: dict[tuple[int, int], float] = field(default_factory=dict)
    next_index: dict[int, int] = field(default_factory=dict)
    damaged: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def is_staged(self) -> bool:
        """Whether every check has passed (an observer has nothing to check)."""
        return self.tensors is not None


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
        version = arrival.announce.version
        if not arrival.is_staged:
            assert arrival.staging is not None
            silent = sorted({rank for rank, _ in arrival.asked_s})
            return f"version {version} lacks {arrival.staging.num_missing} chunks, asked of the source ranks {silent}"
        return f"version {version} is staged, and waits for the fleet's policy to release it"

    def hello(self) -> list[Effect]:
        """Make this engine known."""
        return [Tell(Hello(PROTOCOL, self.engine, self.role, self.serving))]

    def receive(self, message: Message, now_s: float) -> list[Effect]:
        """A message of the coordinator."""
        self._heard_s = now_s
        if isinstance(message, Welcome):
            return self._welcome(message)
        if isinstance(message, Announce):
            return self._announced(message, now_s)
        if isinstance(message, Release):
            self.released = message.version
        elif isinstance(message, Pong):
            if not message.known:
                return self.hello()
        elif isinstance(message, Goodbye):
            self.error = PeerLost(f"the publisher ended or refused engine {self.engine!r}: {message.reason}")
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
            self.arrival = Arrival(announce, None, now_s, now_s, tensors={})
            return []
        assert self.specs is not None
        try:
            manifest, layouts = read_announce(announce, self.specs)
            staging = Staging(manifest, layouts, self._pool)
        except WireError as error:
            return self._refuse(announce.version, error)
        self.arrival = Arrival(announce, staging, now_s, next_index=dict.fromkeys(staging.layouts, 0))
        effects = [effect for rank in staging.layouts for effect in self._ask(self.arrival, rank, now_s)]
        return effects or self._complete(self.arrival, now_s)

    def _ask(self, arrival: Arrival, rank: int, now_s: float) -> list[Effect]:
        """Grant the source `rank` credit for as many chunks as are not under way yet."""
        assert arrival.staging is not None
        layout = arrival.staging.layouts[rank]
        effects: list[Effect] = []
        under_way = sum(1 for asked_rank, _ in arrival.asked_s if asked_rank == rank)
        while under_way < self._limits.credit_chunks and arrival.next_index[rank] < len(layout.chunks):
            index = arrival.next_index[rank]
            arrival.next_index[rank] = index + 1
            arrival.asked_s[rank, index] = now_s
            effects.append(
                Request(
                    rank, layout.address, arrival.announce.chunk_bytes, ChunkRequest(arrival.announce.version, index)
                )
            )
            under_way += 1
        return effects

    def land(self, rank: int, header: ChunkHeader, buffer: npt.NDArray[np.uint8], now_s: float) -> list[Effect]:
        """A chunk of the source `rank` came; `buffer` holds its bytes."""
        arrival = self.arrival
        if arrival is None or arrival.staging is None or header.version != arrival.announce.version:
            return []
        if rank not in arrival.staging.layouts or not arrival.staging.is_missing(rank, header.index):
            return []
        if not header.held:
            # The source has packed a newer version, whose announcement is on its way.
            self.arrival = None
            return []
        try:
            arrival.staging.land(rank, header.index, buffer)
        except WireError as error:
            return self._damaged(arrival, rank, header.index, error, now_s)
        arrival.asked_s.pop((rank, header.index), None)
        if arrival.staging.num_missing == 0:
            return self._complete(arrival, now_s)
        return self._ask(arrival, rank, now_s)

    def _damaged(self, arrival: Arrival, rank: int, index: int, error: WireError, now_s: float) -> list[Effect]:
        assert arrival.staging is not None
        attempts = arrival.damaged.get((rank, index), 0) + 1
        arrival.damaged[rank, index] = attempts
        if not arrival.staging.is_missing(rank, index) or attempts >= self._limits.chunk_attempts:
            return self._refuse(arrival.announce.version, error)
        arrival.asked_s[rank, index] = now_s
        address = arrival.staging.layouts[rank].address
        return [Request(rank, address, arrival.announce.chunk_bytes, ChunkRequest(arrival.announce.version, index))]

    def _complete(self, arrival: Arrival, now_s: float) -> list[Effect]:
        assert arrival.staging is not None
        arrival.tensors = arrival.staging.finish()
        arrival.staged_s = now_s
        return self._tell_staged()

    def _tell_staged(self) -> list[Effect]:
        arrival = self.arrival
        if arrival is None or arrival.staging is None:
            return []
        spans = (Span("stage", arrival.started_s + self._wall_offset_s, arrival.staged_s + self._wall_offset_s),)
        staged = Staged(
            arrival.announce.version,
            arrival.staging.num_bytes,
            arrival.staged_s - arrival.started_s,
            arrival.staging.checksums_checked,
            spans,
        )
        return [Tell(staged)]

    def _refuse(self, version: Version, error: WeightcastError) -> list[Effect]:
        self.error = error
        self.arrival = None
        return [Tell(Failed(version, str(error)[:4000]))]

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
        effects: list[Effect] = []
        if now_s - self._pinged_s >= self._limits.ping_every_s:
            self._pinged_s = now_s
            effects.append(Tell(Ping()))
        if self._heard_s is not None and now_s - self._heard_s > self._limits.lost_after_s:
            self._heard_s = None
            self._lose()
        arrival = self.arrival
        if arrival is not None and arrival.staging is not None and not arrival.is_staged:
            for (rank, index), asked_s in list(arrival.asked_s.items()):
                if now_s - asked_s > self._limits.chunk_timeout_s:
                    arrival.asked_s[rank, index] = now_s
                    address = arrival.staging.layouts[rank].address
                    effects.append(
                        Request(
                            rank, address, arrival.announce.chunk_bytes, ChunkRequest(arrival.announce.version, index)
                        )
                    )
        return effects

    def _lose(self) -> None:
        what = f"engine {self.engine!r}: the publisher was silent for {self._limits.lost_after_s:g} s"
        arrival = self.arrival
        if arrival is not None and arrival.staging is not None and not arrival.is_staged:
            what += f" while version {arrival.announce.version} lacked {arrival.staging.num_missing} chunks"
        serves = f"goes on serving version {self.serving}" if self.serving else "keeps the weights it has"
        self.error = PeerLost(f"{what}; the engine {serves} and takes the next version of whoever publishes here")
        self._drop_unreleased()
