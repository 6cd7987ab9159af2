"""The states of an engine that follows a publisher, as a pure function of what happened to it.

    serving --Prepared--> prepared --Paused--> loading --Loaded--> loaded --Resumed--> serving (the new version)
       |                     |                    |
       +-Refused--> serving  +-Refused-> serving  +-Refused--> serving (the old version: memory was not touched)
       +-Failed---> poisoned                      +-Failed---> poisoned (memory is undefined: never serves again)

Where versions land in the engine's own memory (`in_place`), `Landed` stands for `Loaded`, and there is one more state:

    loading --Torn--> torn --Prepared--> prepared          (paused all the while; the next version lands whole)

Effects are in `weightcast.adapters.follower`; this file decides only what may follow what.
"""

from dataclasses import dataclass, replace
from typing import Literal

from weightcast.sync.version import Version

Phase = Literal["serving", "prepared", "loading", "loaded", "torn", "poisoned"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """The engine has checked `version` and could load it."""

    version: Version


@dataclass(frozen=True, slots=True)
class Refused:
    """`version` was turned down before engine memory was touched; `None` when no version was known yet."""

    version: Version | None
    reason: str


@dataclass(frozen=True, slots=True)
class Paused:
    """No request runs any more."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Every tensor of the candidate is in engine memory."""


@dataclass(frozen=True, slots=True)
class Landed:
    """Every tensor of `version`, which may be newer than the candidate, is in engine memory."""

    version: Version


@dataclass(frozen=True, slots=True)
class Torn:
    """Engine memory holds bits of several versions, until the next one has landed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Loading stopped in the middle, or the engine says that its weights are undefined."""

    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """Requests run again."""


Event = Prepared | Refused | Paused | Loaded | Landed | Torn | Failed | Resumed


@dataclass(frozen=True, slots=True)
class FollowerState:
    """Where an engine stands: what it serves, what it is taking, and how that went so far."""

    phase: Phase = "serving"
    serving: Version | None = None
    candidate: Version | None = None
    num_updates: int = 0
    num_refused: int = 0
    last_error: str = ""

    @property
    def healthy(self) -> bool:
        """Whether the weights in engine memory are those of one whole version."""
        return self.phase not in ("torn", "poisoned")


def advance(state: FollowerState, event: Event) -> FollowerState:
    """The state after `event`. Pure; an event that cannot follow is a programming error (`AssertionError`)."""
    match state.phase, event:
        case (("serving" | "torn"), Prepared(version)):
            return replace(state, phase="prepared", candidate=version)
        case "prepared", Paused():
            return replace(state, phase="loading")
        case "loading", Loaded():
            return replace(state, phase="loaded")
        case "loading", Landed(version):
            return replace(state, phase="loaded", candidate=version)
        case "loading", Torn(reason):
            refused = state.num_refused + 1
            return replace(state, phase="torn", serving=None, candidate=None, num_refused=refused, last_error=reason)
        case "loaded", Resumed():
            done = state.num_updates + 1
            return replace(
                state, phase="serving", serving=state.candidate, candidate=None, num_updates=done, last_error=""
            )
        case (("serving" | "prepared" | "loading"), Refused(_, reason)):
            refused = state.num_refused + 1
            return replace(state, phase="serving", candidate=None, num_refused=refused, last_error=reason)
        case (("serving" | "loading" | "loaded"), Failed(reason)):
            return replace(state, phase="poisoned", serving=None, last_error=reason)
    raise AssertionError(f"{event} cannot follow {state}")
