"""A version of a store as an ordinary Hugging Face folder, whichever way it is stored.

    materialize("/shared/versions", Path("hf/step-120"), version=120)

Regions of several sources are put together, deltas are applied, every file and every tensor is checked. Tensors go one
by one from store to folder: memory is the largest tensor. The folder appears at the end, whole.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weightcast.sync.checkpoint_files import INDEX_FILE, SINGLE_FILE
from weightcast.sync.digest import region_digest
from weightcast.sync.disk.catalog import Catalog, damage, host_limits
from weightcast.sync.disk.extra_files import find_extra_files
from weightcast.sync.disk.fleet_records import FLEET
from weightcast.sync.disk.naming import MANIFEST
from weightcast.sync.disk.placing import place_piece
from weightcast.sync.disk.reading import OpenFiles
from weightcast.sync.disk.records import Hashing, StoredPiece, VersionManifest
from weightcast.sync.disk.routes import Step, VersionInfo, route_to
from weightcast.sync.disk.store import FolderStore, Store, explain_writes, open_store
from weightcast.sync.disk.tensor_files import Buffer, group_by_bytes, lay_out_header
from weightcast.sync.errors import ConfigError, DamagedVersion, VersionError, WireError
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version

DEFAULT_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class MaterializeReport:
    """What was written."""

    version: Version
    folder: Path
    num_tensors: int
    num_bytes: int
    num_files: int
    steps: tuple[Step, ...]


def materialize(
    place: "str | Path | Store",
    out: Path,
    *,
    version: Version | int | None = None,
    config_from: Path | None = None,
    file_bytes: int = DEFAULT_FILE_BYTES,
    key: bytes | None = None,
) -> MaterializeReport:
    """Write a version to `out`, a new folder: the newest by default; of a number, that of the newest epoch.

    The configuration and tokenizer are those of `config_from`, or else those that lie in the anchor.
    Raises `ConfigError` when `out` exists, `VersionError` when there is no such version, `DamagedVersion`,
    `StorageError`.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; give a new folder")
    with closing(open_store(place)) as store:
        catalog = Catalog(store, Hashing(key), host_limits())
        return _materialize(catalog, Hashing(key), out, version, config_from, file_bytes)


def _materialize(
    catalog: Catalog,
    hashing: Hashing,
    out: Path,
    version: Version | int | None,
    config_from: Path | None,
    file_bytes: int,
) -> MaterializeReport:
    infos = catalog.refresh()
    target = pick_version(catalog, infos, version)
    route = route_to(target, {info.version: info for info in infos})
    if route is None:
        raise VersionError(
            f"version {target} of {catalog.store.url} cannot be assembled: no anchor leads to it. `weightcast versions "
            "--check` says what is damaged; choose another version"
        )
    partial = out.with_name(f".{out.name}.partial")
    with explain_writes(str(out)):
        if partial.exists():
            shutil.rmtree(partial)
        with ExitStack() as stack:
            replay = _Replay(catalog, hashing, route.steps, stack)
            report = _write_folder(replay, out, partial, config_from, file_bytes)
        partial.rename(out)
        _sync_folder(out.parent)
    return report


def pick_version(catalog: Catalog, infos: Sequence[VersionInfo], wanted: Version | int | None) -> Version:
    """The version that was asked for. Raises `VersionError`, or the error of a damaged one."""
    if isinstance(wanted, Version) and wanted in catalog.damaged:
        raise catalog.damaged[wanted]
    matches = [
        info.version
        for info in infos
        if wanted is None or info.version == wanted or (isinstance(wanted, int) and info.version.number == wanted)
    ]
    if not matches:
        listed = ", ".join(str(info.version) for info in infos[-5:]) or "none"
        asked = "a version" if wanted is None else f"version {wanted}"
        raise VersionError(f"{catalog.store.url} does not have {asked}; the newest whole ones are: {listed}")
    return matches[-1]


