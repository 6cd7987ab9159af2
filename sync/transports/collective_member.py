"""An engine's part in the broadcasts of one source: it says what it wants, and receives whatever its group is sent.

    member = BroadcastMember(rank, ticket, "engine-0", insists=False, sink=sink)
    member.say(True)                                  # it wants the next versions so
    member.takes_part(ticket, version, plan)          # whether this one comes so; then the sink is called

Each source has a thread here, which joins, meets the group and takes bucket after bucket, whether the engine wants the
chunks or not: the others could not go on otherwise. Chunks go to the sink as they come, and after the last one, or
when there will be no more for whatever reason, the sink is told that it is over.
"""

import logging
import secrets
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import DeadlineExceeded, PeerLost, WeightcastError
from weightcast.sync.transports.collective_backend import check_backend
from weightcast.sync.transports.collective_buckets import BucketPlan
from weightcast.sync.transports.collective_group import BEATS_A_LOSS, LiveGroups, Rendezvous
from weightcast.sync.transports.collective_members import come_key, enrol, leave, say
from weightcast.sync.transports.collective_plan import GATHER_S, BroadcastTicket, broadcast_limit_s, takes_part
from weightcast.sync.transports.collective_receiver import BucketReceiver
from weightcast.sync.transports.collective_roster import Roster, Will
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

_JOIN_S = 5.0
_POLL_S = 0.005
_CLOSE_S = 5.0


class BroadcastSink(Protocol):
    """Where chunks go. Both are called from a member's thread."""

    def take(self, rank: int, version: Version, index: int, body: ByteArray) -> None:
        """A chunk, whose bytes are what the source sent; valid during the call."""
        ...

    def end(self, rank: int, version: Version, reason: str) -> None:
        """No more chunks of this version come from this source; `reason` is empty when all were sent."""
        ...


@dataclass(frozen=True, slots=True)
class _Task:
    version: Version
    generation: int
    plan: BucketPlan


