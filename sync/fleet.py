"""The fleet: the engines that must agree, and the rule by which they commit. Pure.

An engine stages a version, is told that the fleet released it, and then serves it. The policy says how many engines
must have staged before any may commit; an engine that missed a released version is fenced until it has caught up.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from weightcast.sync.errors import ConfigError
from weightcast.sync.messages import Failed, Serving, Staged
from weightcast.sync.records import EngineReport, Span
from weightcast.sync.version import Version

Role: TypeAlias = Literal["receiver", "observer"]
STATES = ("joined", "staging", "staged", "serving", "refused", "lost", "fenced")


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """When a version is released.

        FleetPolicy.all()            # every engine that is connected and answers has staged it; none is enough
        FleetPolicy.all(minimum=4)   # the same, and at least four
        FleetPolicy.quorum(3)        # three engines have; the others are fenced until they catch up

    An engine that stopped answering holds nobody up under either rule: it is fenced. One that refuses a version
    blocks it under `all`, and is fenced under `quorum`.
    """

    kind: Literal["all", "quorum"]
    count: int

    def __post_init__(self) -> None:
        if self.kind not in ("all", "quorum") or self.count < 0 or (self.kind == "quorum" and self.count < 1):
            raise ConfigError(
                f"no such fleet policy: kind {self.kind!r} with a count of {self.count}; "
                "use FleetPolicy.all(minimum >= 0) or FleetPolicy.quorum(count >= 1)"
            )

    @classmethod
    def all(cls, minimum: int = 0) -> "FleetPolicy":
        """Every engine that answers, and at least `minimum` of them."""
        return cls("all", minimum)

    @classmethod
    def quorum(cls, count: int) -> "FleetPolicy":
        """At least `count` engines."""
        return cls("quorum", count)

    def is_met(self, num_ready: int, num_pending: int, num_refused: int) -> bool:
        """Whether `num_ready` engines suffice while `num_pending` are on their way and `num_refused` will not come."""
        if self.kind == "quorum":
            return num_ready >= self.count
        return num_pending == 0 and num_refused == 0 and num_ready >= self.count

    def __str__(self) -> str:
        return f"{self.kind}({self.count})"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the coordinator knows of an engine. `last_seen_s` is the coordinator's monotonic clock."""

    engine: str
    role: Role
    serving: Version | None
    last_seen_s: float
    staged: Version | None = None
    refused: Version | None = None
    lost: bool = False
    stage_s: float = 0.0
    pause_s: float = 0.0
    num_bytes: int = 0
    checksums_checked: int = 0
    spans: tuple[Span, ...] = field(default=())
    reason: str = ""
    transport: str = ""
    num_repeats: int = 0
    asked_bytes: int = 0

    def state(self, current: Version | None, *, closed: bool = False) -> str:
        """One of `STATES`, seen from the `current` version; `closed` when its publication has ended."""
        if self.lost:
            return "lost"
        if current is None:
            return "joined"
        # An engine with a later epoch's version serves no version of this one: it will refuse it.
        if self.serving is not None and self.serving.epoch == current.epoch and self.serving >= current:
            return "serving"
        if self.refused == current:
            return "refused"
        if closed:
            return "fenced"
        if self.staged == current:
            return "staged"
        return "staging" if self.role == "receiver" else "joined"


def begin_version(status: EngineStatus) -> EngineStatus:
    """An engine before a new version: the figures of the one before are cleared."""
    cleared = replace(status, stage_s=0.0, pause_s=0.0, num_bytes=0, checksums_checked=0, spans=(), reason="")
    return replace(cleared, transport="", num_repeats=0, asked_bytes=0)


def note_staged(status: EngineStatus, message: Staged) -> EngineStatus:
    """After `Staged`."""
    return replace(
        status,
        staged=message.version,
        stage_s=message.stage_s,
        num_bytes=message.num_bytes,
        checksums_checked=message.checksums_checked,
        spans=status.spans + message.spans,
        transport=message.transport,
        num_repeats=message.num_repeats,
        asked_bytes=message.asked_bytes,
    )


def note_serving(status: EngineStatus, message: Serving) -> EngineStatus:
    """After `Serving`. An engine that was met anew says it again, with no pause: the longer one is the real one."""
    pause_s = max(status.pause_s, message.pause_s)
    return replace(status, serving=message.version, pause_s=pause_s, spans=status.spans + message.spans, reason="")


def note_failed(status: EngineStatus, message: Failed) -> EngineStatus:
    """After `Failed`. It may be of an older version than the one that is staged: one that was loaded for too long."""
    staged = None if status.staged == message.version else status.staged
    return replace(status, refused=message.version, staged=staged, reason=message.reason)


def is_released(policy: FleetPolicy, engines: Iterable[EngineStatus], version: Version) -> bool:
    """Whether enough receivers have staged `version`."""
    states = [engine.state(version) for engine in engines if engine.role == "receiver"]
    ready = sum(state in ("staged", "serving") for state in states)
    return policy.is_met(ready, sum(state == "staging" for state in states), states.count("refused"))


def is_finished(policy: FleetPolicy, engines: Iterable[EngineStatus], version: Version) -> bool:
    """Whether every engine that staged or observed a released version serves it, or is past hope.

    Under a quorum, engines that are still staging do not hold the publisher up.
    """
    waiting = ("staged", "joined") if policy.kind == "quorum" else ("staged", "staging", "joined")
    states = [engine.state(version) for engine in engines]
    return not any(state in waiting for state in states)


def is_committed(policy: FleetPolicy, engines: Iterable[EngineStatus], version: Version) -> bool:
    """Whether the engines that serve `version` satisfy the policy; asked when a publication ends."""
    states = [engine.state(version) for engine in engines if engine.role == "receiver"]
    pending = sum(state in ("staging", "staged") for state in states)
    return policy.is_met(states.count("serving"), pending, states.count("refused"))


def make_report(status: EngineStatus, version: Version) -> EngineReport:
    """The engine's line in the report of a publication that has ended."""
    return EngineReport(
        status.engine,
        status.state(version, closed=True),
        status.stage_s,
        status.pause_s,
        status.num_bytes,
        status.checksums_checked,
        status.spans,
        status.reason,
        status.transport,
        status.num_repeats,
        status.asked_bytes,
    )


def describe_engines(engines: Iterable[EngineStatus], version: Version) -> str:
    """`engine-0 is staged, engine-1 refused (why)`: for error messages."""
    lines = []
    for engine in engines:
        why = f" ({engine.reason})" if engine.reason else ""
        lines.append(f"{engine.engine} is {engine.state(version)}{why}")
    return ", ".join(lines) or "no engine is connected"
