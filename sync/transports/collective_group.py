"""The live side of a roster: a store to meet in, heartbeats, and one broadcast group a source.

Source rank 0 holds a store in which members say that they are there, and are alive. Every source has a group of its
own, in which it is rank 0 and all engines follow, so that all sources broadcast at the same time. A member that sees a
broadcast fail says so in the store, and all others give up within a moment instead of at their deadlines; who was lost
is told by the heartbeats, which a killed process and a stopped one both cease to give.

    rendezvous = Rendezvous.host("127.0.0.1", 0, "source-0", lost_after_s=5)
    rendezvous.propose(Roster(1, (0,), ("engine-0",)))
    with rendezvous.meet(roster, deadline) as live:
        live.groups[0].broadcast(...)

Everything in the store is our own checked form. The store is neither encrypted nor authenticated.
"""

import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from weightcast.sync.errors import ConfigError, DeadlineExceeded, PeerLost
from weightcast.sync.transports import collective_roster
from weightcast.sync.transports.collective_backend import (
    SLICE_S,
    BroadcastGroup,
    Watch,
    call_within,
    check_backend,
    connect_store,
    listen_store,
)
from weightcast.sync.transports.collective_roster import Kind, Message, Roster, source_name

BEATS_A_LOSS = 8
_GENERATION = "generation"
_POLL_S = 0.01
_REQUEST_S = 30.0  # of the store's own requests, none of which waits for another member


class Rendezvous:
    """One member's way into the store. Thread-safe; `close` it when the member leaves."""

    def __init__(self, store: TCPStore, name: str, lost_after_s: float, interface: str, is_host: bool) -> None:
        self.name = name
        self.address = f"tcp://{store.host}:{store.port}"
        self.lost_after_s = lost_after_s
        self.is_host = is_host
        self._interface = interface
        self._store = PrefixStore("weightcast", store)
        self._beats = PrefixStore("weightcast", connect_store(store.host, store.port, time.monotonic() + _REQUEST_S))
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name=f"weightcast-beat-{name}")
        self._thread.start()
        # At exit too: Python ends a daemon thread that comes back from torch's C++ then, and the process with it.
        self._end = weakref.finalize(self, _end_beating, self._stop, self._thread)

    @classmethod
    def host(cls, address: str, name: str, *, timeout_s: float, lost_after_s: float) -> "Rendezvous":
        """Listen at `address` (`tcp://host:port`, port 0 for a free one). Raises `AddressError`."""
        host, port = parse_address(address)
        return cls(listen_store(host, port, _REQUEST_S), name, lost_after_s, host, True)

    @classmethod
    def join(cls, address: str, name: str, *, timeout_s: float, lost_after_s: float) -> "Rendezvous":
        """Connect to the host at `address`. Raises `DeadlineExceeded` when nobody listens within `timeout_s`."""
        host, port = parse_address(address)
        store = connect_store(host, port, time.monotonic() + timeout_s)
        store.set_timeout(timedelta(seconds=_REQUEST_S))
        return cls(store, name, lost_after_s, "127.0.0.1" if host in ("127.0.0.1", "localhost") else "", False)

    def put(self, key: str, message: Message) -> None:
        """Write a message for the others."""
        self._ask("set", key, collective_roster.encode(message))

    def find(self, key: str, kind: type[Kind]) -> Kind | None:
        """The message at `key`, or None when it is not there yet. `WireError` when it is something else."""
        if not self._ask("check", [key]):
            return None
        return collective_roster.decode(bytes(self._ask("get", key)), kind)

    def drop(self, key: str) -> None:
        """Forget a message that nobody needs any more."""
        self._ask("delete_key", key)

    def count(self, key: str, amount: int = 0) -> int:
        """Add to a number that begins at 0; what it is then."""
        return int(self._ask("add", key, amount))

    def propose(self, roster: Roster) -> None:
        """On the host: let the members of `roster` meet."""
        assert self.is_host
        self.put(f"roster/{roster.generation}", roster)
        self._ask("set", _GENERATION, str(roster.generation))

    def await_roster(self, after: int, deadline: float) -> Roster:
        """The newest roster of a generation beyond `after`. `DeadlineExceeded` when the host proposes none in time.

        One that leaves this member out is waited past by a newcomer (`after` is 0), and `PeerLost` for a member. So is
        one that a process of the same name has met in: this one was started again, and belongs to the next.
        """
        while True:
            if self._ask("check", [_GENERATION]):
                generation = int(self._ask("get", _GENERATION))
                if generation > after and (roster := self.find(f"roster/{generation}", Roster)) is not None:
                    was_here = not after and self._ask("check", [f"ready/{generation}/{self.name}"])
                    if self.name in roster.names() and not was_here:
                        return roster
                    if after:
                        raise PeerLost(
                            f"{self.name} is not in generation {generation} of {', '.join(roster.names())}; it was "
                            "taken for lost. Have source rank 0 rebuild with it, or receive over another transport"
                        )
            self._pause(deadline, f"for a roster after generation {after} with its name in it", "source rank 0's")

    def await_all(
        self, keys: dict[str, str], kind: type[Kind], deadline: float, what: str, watch: Watch | None = None
    ) -> dict[str, Kind]:
        """For each member in `keys` the message at its key. `DeadlineExceeded` names those that are missing.

        `watch` is called while waiting, and may raise.
        """
        found: dict[str, Kind] = {}
        while True:
            for name, key in keys.items():
                if name not in found and (message := self.find(key, kind)) is not None:
                    found[name] = message
            if len(found) == len(keys):
                return found
            if watch is not None:
                watch()
            self._pause(deadline, what, ", ".join(name for name in keys if name not in found))

    def _pause(self, deadline: float, what: str, whom: str) -> None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"{self.name} waited {what}, and these have not come: {whom}; start them, leave them out of the "
                "roster, or give more time"
            )
        time.sleep(_POLL_S)

    def meet(self, roster: Roster, backend: str, deadline: float, watch: Watch | None = None) -> "LiveGroups":
        """Build the groups of `roster` together with all its members. `DeadlineExceeded` names who did not come.

        `watch` is called while members are waited for, and may raise.
        """
        check_backend(backend)
        generation = roster.generation
        self.put(f"ready/{generation}/{self.name}", roster)
        ready = {name: f"ready/{generation}/{name}" for name in roster.names()}
        self.await_all(ready, Roster, deadline, f"for the members of generation {generation}", watch)
        groups: dict[int, BroadcastGroup] = {}
        try:
            for source in roster.sources:
                members = (source_name(source), *roster.engines)
                if self.name in members:
                    store = PrefixStore(f"group/{generation}/{source}", self._store)
                    left_s = max(0.1, deadline - time.monotonic())
                    rank = members.index(self.name)
                    groups[source] = BroadcastGroup.build(backend, store, rank, len(members), left_s, self._interface)
        except BaseException:
            for group in groups.values():
                group.close()
            raise
        finally:
            self._store.set_timeout(timedelta(seconds=_REQUEST_S))
        return LiveGroups(self, roster, groups)

    def count_beats(self, names: Iterable[str]) -> dict[str, int]:
        """How often each member has shown that it is alive."""
        return {name: self.count(f"beat/{name}") for name in names}

    def fail(self, generation: int, reason: str) -> None:
        """Tell the members of a generation that its groups are broken. Never raises."""
        try:
            self._ask("set", f"failed/{generation}", f"{self.name}: {reason}"[:2000])
        except PeerLost:
            return  # the store is gone: everybody notices

    def find_failure(self, generation: int) -> str | None:
        """What a member said when it saw the groups of `generation` break; None while nobody did."""
        if not self._ask("check", [f"failed/{generation}"]):
            return None
        return bytes(self._ask("get", f"failed/{generation}")).decode(errors="replace")

    def _ask(self, call: str, *arguments: Any) -> Any:
        try:
            return call_within(partial(getattr(self._store, call), *arguments), max(1.0, self.lost_after_s))
        except (RuntimeError, TimeoutError) as error:
            raise PeerLost(
                f"{self.name} lost source rank 0, which holds the store at {self.address}: "
                f"{str(error).splitlines()[0][:200]}. Start the sources again and join them"
            ) from None

    def _beat(self) -> None:
        self._beats.add(f"beat/{self.name}", 1)

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.lost_after_s / BEATS_A_LOSS):
            try:
                self._beat()
            except RuntimeError:
                return  # the store is gone; whoever waits for something notices

    def close(self) -> None:
        """Stop the heartbeat: from now on this member counts as lost."""
        self._end()