class _Replay:
    """Assembles single tensors of a version from all steps that lead to it."""

    def __init__(self, catalog: Catalog, hashing: Hashing, steps: tuple[Step, ...], stack: ExitStack) -> None:
        self.steps = steps
        self.store, self.hashing = catalog.store, hashing
        self.manifests = [catalog.manifest(step.version) for step in steps]
        self._pieces: list[dict[int, list[StoredPiece]]] = []
        self._files: list[OpenFiles] = []
        for step, manifest in zip(steps, self.manifests, strict=True):
            if manifest.specs != self.last.specs:
                raise damage(self.store, step.version, MANIFEST, "it is of another model than the version upon it")
            pieces = manifest.dense if step.kind == "dense" else manifest.delta
            by_tensor: dict[int, list[StoredPiece]] = {}
            for piece in pieces:
                by_tensor.setdefault(piece.tensor, []).append(piece)
            self._pieces.append(by_tensor)
            numbers = sorted({piece.file for piece in pieces})
            self._files.append(stack.enter_context(OpenFiles(self.store, manifest, hashing, numbers)))

    @property
    def last(self) -> VersionManifest:
        """The manifest of the version itself."""
        return self.manifests[-1]

    def tensor(self, number: int) -> torch.Tensor:
        """A tensor of the version, checked."""
        spec = self.last.specs[number]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for manifest, by_tensor, files in zip(self.manifests, self._pieces, self._files, strict=True):
            for piece in by_tensor.get(number, ()):
                try:
                    place_piece(piece, piece.region(manifest.specs), tensor, files.read_into)
                except DamagedVersion:
                    raise
                except WireError as error:
                    name = manifest.files[piece.file].name
                    raise damage(self.store, manifest.version, name, f"the delta of {spec.name}: {error}") from error
        digest = int(np.frombuffer(self.last.digests, "<u8")[number])
        if (got := region_digest(tensor, spec.whole())) != digest:
            why = f"tensor {spec.name} has the digest {got:#x} once assembled, {digest:#x} was written"
            raise damage(self.store, self.last.version, MANIFEST, why)
        return tensor

    def extra_files(self) -> dict[str, bytes]:
        """Configuration and tokenizer, as they lie in the anchor."""
        manifest = self.manifests[0]
        numbers = manifest.find_extra_files()
        with OpenFiles(self.store, manifest, self.hashing, numbers) as files:
            extras = {manifest.files[number].name: files.read_whole(number) for number in numbers}
        extras.pop(INDEX_FILE, None)
        extras.pop(FLEET, None)
        return extras


def _write_folder(
    replay: _Replay, out: Path, partial: Path, config_from: Path | None, file_bytes: int
) -> MaterializeReport:
    specs = replay.last.specs
    folder = FolderStore(partial.parent)
    groups = list(group_by_bytes([spec.num_bytes for spec in specs], file_bytes)) or [range(0)]
    names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    names = [SINGLE_FILE] if len(groups) == 1 else names
    for name, group in zip(names, groups, strict=True):
        folder.write(partial.name, name, _stream_file(replay, specs, group))
    extras = replay.extra_files() if config_from is None else find_extra_files(config_from)
    if len(groups) > 1:
        weight_map = {specs[number].name: name for name, group in zip(names, groups, strict=True) for number in group}
        total_bytes = sum(spec.num_bytes for spec in specs)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        extras[INDEX_FILE] = json.dumps(index, indent=1).encode()
    for name, data in extras.items():
        folder.write(partial.name, name, [data])
    folder.close()
    num_bytes = sum(spec.num_bytes for spec in specs)
    return MaterializeReport(replay.last.version, out, len(specs), num_bytes, len(groups), replay.steps)


def _stream_file(replay: _Replay, specs: Sequence[TensorSpec], group: range) -> Iterator[Buffer]:
    layout = lay_out_header([(specs[number].name, specs[number].dtype, specs[number].shape) for number in group])
    yield layout.head
    for index in layout.order:
        tensor = replay.tensor(group[index])
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
