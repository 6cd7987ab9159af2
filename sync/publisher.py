"""The publisher: what a trainer rank holds to keep a fleet of engines in step.

    with WeightPublisher(bridge.weight_source(model), "tcp://127.0.0.1:5600") as publisher:
        for step in range(1, steps + 1):
            train()
            report = publisher.publish(version=step)

Every rank of the model makes one with the same address. Rank 0 binds it and coordinates; the others make themselves
known to it and serve their own regions. No collective is issued. `publish` copies this rank's share of the regions
into host memory (one extra copy of that share), so training may go on while late engines are served.
"""

import time
from types import TracebackType

import numpy as np
import numpy.typing as npt

from weightcast.sync.chunks import DEFAULT_CHUNK_BYTES, Chunk, check_chunk_bytes, lay_out_chunks
from weightcast.sync.coordinator import Coordinator
from weightcast.sync.errors import DeadlineExceeded, EngineError, VersionError
from weightcast.sync.fleet import EngineStatus, FleetPolicy
from weightcast.sync.messages import PROTOCOL, Packed, Published, SourceHello, Span
from weightcast.sync.publisher_loop import PublisherLoop
from weightcast.sync.regions import Region, check_unique_names
from weightcast.sync.report import PublishReport
from weightcast.sync.schema import MAX_UINT
from weightcast.sync.snapshot import allocate_arena, pack_snapshot
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.zmq_sockets import CurveKeys
from weightcast.sync.version import Version, fingerprint, new_epoch

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_LOST_AFTER_S = 10.0


class WeightPublisher:
    """See the module.

    `policy` decides how many engines must have staged a version before any serves it; `timeout_s` bounds every
    wait; an engine silent for `lost_after_s` is fenced; `epoch` is for tests and for resuming under a known epoch.
    Raises `AddressError` when the address cannot be had, `SourceError` when tensor names repeat.
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
    ) -> None:
        check_chunk_bytes(chunk_bytes)
        self._specs = tuple(source.specs())
        check_unique_names(self._specs)
        self._specs_by_name = {spec.name: spec for spec in self._specs}
        self._held = {held.region: held for held in source.held()}
        self._rank = source.rank
        self._timeout_s = timeout_s
        self._last_number = -1
        self._chunks: tuple[Chunk, ...] = ()
        self._laid_out: tuple[Region, ...] | None = None
        self._arena: npt.NDArray[np.uint8] | None = None
        self._wall_offset_s = time.time() - time.monotonic()
        coordinator = None
        if source.rank == 0:
            epoch = new_epoch() if epoch is None else epoch
            coordinator = Coordinator(
                self._specs,
                source.world_size,
                epoch,
                chunk_bytes,
                FleetPolicy.all() if policy is None else policy,
                lost_after_s,
                self._wall_offset_s,
            )
        hello = SourceHello(PROTOCOL, source.rank, source.world_size, fingerprint(self._specs), "", tuple(self._held))
        self._loop = PublisherLoop(hello, address, keys, coordinator, lost_after_s)

    @property
    def address(self) -> str:
        """Where engines subscribe; on rank 0 the port that was bound."""
        return self._loop.address

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(spec.num_bytes for spec in self._specs)

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
        self._check_number(version)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._loop.watch(lambda: self._loop.assigned is not None, timeout_s, self._describe_missing)
        packed = self._pack_and_offer(version, deadline_s)
        self._last_number = version
        # The coordinator keeps the deadline and says who missed it; this wait only outlasts a dead coordinator.
        grace_s = 5.0
        self._loop.watch(
            lambda: self._loop.published is not None and self._loop.published.version.number == version,
            max(0.0, deadline_s - time.monotonic()) + grace_s,
            lambda: f"version {version} to be published by rank 0 at {self.address}",
        )
        published = self._loop.published
        assert published is not None
        if published.error:
            refused = any(engine.state == "refused" for engine in published.engines)
            raise (EngineError if refused else DeadlineExceeded)(
                f"{published.error} (deadline {timeout_s:g} s). Engines keep what they serve; "
                "mend or remove the engine, or publish the next version"
            )
        return self._make_report(published, packed)

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
        return f"the source ranks {coordinator.missing_sources} to join {self.address}; every rank makes a publisher"

    def _pack_and_offer(self, number: int, deadline_s: float) -> Span:
        assigned = self._loop.assigned
        assert assigned is not None
        start_s = time.monotonic()
        if self._laid_out != assigned.regions:
            dtypes = {spec.name: spec.dtype for spec in self._specs}
            self._chunks = lay_out_chunks(assigned.regions, dtypes, assigned.chunk_bytes)
            self._laid_out, self._arena = assigned.regions, None
        self._loop.withdraw(timeout_s=max(1.0, deadline_s - time.monotonic()))
        if self._arena is None or self._loop.server.is_sending:
            # Frames still under way point into the old memory; ZeroMQ frees it when the last has left.
            self._arena = allocate_arena(self._chunks)
        snapshot = pack_snapshot(
            Version(assigned.epoch, number),
            self._held,
            self._specs_by_name,
            assigned.regions,
            self._chunks,
            self._arena,
        )
        end_s = time.monotonic()
        pack = Span("pack", start_s + self._wall_offset_s, end_s + self._wall_offset_s)
        digests = np.array(snapshot.digests, "<u8").tobytes()
        self._loop.offer(snapshot, Packed(number, snapshot.hashes, digests, (pack,)), deadline_s)
        return pack

    def _make_report(self, published: Published, pack: Span) -> PublishReport:
        phases_s = {"pack": pack.end_s - pack.start_s}
        phases_s |= {s.phase: s.end_s - s.start_s for s in published.spans if s.phase != "pack"}
        return PublishReport(
            version=published.version,
            num_bytes=published.num_bytes,
            num_tensors=len(self._specs),
            num_chunks=published.num_chunks,
            phases_s=phases_s,
            spans=published.spans,
            dense_bytes=self.num_bytes,
            density=None,
            sources=(),
            engines=published.engines,
        )

    def close(self) -> None:
        """Say goodbye to the engines, which go on with what they serve, and close every socket."""
        self._loop.close()

    def __enter__(self) -> "WeightPublisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
