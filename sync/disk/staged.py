"""An engine's staged copy: one copy of the model in host memory, brought from version to version in place.

    copy = StagedCopy(catalog, hashing)
    stats = copy.follow(route)         # reads, checks and applies; DamagedVersion when a step cannot be trusted
    tensors = copy.tensors()           # HF order

The files of a delta are all checked before the first byte of the copy changes, so a damaged one leaves the copy where
it was. A tensor that somebody still holds from an earlier version is not written to: it is copied first.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weightcast.sync.delta_format import ByteArray
from weightcast.sync.digest import region_digest
from weightcast.sync.disk.catalog import Catalog, damage
from weightcast.sync.disk.naming import MANIFEST
from weightcast.sync.disk.placing import place_piece
from weightcast.sync.disk.reading import OpenFiles
from weightcast.sync.disk.records import Hashing, StoredPiece, VersionManifest
from weightcast.sync.disk.routes import Held, Route, Step, VersionInfo
from weightcast.sync.errors import DamagedVersion, ModelMismatch, WireError
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version, find_model_differences

_NAMED_TENSORS = 5


@dataclass(frozen=True, slots=True)
class StageStats:
    """What it took to stage a version. Times are seconds since 1970; checksums are of files and of tensors."""

    num_bytes: int
    stage_s: float
    checksums_checked: int
    started_at_s: float
    staged_at_s: float
    route: tuple[Step, ...]
    """An anchor or nothing, then deltas."""


class StepFailed(DamagedVersion):
    """A step of a route cannot be taken: it is spoiled."""

    def __init__(self, error: Exception, step: Step) -> None:
        super().__init__(str(error))
        self.step = step


class BitsDiffer(StepFailed):
    """All steps were taken, and a tensor's digest is wrong: a step is, or what the copy held before the first."""