class BroadcastMember:
    """See the module. `failure` says why it is of no use, once it is: then close it."""

    def __init__(self, rank: int, ticket: BroadcastTicket, engine: str, insists: bool, sink: BroadcastSink) -> None:
        self.failure = ""
        self._rank = rank
        self._ticket = ticket
        self._backend = check_backend(ticket.backend)
        self._device = torch.cuda.current_device() if ticket.backend == "nccl" else None
        self._name = f"{engine[:200]}~{secrets.token_hex(4)}"  # an engine that was started again is another member
        self._insists = insists
        self._sink = sink
        self._lock = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._will = Will(self._name, insists, insists, 0)
        self._said: Will | None = None
        self._generation = 0
        self._last: Version | None = None
        self._stopping = False
        self._live: LiveGroups | None = None
        self._receiver: BucketReceiver | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"weightcast-broadcasts-from-{rank}")
        self._thread.start()

    # The engine's side

    @property
    def is_joined(self) -> bool:
        """Whether the source knows of this engine."""
        with self._lock:
            return self._said is not None and not self.failure

    def say(self, is_willing: bool) -> None:
        """Whether this engine wants to be in the group of the next versions."""
        with self._lock:
            self._will = replace(self._will, willing=is_willing)
            self._lock.notify_all()

    def takes_part(self, ticket: BroadcastTicket, version: Version, plan: BucketPlan) -> bool:
        """Whether a version comes by broadcast; if so it is received."""
        with self._lock:
            is_willing = self._said is not None and self._said.willing
            if self.failure or not takes_part(ticket, version, self._generation, is_willing, self._last):
                return False
            self._last = version
            self._tasks.append(_Task(version, ticket.generation, plan))
            self._lock.notify_all()
            return True

    def close(self) -> None:
        """Leave."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def join(self) -> None:
        """After `close`: wait until the thread has ended; not under a lock that the sink takes."""
        self._thread.join(_CLOSE_S)

    # The thread

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        reason = "the engine left"
        try:
            rendezvous = Rendezvous.join(
                self._ticket.address, self._name, timeout_s=_JOIN_S, lost_after_s=self._ticket.lost_after_s
            )
            try:
                self._serve(rendezvous)
            finally:
                rendezvous.close()
        except Exception as error:  # whatever it is, chunks are asked for
            if not isinstance(error, WeightcastError):
                logger.exception("broadcasts of source rank %d", self._rank)
            reason = f"{type(error).__name__}: {error}"
        with self._lock:
            self.failure = reason
            tasks = list(self._tasks)
        for task in tasks:
            self._end(task, reason)

    def _serve(self, rendezvous: Rendezvous) -> None:
        number, said = enrol(rendezvous, self._will)
        with self._lock:
            self._said = said
            self._will = replace(self._will, after=said.after)
        try:
            while True:
                with self._lock:
                    if self._stopping:
                        return
                    will, task = self._will, self._tasks[0] if self._tasks else None
                    if task is None and will == self._said:
                        self._lock.wait(None if self._live is None else self._ticket.lost_after_s / BEATS_A_LOSS)
                if task is None and self._live is not None:
                    self._look(rendezvous, self._live.roster.generation)
                if will != self._said:
                    say(rendezvous, number, will)
                    with self._lock:
                        self._said = will
                if task is not None:
                    self._receive(rendezvous, task)
        finally:
            if self._live is not None:
                self._live.close()
            with suppress(WeightcastError):
                leave(rendezvous, number)

    def _look(self, rendezvous: Rendezvous, generation: int) -> None:
        """Who has all of a version may not have seen that its group broke after that, and is asked to the next one."""
        if (failure := rendezvous.find_failure(generation)) is not None:
            self._leave_group(rendezvous, generation, failure)

    def _receive(self, rendezvous: Rendezvous, task: _Task) -> None:
        """One version. However it ends, the sink hears of it; a group that broke is left."""
        reason = ""
        try:
            self._come(rendezvous, task)
            assert self._receiver is not None and self._live is not None
            deadline = time.monotonic() + broadcast_limit_s(task.plan.num_bytes) + 2 * GATHER_S

            def take(rank: int, index: int, _: bytes, body: ByteArray) -> None:
                self._sink.take(rank, task.version, index, body)

            received = self._receiver.receive(task.plan, take, deadline, self._watch, task.version)
            if received.damaged:
                logger.warning("%d chunks of source rank %d came damaged", len(received.damaged), self._rank)
        except WeightcastError as error:
            reason = f"{type(error).__name__}: {error}"
            self._leave_group(rendezvous, task.generation, reason)
        with self._lock:
            self._tasks.popleft()
        self._end(task, reason)

    def _end(self, task: _Task, reason: str) -> None:
        if reason and not self._stopping:
            logger.info("version %s does not come whole from source rank %d: %s", task.version, self._rank, reason)
        self._sink.end(self._rank, task.version, reason)

    def _come(self, rendezvous: Rendezvous, task: _Task) -> None:
        """Be where the source waits for this engine, in the group that it sends to."""
        generation = task.generation
        if (failure := rendezvous.find_failure(generation)) is not None:
            raise PeerLost(f"generation {generation} of the groups is broken: {failure}")
        if self._generation == generation:
            rendezvous.count(come_key(generation, task.version.number), 1)
            return
        if self._live is not None:
            self._live.close()
            self._live = None
        roster = self._await_roster(rendezvous, generation)
        if self._name not in roster.engines:
            raise PeerLost(f"generation {generation} of the groups was made without this engine")
        rendezvous.count(come_key(generation, task.version.number), 1)

        def watch() -> None:
            self._check_stop()
            if (failure := rendezvous.find_failure(generation)) is not None:
                raise PeerLost(f"generation {generation} of the groups is broken: {failure}")

        # The source begins when the last engine has come, for which it waits as long.
        self._live = rendezvous.meet(roster, self._backend, time.monotonic() + 2 * GATHER_S, watch)
        self._receiver = BucketReceiver(self._live.groups[self._rank], self._rank, generation)
        with self._lock:
            self._generation = generation

    def _await_roster(self, rendezvous: Rendezvous, generation: int) -> Roster:
        deadline = time.monotonic() + GATHER_S
        while (roster := rendezvous.find(f"roster/{generation}", Roster)) is None:
            self._check_stop()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"source rank {self._rank} did not begin generation {generation}")
            time.sleep(_POLL_S)
        return roster

    def _watch(self) -> None:
        self._check_stop()
        assert self._live is not None
        self._live.watch()

    def _check_stop(self) -> None:
        if self._stopping:
            raise PeerLost("the engine left")

    def _leave_group(self, rendezvous: Rendezvous, generation: int, reason: str) -> None:
        """The group is of no use: say so, and that this engine takes part in what comes after it."""
        live, self._live, self._receiver = self._live, None, None
        if live is not None:
            live.close()
            rendezvous.fail(generation, reason)
        with self._lock:
            self._generation = 0
            self._will = replace(self._will, after=max(generation, self._will.after))