def _end_beating(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(1.0)


class LiveGroups(AbstractContextManager["LiveGroups"]):
    """This member's groups of one generation, by source. Once one breaks, all are of no use."""

    def __init__(self, rendezvous: Rendezvous, roster: Roster, groups: dict[int, BroadcastGroup]) -> None:
        self.roster = roster
        self.groups = groups
        self._rendezvous = rendezvous
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, float]] = {}
        self._next_look_s = 0.0
        # An engine needs no other engine; a source needs them all, and each other to make a whole model.
        is_engine = rendezvous.name in roster.engines
        watched = map(source_name, roster.sources) if is_engine else roster.names()
        self._watched = [name for name in watched if name != rendezvous.name]

    def watch(self) -> None:
        """Raise `PeerLost` when a member is lost or said that the groups are broken. Cheap; called while waiting."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_look_s:
                return
            self._next_look_s = now_s + SLICE_S
            failure = self._rendezvous.find_failure(self.roster.generation)
            lost = self._look(self._watched, now_s)
        if failure is not None:
            raise PeerLost(f"generation {self.roster.generation} of the groups is broken: {failure}")
        if lost:
            raise PeerLost(f"no sign of life for {self._rendezvous.lost_after_s} s of {', '.join(lost)}")

    def _look(self, names: Iterable[str], now_s: float) -> list[str]:
        """Of `names`, those whose heartbeats have not changed for `lost_after_s`."""
        for name, count in self._rendezvous.count_beats(names).items():
            if self._seen.get(name, (-1, 0.0))[0] != count:
                self._seen[name] = (count, now_s)
        return [name for name in names if now_s - self._seen[name][1] > self._rendezvous.lost_after_s]

    def find_lost(self) -> tuple[str, ...]:
        """Which members are lost, looked at for as long as it takes to tell. For use after a failure."""
        others = [name for name in self.roster.names() if name != self._rendezvous.name]
        before = self._rendezvous.count_beats(others)
        end_s = time.monotonic() + self._rendezvous.lost_after_s
        silent = set(others)
        while silent and time.monotonic() < end_s:
            time.sleep(self._rendezvous.lost_after_s / BEATS_A_LOSS / 2)
            silent = {name for name, count in self._rendezvous.count_beats(silent).items() if count == before[name]}
        return tuple(name for name in others if name in silent)

    def give_up(self, reason: str) -> None:
        """Close every group and tell the others why."""
        self._rendezvous.fail(self.roster.generation, reason)
        self.close()

    def close(self) -> None:
        """Close every group, without waiting."""
        for group in self.groups.values():
            group.close()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`; `ConfigError` for anything else, and for every interface at once."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"the address {address!r} is not of the form tcp://host:port")
    host = host.strip("[]")
    if host in ("*", "0.0.0.0", "::"):
        raise ConfigError(
            f"{address!r} is every interface; collectives have no keys, so name the private one's address"
        )
    return host, int(port)
