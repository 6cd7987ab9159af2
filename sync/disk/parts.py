"""A source's part of a version: the files that it writes, and how the parts of all sources make a manifest.

part = write_part(store, begin, copy, rank, settings)       # on every source
manifest = merge_parts(begin, specs, shares, parts, ...)    # on rank 0; pure
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from weightcast.sync.digest import MASK
from weightcast.sync.disk.naming import data_file, version_folder
from weightcast.sync.disk.packing import DELTA_MAX_SHARE, Change, HostCopy
from weightcast.sync.disk.records import (
    FORMAT,
    Base,
    Begin,
    Encoding,
    Hasher,
    Hashing,
    Part,
    StoredFile,
    StoredPiece,
    VersionManifest,
)
from weightcast.sync.disk.store import Store
from weightcast.sync.disk.tensor_files import Buffer, Entry, group_by_bytes, lay_out_file
from weightcast.sync.regions import Region, TensorSpec


@dataclass(frozen=True, slots=True)
class PartSettings:
    """How parts are written. A file has at most `file_bytes`, or one tensor; a delta file is held in memory."""

    hashing: Hashing
    file_bytes: int
    delta_file_bytes: int
    entropy_code: bool


def write_part(store: Store, begin: Begin, copy: HostCopy, rank: int, settings: PartSettings, has_base: bool) -> Part:
    """Bring `copy` to the live weights and write this source's files of the version that `begin` opens.

    Without `has_base`, the copy does not hold the bits of `begin.base`; all that it has is then written as changed.
    Raises `StorageError`; then files may be left that no manifest names.
    """
    writer = _PartWriter(store, begin, copy, rank, settings)
    started_s = time.monotonic()
    if begin.base is None or not has_base:
        for _ in copy.pack(with_delta=False):
            pass
        has_delta = begin.base is not None and not begin.is_anchor
        if has_delta:
            writer.write_changes(_all_changed(copy))
    else:
        limit_bytes = int(DELTA_MAX_SHARE * copy.num_bytes) if begin.is_anchor else None
        changes = copy.pack(with_delta=True, entropy_code=settings.entropy_code)
        has_delta = writer.write_changes(changes, limit_bytes)
    digests = np.array(copy.digests(), "<u8").tobytes()
    packed_s = time.monotonic()
    if begin.is_anchor:
        writer.write_dense()
    pack_s = packed_s - started_s - writer.delta_write_s
    return Part(
        *(begin.version, rank, has_delta, digests, tuple(writer.files), tuple(writer.dense), tuple(writer.delta)),
        *(pack_s, writer.delta_write_s + time.monotonic() - packed_s, writer.num_changed),
    )


def _all_changed(copy: HostCopy) -> Iterator[Change]:
    for index, region in enumerate(copy.regions):
        if region.numel:
            yield Change(region, "dense", copy.data(index), region.numel)


class _PartWriter:
    def __init__(self, store: Store, begin: Begin, copy: HostCopy, rank: int, settings: PartSettings) -> None:
        self._store, self._copy, self._rank, self._settings = store, copy, rank, settings
        self._folder = version_folder(begin.version)
        self._numbers = {name: number for number, name in enumerate(copy.specs)}
        self.files: list[StoredFile] = []
        self.dense: list[StoredPiece] = []
        self.delta: list[StoredPiece] = []
        self.num_changed = 0
        self.delta_write_s = 0.0

    def write_dense(self) -> None:
        """The whole share, by HF names where regions are whole tensors."""
        copy = self._copy
        sizes = [len(copy.data(index)) for index in range(len(copy.regions))]
        for number, group in enumerate(group_by_bytes(sizes, self._settings.file_bytes)):
            entries = [
                Entry(
                    region.name if copy.is_whole(index) else str(region),
                    copy.specs[region.name].dtype,
                    region.shape,
                    copy.data(index),
                )
                for index, region in ((index, copy.regions[index]) for index in group)
            ]
            starts = self._write(data_file("model", self._rank, number), entries)
            for index, start in zip(group, starts, strict=True):
                self.dense.append(self._piece(copy.regions[index], "dense", start, len(copy.data(index))))

    def write_changes(self, changes: Iterable[Change], limit_bytes: int | None = None) -> bool:
        """What changed; False, with no delta left, when it takes more than `limit_bytes`."""
        kept: list[Change] = []
        kept_bytes = total_bytes = 0
        within = True
        for change in changes:  # to the end, for the copy must hold the version
            self.num_changed += change.num_changed
            total_bytes += len(change.data)
            within = within and (limit_bytes is None or total_bytes <= limit_bytes)
            if not within:
                kept, kept_bytes = [], 0
                continue
            kept.append(change)
            # Dense data are views of the copy, and cost no memory.
            kept_bytes += 0 if change.encoding == "dense" else len(change.data)
            if kept_bytes >= self._settings.delta_file_bytes:
                self._write_changes(kept)
                kept, kept_bytes = [], 0
        if kept:
            self._write_changes(kept)
        if not within:
            self._store.remove(self._folder, [file.name for file in self.files])
            self.files, self.delta = [], []
        return within

    def _write_changes(self, changes: Sequence[Change]) -> None:
        started_s = time.monotonic()
        entries = [
            Entry(str(change.piece), self._copy.specs[change.piece.name].dtype, change.piece.shape, change.data)
            if change.encoding == "dense"
            else Entry(str(change.piece), torch.uint8, (len(change.data),), change.data)
            for change in changes
        ]
        starts = self._write(data_file("delta", self._rank, len(self.files)), entries)
        for change, start in zip(changes, starts, strict=True):
            self.delta.append(self._piece(change.piece, change.encoding, start, len(change.data)))
        self.delta_write_s += time.monotonic() - started_s

    def _piece(self, region: Region, encoding: Encoding, start: int, num_bytes: int) -> StoredPiece:
        number, file = self._numbers[region.name], len(self.files) - 1
        return StoredPiece(number, region.offset, region.shape, encoding, file, start, num_bytes)

    def _write(self, name: str, entries: Sequence[Entry]) -> tuple[int, ...]:
        laid_out = lay_out_file(entries)
        hasher = self._settings.hashing.start()
        self._store.write(self._folder, name, _hashed(laid_out.buffers, hasher))
        self.files.append(StoredFile(name, laid_out.num_bytes, hasher.digest()))
        return laid_out.starts


def _hashed(buffers: Iterable[Buffer], hasher: Hasher) -> Iterator[Buffer]:
    for buffer in buffers:
        hasher.update(buffer)
        yield buffer


def merge_parts(
    begin: Begin,
    base: Base | None,
    specs: tuple[TensorSpec, ...],
    shares: Sequence[Sequence[Region]],
    parts: Sequence[Part],
    hashing: Hashing,
) -> VersionManifest:
    """The manifest of a version from the parts of all sources, by rank. Pure.

    Where one of them has no delta the version has none.
    """
    has_delta = base is not None and all(part.has_delta for part in parts)
    firsts = [0, *accumulate(len(part.files) for part in parts)]
    files = [file for part in parts for file in part.files]
    dense = [piece for part, first in zip(parts, firsts, strict=False) for piece in _shift(part.dense, first)]
    delta = [piece for part, first in zip(parts, firsts, strict=False) for piece in _shift(part.delta, first)]
    if not has_delta:
        delta = []
    numbers = {spec.name: number for number, spec in enumerate(specs)}
    digests = [0] * len(specs)
    for regions, part in zip(shares, parts, strict=True):
        for region, digest in zip(regions, np.frombuffer(part.digests, "<u8"), strict=True):
            digests[numbers[region.name]] = (digests[numbers[region.name]] + int(digest)) & MASK
    return VersionManifest(
        *(FORMAT, hashing.name, begin.version, begin.is_anchor, base if has_delta else None, time.time(), specs),
        *(np.array(digests, "<u8").tobytes(), tuple(files), tuple(dense), tuple(delta)),
    )


def _shift(pieces: Iterable[StoredPiece], first_file: int) -> Iterator[StoredPiece]:
    return (replace(piece, file=piece.file + first_file) for piece in pieces)


def drop_unused(manifest: VersionManifest) -> tuple[VersionManifest, list[str]]:
    """The manifest without files that no piece lies in, and their names. Pure."""
    used = sorted({piece.file for piece in (*manifest.dense, *manifest.delta)})
    # A file of empty tensors alone has pieces as well, so nothing is lost.
    numbers = {file: number for number, file in enumerate(used)}

    def renumber(pieces: Iterable[StoredPiece]) -> tuple[StoredPiece, ...]:
        return tuple(replace(piece, file=numbers[piece.file]) for piece in pieces)

    unused = [file.name for number, file in enumerate(manifest.files) if number not in numbers]
    files = tuple(manifest.files[number] for number in used)
    return replace(manifest, files=files, dense=renumber(manifest.dense), delta=renumber(manifest.delta)), unused


def make_hf_index(manifest: VersionManifest) -> bytes | None:
    """The index that makes an anchor an ordinary HF folder; None where a tensor is cut over several sources. Pure."""
    specs = manifest.specs
    if not manifest.is_anchor or any(piece.shape != specs[piece.tensor].shape for piece in manifest.dense):
        return None
    weight_map: Mapping[str, str] = {
        specs[piece.tensor].name: manifest.files[piece.file].name
        for piece in sorted(manifest.dense, key=lambda piece: piece.tensor)
    }
    total_bytes = sum(spec.num_bytes for spec in specs)
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1).encode()