class StagedCopy:
    """See the module. `expect` are the tensors that every version must have."""

    def __init__(
        self,
        catalog: Catalog,
        hashing: Hashing,
        expect: Sequence[TensorSpec] | None = None,
        keep_going: Callable[[], None] = lambda: None,
    ) -> None:
        self.held: Held | None = None
        """What the copy has now, bit for bit; None while it is between versions."""
        self.specs: tuple[TensorSpec, ...] = ()
        self._catalog, self._hashing, self._keep_going = catalog, hashing, keep_going
        self._expect = None if expect is None else tuple(expect)
        self._buffers: dict[str, ByteArray] = {}
        # A tensor that was handed out keeps the array it was made of alive; a dead lease means free memory.
        self._leases: dict[str, weakref.ref[ByteArray]] = {}
        self._num_bytes = self._num_checks = 0

    def follow(self, route: Route, infos: Sequence[VersionInfo]) -> StageStats:
        """Take all steps, then check every tensor's digest.

        `infos` are those that the route was found in. Raises `StepFailed`, `ModelMismatch` when
        the version is not of the expected model. `held` says what the copy has after an error.
        """
        started_s, started_at_s = time.monotonic(), time.time()
        self._num_bytes = self._num_checks = 0
        seals = {info.version: info.seal for info in infos}
        for step in route.steps:
            manifest = self._open_step(step)
            held = Held(step.version, seals[step.version])
            if step.kind == "dense":
                self._take_anchor(step, manifest, held)
            else:
                self._take_delta(step, manifest, held)
        last = route.steps[-1] if route.steps else Step(route.target, "delta")
        self._check_digests(self._open_step(last), last)
        stage_s = time.monotonic() - started_s
        return StageStats(self._num_bytes, stage_s, self._num_checks, started_at_s, started_at_s + stage_s, route.steps)

    def _open_step(self, step: Step) -> VersionManifest:
        try:
            manifest = self._catalog.manifest(step.version)
        except DamagedVersion as error:
            raise StepFailed(error, step) from error
        if self._expect is not None and (faults := find_model_differences(self._expect, manifest.specs)):
            more = f"; and {len(faults) - _NAMED_TENSORS} more" if len(faults) > _NAMED_TENSORS else ""
            raise ModelMismatch(
                f"version {step.version} in {self._catalog.store.url} is of another model: "
                f"{'; '.join(faults[:_NAMED_TENSORS])}{more}. The engine keeps its weights; give it its model's store"
            )
        return manifest

    def _open_files(self, step: Step, manifest: VersionManifest, numbers: Sequence[int]) -> OpenFiles:
        try:
            files = OpenFiles(self._catalog.store, manifest, self._hashing, numbers, self._keep_going)
        except DamagedVersion as error:
            raise StepFailed(error, step) from error
        self._num_bytes += files.num_bytes
        self._num_checks += files.num_files
        return files

    def _take_anchor(self, step: Step, manifest: VersionManifest, held: Held) -> None:
        """File by file, so that of a remote anchor one file at a time lies on this host's disk."""
        self.held = None
        self._change_model(manifest.specs)
        # Memory that is still in use is left to its users; nothing of it is needed.
        self._make_writable({piece.tensor for piece in manifest.dense}, keep_bits=False)
        for number in sorted({piece.file for piece in manifest.dense}):
            with self._open_files(step, manifest, [number]) as files:
                self._place(step, [piece for piece in manifest.dense if piece.file == number], files, manifest)
        self.held = held

    def _take_delta(self, step: Step, manifest: VersionManifest, held: Held) -> None:
        if manifest.specs != self.specs:
            error = damage(self._catalog.store, step.version, MANIFEST, "its delta is upon a version of another model")
            raise StepFailed(error, step)
        with self._open_files(step, manifest, sorted({piece.file for piece in manifest.delta})) as files:
            self.held = None
            self._make_writable({piece.tensor for piece in manifest.delta}, keep_bits=True)
            self._place(step, manifest.delta, files, manifest)
        self.held = held

    def _change_model(self, specs: tuple[TensorSpec, ...]) -> None:
        """Memory for `specs`, reused where a tensor has the same bytes as before."""
        sizes = {spec.name: spec.num_bytes for spec in specs}
        self._buffers = {name: buffer for name, buffer in self._buffers.items() if sizes.get(name) == len(buffer)}
        for name, num_bytes in sizes.items():
            if name not in self._buffers:
                self._buffers[name] = np.empty(num_bytes, np.uint8)
                self._leases.pop(name, None)
        self.specs = specs

    def _make_writable(self, numbers: set[int], *, keep_bits: bool) -> None:
        for number in numbers:
            name = self.specs[number].name
            lease = self._leases.get(name)
            if lease is not None and lease() is not None:
                buffer = self._buffers[name]
                self._buffers[name] = buffer.copy() if keep_bits else np.empty_like(buffer)
            self._leases.pop(name, None)

    def _place(self, step: Step, pieces: Sequence[StoredPiece], files: OpenFiles, manifest: VersionManifest) -> None:
        for piece in pieces:
            spec = self.specs[piece.tensor]
            try:
                place_piece(piece, piece.region(self.specs), _view(self._buffers[spec.name], spec), files.read_into)
            except DamagedVersion as error:
                raise StepFailed(error, step) from error
            except WireError as error:
                name = manifest.files[piece.file].name
                raise StepFailed(
                    damage(self._catalog.store, step.version, name, f"the delta of {spec.name}: {error}"), step
                ) from error

    def _check_digests(self, manifest: VersionManifest, step: Step) -> None:
        digests = np.frombuffer(manifest.digests, "<u8")
        for spec, digest in zip(self.specs, digests, strict=True):
            self._keep_going()
            got = region_digest(_view(self._buffers[spec.name], spec), spec.whole())
            self._num_checks += 1
            if got != int(digest):
                self.held = None
                why = f"tensor {spec.name} has the digest {got:#x} once assembled, {int(digest):#x} was written"
                error = damage(self._catalog.store, manifest.version, MANIFEST, why)
                raise BitsDiffer(error, step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, in HF order, on the copy's own memory; while one is alive its memory is not written to."""
        assert self.held is not None
        handed_out = {}
        for spec in self.specs:
            known = self._leases.get(spec.name)
            # One that is alive still must stay known, or its memory would be taken for free.
            if known is None or (lease := known()) is None:
                lease = self._buffers[spec.name].view()
                self._leases[spec.name] = weakref.ref(lease)
            handed_out[spec.name] = _view(lease, spec)
        return handed_out

    @property
    def version(self) -> Version | None:
        """The version that the copy has."""
        return None if self.held is None else self.held.version


def _view(buffer: ByteArray, spec: TensorSpec) -> torch.Tensor:
    if not len(buffer):
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.from_numpy(buffer).view(spec.dtype).view(spec.shape)
