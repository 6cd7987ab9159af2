"""The publisher: what a trainer rank holds to keep a fleet of engines in step.

    with WeightPublisher(bridge.weight_source(model), "tcp://127.0.0.1:5600") as publisher:
        for step in range(1, steps + 1):
            train()
            report = publisher.publish(version=step)

Every rank of the model makes one with the same address. Rank 0 binds it and coordinates; the others make themselves
known to it and serve their own regions. No collective is issued. A version is packed into host memory (one extra copy
of this rank's share) while engines already fetch what is packed. From then on training may go on:

    publication = publisher.begin(version=step)     # returns when this rank's bits are safe
    train()
    report = publication.wait()                     # the fleet serves it

or sooner still, with the next optimizer step held back (`publication.py`).
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Literal, TypeAlias, get_args

import numpy as np

from weightcast.sync.chunks import DEFAULT_CHUNK_BYTES, check_chunk_bytes
from weightcast.sync.coordinator import Coordinator
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, VersionError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.messages import PROTOCOL, Packed, SourceHello
from weightcast.sync.packer import Packer, PackMode
from weightcast.sync.publication import Publication
from weightcast.sync.publisher_loop import PublisherLoop
from weightcast.sync.records import SourceReport, Span
from weightcast.sync.report import PublishReport, make_report
from weightcast.sync.schema import MAX_UINT
from weightcast.sync.share import Share, check_in_place
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.servers import choose_kinds
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.version import Version, fingerprint, new_epoch

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_LOST_AFTER_S = 10.0


DeltaMode: TypeAlias = Literal["auto", "on", "off", "zstd"]


class WeightPublisher:
    """See the module.

    `policy` decides how many engines must have staged a version before any serves it; `timeout_s` bounds every
    wait; an engine silent for `lost_after_s` is fenced; `epoch` is for tests and for resuming under a known epoch.

    `delta` says whether engines that have an earlier version are sent what changed since: "on", "zstd" (entropy-coded,
    for links below 1 Gb/s), "off", or "auto", by what was measured (see `advice.py`). Engines may be up to `history`
    versions behind. `expose` names the kinds of memory, of which the first that this machine has is packed into, so
    that engines of the same host may read it by themselves; "tcp", for links that are faster than ZeroMQ's and not
    encrypted; and "collective", for broadcasts over Gloo of what is sent whole ("collective_nccl": over NCCL). None is
    "shared_memory" and, without keys, "tcp"; an empty one leaves ZeroMQ alone.

    Of weights on a GPU, what changed is found there before anything is copied: with "on" or "zstd", where the GPU has
    room for one more copy of this rank's share (`device_packer.py`), and with `expose=("cuda_ipc",)`, which has that
    copy anyway and from which engines' GPUs read.

    With `in_place` the weights are read and sent where they lie, and this rank keeps no copy of its share. They must
    stay as they are until the fleet serves the version: `publish`, `begin` without `hold` and the publication's
    `packed` return then. An engine that joins later, or that the policy did not wait for, is given the next version.
    It takes `delta="off"`. With `expose=("cuda_ipc",)` engines of this host that stage on the same GPU read parameters
    there (`live_packer.py`), and CUDA shares whole segments of torch's allocator, whatever else lies in them. Otherwise
    it is for weights in host memory (`host_live.py`), whose storages move into shared memory if that is exposed.
    Weights that cannot be read so are packed; where none can, all are, and a warning says why.

    Raises `AddressError` when the address cannot be had, `SourceError` when tensor names repeat, `ConfigError`.
    """

    def __init__(
        self,
        source: WeightSource,
        address: str,
        *,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        policy: FleetPolicy | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        lost_after_s: float = DEFAULT_LOST_AFTER_S,
        keys: CurveKeys | None = None,
        epoch: int | None = None,
        delta: DeltaMode = "auto",
        history: int = 4,
        expose: Sequence[str] | None = None,
        in_place: bool = False,
    ) -> None:
        check_chunk_bytes(chunk_bytes)
        if delta not in get_args(DeltaMode) or history < 0:
            allowed = ", ".join(get_args(DeltaMode))
            raise ConfigError(f"delta={delta!r} with history={history}: use one of {allowed}, and 0 or more versions")
        kinds = choose_kinds(expose, address, keys)
        check_in_place(in_place, delta)
        self._share = Share(source, history, kinds, keeps_bits_on_device=delta in ("on", "zstd"), in_place=in_place)
        self._timeout_s = timeout_s
        self._last_number = -1
        self._delta: DeltaMode = delta
        self._unfinished: Publication | None = None
        self._is_offering = False
        self._wall_offset_s = time.time() - time.monotonic()
        coordinator = None
        if source.rank == 0:
            epoch = new_epoch() if epoch is None else epoch
            coordinator = Coordinator(
                self._share.specs,
                source.world_size,
                epoch,
                chunk_bytes,
                FleetPolicy.all() if policy is None else policy,
                lost_after_s,
                self._wall_offset_s,
            )
        hello = SourceHello(
            PROTOCOL, source.rank, source.world_size, fingerprint(self._share.specs), "", tuple(self._share.held)
        )
        self._loop = PublisherLoop(hello, address, keys, coordinator, lost_after_s, kinds)

    @property
    def address(self) -> str:
        """Where engines subscribe; on rank 0 the port that was bound."""
        return self._loop.address

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(spec.num_bytes for spec in self._share.specs)

    def fleet(self) -> tuple[EngineStatus, ...]:
        """The engines, as rank 0 sees them; empty on other ranks."""
        return self._loop.engines()

    def wait_for_subscribers(self, count: int, timeout_s: float | None = None) -> None:
        """Wait until `count` receivers are connected. Only rank 0 waits; its `publish` holds the others."""
        if self._loop.coordinator is None:
            return
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        engines = self._loop.coordinator.engines

        def enough() -> bool:
            return sum(not e.lost and e.role == "receiver" for e in engines.values()) >= count

        self._loop.watch(enough, timeout_s, lambda: f"{count} engines to subscribe to {self.address}")

    def publish(self, version: int, *, timeout_s: float | None = None) -> PublishReport:
        """Publish the weights as they are now, and wait until the fleet serves them. Every rank must call.

        `version` must rise (gaps are fine). Returns the same report on every rank, but for its own `pack` time.
        Raises `DeadlineExceeded` when the fleet's policy was not met in `timeout_s`; `EngineError` when an engine
        refused the version (its reason is in the message);
        `SourceError` when the ranks do not hold a whole model together; `VersionError` when `version` does not rise.
        """
        return self.begin(version, timeout_s=timeout_s).wait()

    def begin(self, version: int, *, timeout_s: float | None = None, hold: bool = False) -> Publication:
        """Publish the weights as they are now; returns when they may be changed. Every rank must call.

        That is when this rank has copied them, or, where engines read them in place, when the fleet serves them.

        With `hold` it returns before that, and the weights must stay as they are until the publication's `packed`
        has returned.

        A publication that was begun before and not waited for is waited for first, and its failure forgotten: its
        deadline bounds that. Raises what `publish` raises, as far as it is known by then.
        """
        self._check_number(version)
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            with suppress(DeadlineExceeded, EngineError):
                unfinished.wait()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._loop.watch(lambda: self._loop.assigned is not None, timeout_s, self._describe_missing)
        packer, snapshot = self._offer(version, deadline_s)
        publication = Publication(
            *(version, timeout_s, deadline_s, lambda: self._pack(packer, snapshot)),
            self._finish_in_place if packer.is_in_place else self._finish,
            hold=hold,
            in_place=packer.is_in_place,
        )
        self._last_number = version
        self._unfinished = publication
        return publication

    def _finish_in_place(self, publication: Publication) -> PublishReport:
        """As `_finish`; however it ends, nothing is read or sent of the weights after that."""
        try:
            report = self._finish(publication)
        finally:
            self._withdraw(publication.deadline_s)
        hold_s = time.monotonic() + self._wall_offset_s - publication.copied().end_s
        return replace(report, phases_s=report.phases_s | {"hold": hold_s})

    def _finish(self, publication: Publication) -> PublishReport:
        # The coordinator keeps the deadline and says who missed it; this wait only outlasts a dead coordinator.
        grace_s = 5.0
        number = publication.number
        self._unfinished = None
        self._loop.watch(
            lambda: self._loop.published is not None and self._loop.published.version.number >= number,
            max(0.0, publication.deadline_s - time.monotonic()) + grace_s,
            lambda: f"version {number} to be published by rank 0 at {self.address}",
        )
        published = self._loop.published
        assert published is not None and published.version.number == number
        if published.error:
            refused = any(engine.state == "refused" for engine in published.engines)
            raise (EngineError if refused else DeadlineExceeded)(
                f"{published.error} (deadline {publication.timeout_s:g} s). Engines keep what they serve; "
                "mend or remove the engine, or publish the next version"
            )
        return make_report(published, self._share.specs, publication.copied())

    def _check_number(self, number: int) -> None:
        if not 0 <= number <= MAX_UINT or number <= self._last_number:
            raise VersionError(
                f"version {number} does not rise above {self._last_number}; "
                "versions are integers >= 0 and each publish takes a higher one"
            )

    def _describe_missing(self) -> str:
        coordinator = self._loop.coordinator
        if coordinator is None:
            return f"rank 0 to answer at {self.address} with every rank's share"
        return f"the source ranks {coordinator.roster.missing} to join {self.address}; every rank makes a publisher"

    def _offer(self, number: int, deadline_s: float) -> tuple[Packer, Snapshot]:
        """Tell of a version of which no chunk is packed yet."""
        assigned = self._loop.assigned
        assert assigned is not None
        self._withdraw(deadline_s)
        server = self._loop.server
        packer = self._share.prepare(assigned.regions, assigned.chunk_bytes, is_read=server.is_sending)
        tickets = self._share.tickets
        version = Version(assigned.epoch, number)
        rereads = server.has_sent or not (tickets or server.tickets)
        snapshot = packer.begin(version, self._choose_mode(), rereads=rereads)
        self._loop.offer(snapshot, tickets, deadline_s)
        self._is_offering = True
        return packer, snapshot

    def _withdraw(self, deadline_s: float) -> None:
        """Serve nothing from here on, so that what was served may be written."""
        if self._is_offering:
            self._loop.withdraw(timeout_s=max(1.0, deadline_s - time.monotonic()))
            self._is_offering = False

    def _pack(self, packer: Packer, snapshot: Snapshot) -> Span:
        start_s = time.monotonic()
        self._pack_all(packer, snapshot)
        end_s = time.monotonic()
        pack = Span("pack", start_s + self._wall_offset_s, end_s + self._wall_offset_s)
        digests = np.array(packer.digests(), "<u8").tobytes()
        report = SourceReport(
            self._share.rank,
            end_s - start_s,
            packer.num_bytes,
            packer.delta_bytes,
            packer.changed_elements,
            len(snapshot),
        )
        self._loop.seal(Packed(snapshot.version.number, digests, report, (pack,)))
        return pack

    def _pack_all(self, packer: Packer, snapshot: Snapshot) -> None:
        """Pack every chunk. To wake the thread that serves them takes longer than to pack one: only when it waits."""
        while snapshot.num_ready < len(snapshot):
            packer.pack_run(snapshot)
            if self._loop.server.notify(snapshot.num_ready - 1) or snapshot.num_ready == len(snapshot):
                self._loop.nudge()

    def _choose_mode(self) -> PackMode:
        if self._delta != "auto":
            return self._delta
        published = self._loop.published
        advised = "off" if published is None else published.delta
        return "on" if advised == "on" else "zstd" if advised == "zstd" else "off"

    def close(self) -> None:
        """Say goodbye to the engines, which go on with what they serve, and close every socket."""
        if self._unfinished is not None:
            self._unfinished.settle()
        self._loop.close()
        self._share.close()

    def __enter__(self) -> "WeightPublisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
