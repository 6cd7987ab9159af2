"""The publisher's side of a fleet that meets in a store: who is there, when a version is released, what became of it.

The rules are those of `sync/fleet.py`. An engine is heard when its record has a new beat, by this process's own clock;
one that stays silent for `lost_after_s` is lost and fenced. A record that was there before, of a process that is dead,
holds the first publish up for so long.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from weightcast.sync import fleet
from weightcast.sync.disk.fleet_records import (
    MAX_ENGINES,
    MAX_MEMBER_BYTES,
    MEMBER_PREFIX,
    OUTCOME,
    RELEASE,
    Member,
    Outcome,
    Release,
    member_file,
)
from weightcast.sync.disk.naming import ENGINES, version_folder
from weightcast.sync.disk.records import Hashing, Unfinished, seal, unseal
from weightcast.sync.disk.routes import Held
from weightcast.sync.disk.store import Store, read_file
from weightcast.sync.errors import DeadlineExceeded, EngineError, WireError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.records import Span
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

_FIRST_POLL_S = 0.005
# So long after it was lost, an engine's record is removed; one that comes back writes it again.
_REMOVE_AFTER = 10


@dataclass(slots=True)
class _Known:
    member: Member
    heard_s: float
    has_beaten: bool = False


class StoreFleet:
    """See the module. For rank 0."""

    def __init__(self, store: Store, hashing: Hashing, policy: FleetPolicy, lost_after_s: float) -> None:
        self.policy, self._store, self._hashing, self._lost_after_s = policy, store, hashing, lost_after_s
        self._known: dict[str, _Known] = {}
        self._past_lives: set[tuple[str, str]] = set()
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def look(self) -> tuple[EngineStatus, ...]:
        """The engines as they are now. From any thread."""
        with self._lock:
            return self._look()

    def _look(self) -> tuple[EngineStatus, ...]:
        now_s = time.monotonic()
        names = [name for name in sorted(self._store.files(ENGINES)) if name.startswith(MEMBER_PREFIX)][:MAX_ENGINES]
        for name in self._known.keys() - set(names):
            del self._known[name]
        for name in names:
            if (member := self._read(name)) is not None:
                self._hear(name, member, now_s)
        self._forget_dead(now_s)
        return tuple(self._describe(known, now_s) for known in self._known.values())

    def _read(self, name: str) -> Member | None:
        try:
            member = unseal(read_file(self._store, ENGINES, name, MAX_MEMBER_BYTES), Member, self._hashing)
            if member_file(member.engine) != name:
                raise WireError(f"it is the record of engine {member.engine!r}, which has another name")
        except (OSError, Unfinished):
            return None  # being replaced, or gone
        except WireError as error:
            self._tell_once(f"{self._store.url}/{ENGINES}/{name} is left out: {error}")
            return None
        return member

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    def _hear(self, name: str, member: Member, now_s: float) -> None:
        known = self._known.get(name)
        if (member.engine, member.life) in self._past_lives:
            self._tell_once(
                f"two engines call themselves {member.engine!r}, or an old record of it was put back: name each once"
            )
        elif known is None:
            self._known[name] = _Known(member, now_s)
        elif member.life != known.member.life:
            self._past_lives.add((known.member.engine, known.member.life))
            self._known[name] = _Known(member, now_s, has_beaten=True)
        elif member.beat > known.member.beat:
            self._known[name] = _Known(member, now_s, has_beaten=True)

    def _forget_dead(self, now_s: float) -> None:
        for name, known in list(self._known.items()):
            if now_s - known.heard_s > _REMOVE_AFTER * self._lost_after_s:
                del self._known[name]
                with suppress(OSError):
                    self._store.remove(ENGINES, [name])

    def _describe(self, known: _Known, now_s: float) -> EngineStatus:
        member = known.member
        lost = now_s - known.heard_s > self._lost_after_s
        return EngineStatus(
            member.engine,
            member.role,
            member.serving,
            known.heard_s,
            staged=member.staged,
            refused=member.refused,
            lost=lost,
            stage_s=member.stage_s,
            pause_s=member.pause_s,
            num_bytes=member.num_bytes,
            checksums_checked=member.checksums_checked,
            spans=member.spans,
            reason=f"silent for {self._lost_after_s:g} s" if lost else member.reason,
            transport="disk",
        )

    def wait_for(self, count: int, deadline_s: float) -> None:
        """Wait until `count` engines that receive have been heard. Raises `DeadlineExceeded`."""
        started_s = time.monotonic()

        def is_enough() -> bool:
            heard = {known.member.engine for known in self._known.values() if known.has_beaten}
            found = self.look()
            return sum(e.role == "receiver" and not e.lost and e.engine in heard for e in found) >= count

        if not self._poll(is_enough, deadline_s):
            raise DeadlineExceeded(
                f"waited {time.monotonic() - started_s:.1f} s for {count} engines to follow {self._store.url}; "
                f"those known are {', '.join(e.engine for e in self.look()) or 'none'}"
            )

    def _poll(self, look: Callable[[], bool], deadline_s: float) -> bool:
        pause_s = _FIRST_POLL_S
        while not look():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, self._store.poll_s)
        return True

    def agree(self, held: Held, deadline_s: float, check_fence: Callable[[], None]) -> Outcome:
        """Release the version when the policy is met, and wait until the fleet serves it; what became of it.

        An outcome with an error is no exception here: the other sources have to learn of it first.
        """
        version, written_at_s = held.version, time.time()
        released_at_s: float | None = None

        def is_over() -> bool:
            nonlocal released_at_s
            engines = self._look_for(version)
            if released_at_s is None and fleet.is_released(self.policy, engines, version):
                check_fence()
                self._write(version, RELEASE, Release(version, held.seal))
                released_at_s = time.time()
            if released_at_s is None:
                return _is_refused(engines, version)
            return fleet.is_finished(self.policy, engines, version)

        self._poll(is_over, deadline_s)
        engines, ended_at_s = self._look_for(version), time.time()
        error = ""
        if released_at_s is None or not fleet.is_committed(self.policy, engines, version):
            done = "was released, and not served by all," if released_at_s is not None else "was not released"
            error = f"version {version} {done} under the policy {self.policy}: "
            error += fleet.describe_engines(engines, version)
        spans = (
            Span("stage", written_at_s, ended_at_s if released_at_s is None else released_at_s),
            Span("commit", ended_at_s if released_at_s is None else released_at_s, ended_at_s),
        )
        reports = tuple(fleet.make_report(engine, version) for engine in engines)
        return Outcome(version, reports, spans, error[:4000])

    def _look_for(self, version: Version) -> tuple[EngineStatus, ...]:
        return tuple(_of_version(engine, version) for engine in self.look())

    def tell(self, outcome: Outcome) -> None:
        """Let the other sources know."""
        self._write(outcome.version, OUTCOME, outcome)

    def _write(self, version: Version, name: str, rec: object) -> None:
        self._store.write(version_folder(version), name, [seal(rec, self._hashing)])


def _is_refused(engines: Iterable[EngineStatus], version: Version) -> bool:
    """Whether nobody is left who could still make the policy met."""
    states = [engine.state(version) for engine in engines if engine.role == "receiver"]
    return "refused" in states and "staging" not in states


def _of_version(engine: EngineStatus, version: Version) -> EngineStatus:
    """Without the figures and the reason of an earlier version."""
    if version in (engine.staged, engine.serving, engine.refused):
        return engine
    return replace(fleet.begin_version(engine), reason=engine.reason if engine.lost else "")


def check_outcome(outcome: Outcome, place: str) -> None:
    """Raise what `WeightPublisher.publish` raises: `EngineError` when an engine refused, `DeadlineExceeded`."""
    if outcome.error:
        refused = any(engine.state == "refused" for engine in outcome.engines)
        raise (EngineError if refused else DeadlineExceeded)(
            f"{outcome.error}. It lies whole in {place}; engines keep what they serve: mend or remove the engine, or "
            "publish the next version"
        )
