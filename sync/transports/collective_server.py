"""A source of a publisher that broadcasts: a store for its engines, a group with those that are willing, one thread.

    server = BroadcastServer(rank, "10.0.0.1", "gloo", lost_after_s=10)
    server.hold(snapshot)          # at a version's border: decides, by what is known, and begins
    server.ticket                  # what engines are told of that
    server.notify(index)           # from the packer's thread: chunk `index` is packed

Nothing here is waited for by the trainer, the publisher's thread or ZeroMQ's server: all that takes a moment takes
place in the thread. It sends the arena from where it lies, chunks as they are packed; while it does, `is_sending` keeps
the packer from writing there. A member that dies, stops or hangs makes it give the group up, and say so to the others,
who then ask for what they lack; the next version is another generation's, of those who answer (`collective_plan.py`).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import xxhash

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.errors import DeadlineExceeded, PeerLost, WeightcastError
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.transports.collective_backend import check_backend
from weightcast.sync.transports.collective_group import LiveGroups, Rendezvous, parse_address
from weightcast.sync.transports.collective_members import Members, come_key
from weightcast.sync.transports.collective_plan import (
    GATHER_S,
    Border,
    BroadcastTicket,
    Decision,
    Standing,
    broadcast_limit_s,
    decide,
    has_gathered,
    pack_ticket,
    plan_broadcast,
)
from weightcast.sync.transports.collective_roster import Roster, Will, source_name
from weightcast.sync.transports.collective_sender import BucketSender

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_POLL_S = 0.005
_CLOSE_S = 5.0


@dataclass(slots=True)
class _Job:
    """A version that is being broadcast."""

    snapshot: Snapshot
    decision: Decision
    is_withdrawn: bool = False
    is_ending: bool = False
    moved_s: float = field(default_factory=time.monotonic)


class BroadcastServer:
    """See the module. Raises `AddressError` when its store cannot listen, `ConfigError` for a backend it lacks."""

    def __init__(self, rank: int, host: str, backend: str, lost_after_s: float) -> None:
        self._rank = rank
        self._backend = check_backend(backend)
        self._lost_after_s = lost_after_s
        # Of a thread CUDA's present device is 0, whatever its process chose.
        self._device = torch.cuda.current_device() if backend == "nccl" else None
        name = source_name(rank)
        self._rendezvous = Rendezvous.host(f"tcp://{host}:0", name, timeout_s=GATHER_S, lost_after_s=lost_after_s)
        self._lock = threading.Condition()
        self._standing = Standing()
        self._decision = Decision()
        self._members: tuple[Will, ...] = ()
        self._known = Members(self._rendezvous, lost_after_s)
        self._jobs: deque[_Job] = deque()
        self._current: _Job | None = None
        self._live: LiveGroups | None = None
        self._sender: BucketSender | None = None
        self._awaited_index: int | None = None
        self._stopping = False
        self.has_sent = False
        """Whether chunks were sent since `hold`."""
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"weightcast-broadcasts-{rank}")
        self._thread.start()

    # The publisher's side

    @property
    def ticket(self) -> bytes:
        """What engines need to take part, and whether the version that is held is broadcast."""
        with self._lock:
            decision, num_engines = self._decision, len(self._members)
        where = (*parse_address(self._rendezvous.address), self._backend, self._lost_after_s)
        return pack_ticket(BroadcastTicket(*where, decision.generation, num_engines, decision.why))

    @property
    def engines(self) -> tuple[Will, ...]:
        """Those that could take part, and what they want."""
        with self._lock:
            return self._members

    @property
    def is_sending(self) -> bool:
        """Whether memory of a snapshot is still sent."""
        with self._lock:
            return self._current is not None or bool(self._jobs)

    def hold(self, snapshot: Snapshot) -> None:
        """A version begins: decide whether it is broadcast, and begin."""
        with self._lock:
            self._decision = decide(self._find_standing(), self._members, Border(snapshot.is_whole, len(snapshot)))
            self.has_sent = False
            if self._decision.generation:
                engines, generation = self._decision.engines, self._decision.generation
                self._standing = replace(self._standing, generation=generation, engines=engines)
                self._jobs.append(_Job(snapshot, self._decision))
                self._lock.notify_all()
            elif self._members:
                logger.info("version %s is not broadcast: %s", snapshot.version, self._decision.why)

    def _find_standing(self) -> Standing:
        # What has left but for its end is as good as done: engines take one version after the other.
        is_busy = bool(self._jobs) or (self._current is not None and not self._current.is_ending)
        return replace(self._standing, is_busy=is_busy)

    def drop(self) -> None:
        """The versions that were held get no more chunks: one that is not whole by now will not be."""
        with self._lock:
            for job in (*self._jobs, *(() if self._current is None else (self._current,))):
                job.is_withdrawn = True
            self._lock.notify_all()

    def notify(self, index: int) -> None:
        """From the packer's thread: chunk `index` is packed."""
        awaited = self._awaited_index
        if awaited is not None and awaited <= index:
            with self._lock:
                self._lock.notify_all()

    def close(self) -> None:
        """Stop; engines ask for what they lack."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(_CLOSE_S)
        self._rendezvous.close()

    # The thread

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            with self._lock:
                if not self._jobs and not self._stopping:
                    self._lock.wait(_LOOK_EVERY_S)
                if self._stopping:
                    break
                job = self._current = self._jobs.popleft() if self._jobs else None
            try:
                if job is None:
                    self._look(time.monotonic())
                else:
                    self._broadcast(job)
            except Exception as error:  # whatever it is, engines ask for what they lack
                expected = isinstance(error, WeightcastError)
                logger.warning("broadcasts of source rank %d: %s", self._rank, error, exc_info=not expected)
                if job is not None:
                    self._break(job.decision.generation, f"{type(error).__name__}: {error}")
            with self._lock:
                self._current = None
        if self._live is not None:
            self._live.give_up("the source ends")

    def _look(self, now_s: float) -> None:
        """Who is there, shows signs of life, and is willing."""
        engines = self._known.look(now_s)
        with self._lock:
            self._members = engines

    def _broadcast(self, job: _Job) -> None:
        generation, engines = job.decision.generation, job.decision.engines
        roster = Roster(generation, (self._rank,), engines)
        is_new = self._live is None or self._live.roster.generation != generation
        if generation <= self._standing.broken:
            raise PeerLost(f"generation {generation} broke before version {job.snapshot.version}")
        if is_new:
            self._let_go()
            self._rendezvous.propose(roster)
        self._gather(job)
        if is_new:
            deadline = time.monotonic() + GATHER_S
            self._live = self._rendezvous.meet(roster, self._backend, deadline, self._check_stop)
            self._sender = BucketSender(self._live.groups[self._rank], self._rank, generation)
            logger.info("source rank %d broadcasts to %s (generation %d)", self._rank, ", ".join(engines), generation)
        self._send(job)
        self._rendezvous.drop(come_key(generation, job.snapshot.version.number))

    def _check_stop(self) -> None:
        if self._stopping:
            raise PeerLost("the source ends")

    def _gather(self, job: _Job) -> None:
        """Wait until every engine has been told of the version: a broadcast that nobody takes would break the group."""
        key = come_key(job.decision.generation, job.snapshot.version.number)
        num_engines = len(job.decision.engines)
        first_s: float | None = None
        while True:
            num_come, now_s = self._rendezvous.count(key), time.monotonic()
            first_s = now_s if first_s is None and num_come else first_s
            come = has_gathered(num_come, num_engines, None if first_s is None else now_s - first_s)
            if come:
                return
            self._check_stop()
            if come is None or (job.is_withdrawn and not num_come):
                raise DeadlineExceeded(
                    f"{num_come} of {num_engines} engines came for the broadcast of version {job.snapshot.version}"
                )
            if self._live is not None:
                self._live.watch()
            time.sleep(_POLL_S)

    def _send(self, job: _Job) -> None:
        snapshot, live, sender = job.snapshot, self._live, self._sender
        assert live is not None and sender is not None
        plan = plan_broadcast([state.chunk.num_bytes for state in snapshot.states])
        job.moved_s = time.monotonic()
        deadline = job.moved_s + broadcast_limit_s(plan.num_bytes)
        self.has_sent = True

        def watch() -> None:
            self._check_stop()
            live.watch()
            if time.monotonic() - job.moved_s > self._lost_after_s:
                raise DeadlineExceeded(f"an engine that is alive has taken nothing for {self._lost_after_s:g} s")

        if snapshot.arena is not None:
            hashes = self._hashes(job, snapshot.arena, deadline)
            sender.send_arena(snapshot.version, plan, snapshot.arena, hashes, deadline, watch)
            return

        def pack(index: int, into: ByteArray) -> bytes:
            self._await_packed(job, index, deadline)
            body = snapshot.body(index, None)
            assert body.data is not None
            into[:] = memoryview(body.data)
            if job.is_withdrawn:
                raise PeerLost(f"version {snapshot.version} was withdrawn")
            self._note(job, index)
            return hash_chunk(index, into)

        sender.send(snapshot.version, plan, pack, deadline, watch)

    def _hashes(self, job: _Job, arena: ByteArray, deadline: float) -> Iterator[bytes]:
        """Each chunk's, once it is packed."""
        start = 0
        for index, state in enumerate(job.snapshot.states):
            end = start + state.chunk.num_bytes
            self._await_packed(job, index, deadline)
            self._note(job, index)
            yield hash_chunk(index, arena[start:end])
            start = end

    def _note(self, job: _Job, index: int) -> None:
        job.moved_s = time.monotonic()
        job.is_ending = index + 1 == len(job.snapshot)

    def _await_packed(self, job: _Job, index: int, deadline: float) -> None:
        while not job.snapshot.is_ready(index):
            assert self._live is not None
            self._check_stop()
            self._live.watch()
            if job.is_withdrawn or time.monotonic() > deadline:
                raise DeadlineExceeded(f"version {job.snapshot.version} was not packed to its end")
            with self._lock:
                self._awaited_index = index
                if not job.snapshot.is_ready(index):
                    self._lock.wait(_LOOK_EVERY_S)
                self._awaited_index = None

    def _break(self, generation: int, reason: str) -> None:
        """Nothing more goes over this generation's group."""
        with self._lock:
            self._standing = replace(self._standing, broken=max(generation, self._standing.broken), engines=())
        self._rendezvous.fail(generation, reason)
        self._let_go()

    def _let_go(self) -> None:
        live, self._live, self._sender = self._live, None, None
        if live is not None:
            live.close()


def hash_chunk(index: int, body: ByteArray) -> bytes:
    """What engines check a chunk by before they use it."""
    return xxhash.xxh3_128_digest(body.data)
