"""Whether a manifest makes sense, before a byte of tensor memory is taken for it. Pure.

Its numbers come from a disk that others may write to: a name that leaves the folder, a box outside its tensor, a
tensor that claims to be larger than the files that hold it, are all refused here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from weightcast.sync.delta_format import ELEMENT_TYPES, HEADER_BYTES, MAX_ELEMENTS, SKIP
from weightcast.sync.disk.records import FORMAT, Hashing, StoredPiece, VersionManifest
from weightcast.sync.errors import WireError
from weightcast.sync.regions import Region, TensorSpec, find_tiling_fault
from weightcast.sync.version import Version

# What the length and parts of an entropy-coded delta take at most beyond the plain form (incompressible parts).
_PACKED_SLACK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a reader is ready to hold: bytes of the whole model, and how many tensors."""

    max_model_bytes: int
    max_tensors: int


def check_manifest(manifest: VersionManifest, version: Version, hashing: Hashing, limits: ModelLimits) -> None:
    """Raise `WireError` when `manifest`, found in the folder of `version`, is not to be believed."""
    if manifest.format != FORMAT or manifest.hashing != hashing.name:
        raise WireError(
            f"it has format {manifest.format} with hashes {manifest.hashing}, format {FORMAT} with {hashing.name} is "
            "read here: give the publisher and the engines the same version of weightcast and the same key"
        )
    if manifest.version != version:
        raise WireError(f"it is the manifest of version {manifest.version}, moved into the folder of {version}")
    base = manifest.base
    if base is not None and (base.version.epoch != version.epoch or base.version >= version):
        raise WireError(f"version {version} cannot be a delta upon version {base.version}")
    if not manifest.is_anchor and (manifest.dense or base is None):
        raise WireError("it is neither an anchor nor a delta upon another version")
    if base is None and manifest.delta:
        raise WireError("it has deltas and no base")
    _check_model(manifest, limits)
    _check_files(manifest)
    _check_pieces(manifest)


def _check_model(manifest: VersionManifest, limits: ModelLimits) -> None:
    if len(manifest.specs) > limits.max_tensors:
        raise WireError(f"it lists {len(manifest.specs)} tensors, at most {limits.max_tensors} are allowed")
    if len({spec.name for spec in manifest.specs}) != len(manifest.specs):
        raise WireError("it lists a tensor name twice")
    if len(manifest.digests) != 8 * len(manifest.specs):
        raise WireError(f"it has {len(manifest.digests) // 8} digests for {len(manifest.specs)} tensors")
    model_bytes = sum(spec.num_bytes for spec in manifest.specs)
    if model_bytes > limits.max_model_bytes:
        raise WireError(
            f"its model takes {model_bytes} bytes, at most {limits.max_model_bytes} are allowed here: "
            "raise the limit if the model is really that large"
        )


def _check_files(manifest: VersionManifest) -> None:
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise WireError("it lists a file twice")


def _check_pieces(manifest: VersionManifest) -> None:
    for piece in (*manifest.dense, *manifest.delta):
        _check_piece(manifest, piece)
    if any(piece.encoding != "dense" for piece in manifest.dense):
        raise WireError("its dense part has deltas")
    if manifest.is_anchor:
        for spec, boxes in zip(manifest.specs, _boxes(manifest.specs, manifest.dense), strict=True):
            if fault := find_tiling_fault(spec, boxes):
                raise WireError(f"its anchor is incomplete: {spec.name}: {fault}")
    for spec, boxes in zip(manifest.specs, _boxes(manifest.specs, manifest.delta), strict=True):
        if sum(box.numel for box in boxes) > spec.numel:
            raise WireError(f"its deltas change more elements of {spec.name} than it has")


def _check_piece(manifest: VersionManifest, piece: StoredPiece) -> None:
    if piece.tensor >= len(manifest.specs) or piece.file >= len(manifest.files):
        raise WireError(f"a piece names tensor {piece.tensor} and file {piece.file}, which it does not list")
    spec, file = manifest.specs[piece.tensor], manifest.files[piece.file]
    inside = len(piece.shape) == len(piece.offset) == len(spec.shape) and all(
        start + size <= limit for start, size, limit in zip(piece.offset, piece.shape, spec.shape, strict=True)
    )
    if not inside:
        raise WireError(f"a piece of {spec.name} {spec.shape} lies at {piece.offset} and has the shape {piece.shape}")
    if piece.start_byte + piece.num_bytes > file.num_bytes:
        raise WireError(
            f"a piece of {spec.name} takes the bytes {piece.start_byte} to {piece.start_byte + piece.num_bytes} of "
            f"{file.name}, which has {file.num_bytes}"
        )
    numel = piece.region(manifest.specs).numel
    if piece.encoding == "dense":
        fits = piece.num_bytes == numel * spec.dtype.itemsize
    else:
        fits = numel <= MAX_ELEMENTS and piece.num_bytes <= largest_delta_bytes(numel, spec.dtype.itemsize)
    if not fits or spec.dtype.itemsize not in ELEMENT_TYPES:
        raise WireError(f"a {piece.encoding} piece of {numel} elements of {spec.name} has {piece.num_bytes} bytes")


def largest_delta_bytes(numel: int, itemsize: int) -> int:
    """What a delta of `numel` elements takes at most, entropy-coded or not."""
    return HEADER_BYTES + numel * (itemsize + 8) + numel // SKIP + _PACKED_SLACK_BYTES


def _boxes(specs: Sequence[TensorSpec], pieces: Sequence[StoredPiece]) -> list[list[Region]]:
    boxes: list[list[Region]] = [[] for _ in specs]
    for piece in pieces:
        boxes[piece.tensor].append(Region(specs[piece.tensor].name, piece.offset, piece.shape))
    return boxes
