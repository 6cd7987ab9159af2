"""Checkpoint files: the safetensors of a Hugging Face folder, checked before they are believed.

Opening reads headers only: names, dtypes and shapes, from one file or from an index of many. A file that is cut
short, an index that names what is not there, a tensor that is missing, unknown or of another shape are refused as
`CheckpointMismatch` before a single parameter is written. Reading takes just the boxes that are asked for.

    checkpoint = open_checkpoint(Path("Qwen3-0.6B"))
    check_tensors(checkpoint, expected_specs)
    with checkpoint.reader() as reader:
        rows = reader.read(Region("model.norm.weight", (0,), (512,)))
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region, TensorSpec

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Buffers that old checkpoints (Llama 2's) store and that every loader computes from the configuration instead:
# transformers and vLLM pass over them by these names, and so do we, in a log line. Exports do not have them.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")

# Names of dtypes in a safetensors header (safetensors' format description).
HEADER_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The tensors of a folder: their specs, in the order in which they lie on disk, and the file of each.

    `derived` names the stored buffers that no loader reads; they are in neither of the others.
    """

    folder: Path
    specs: tuple[TensorSpec, ...]
    files: Mapping[str, Path]
    derived: tuple[str, ...] = ()

    @contextmanager
    def reader(self) -> Iterator["RegionReader"]:
        """A reader over the files; they are mapped into memory until the block ends."""
        with ExitStack() as stack:
            yield RegionReader(self.files, stack)


class RegionReader:
    """Reads boxes of tensors and counts the bytes. Made by `CheckpointFiles.reader`."""

    def __init__(self, files: Mapping[str, Path], stack: ExitStack) -> None:
        self.num_bytes = 0
        self._files = files
        self._stack = stack
        self._open: dict[Path, Any] = {}

    def read(self, region: Region) -> torch.Tensor:
        """A CPU tensor of the region's shape in the file's dtype."""
        return self._count(self._file(region.name).get_slice(region.name)[region.slices])

    def read_whole(self, name: str) -> torch.Tensor:
        """All of one tensor."""
        return self._count(self._file(name).get_tensor(name))

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path]

    def _count(self, data: torch.Tensor) -> torch.Tensor:
        self.num_bytes += data.numel() * data.element_size()
        return data


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds safetensors under the names that HF gives them."""
    return (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file()


def open_checkpoint(folder: Path) -> CheckpointFiles:
    """Read the headers of all safetensors files of `folder`. Raises `CheckpointMismatch`."""
    index = folder / INDEX_FILE
    if index.is_file():
        listed = _read_index(index)
        paths = sorted({folder / name for name in listed.values()})
    elif (folder / SINGLE_FILE).is_file():
        listed, paths = None, [folder / SINGLE_FILE]
    else:
        raise CheckpointMismatch(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder that save_pretrained wrote "
            "(pickled .bin files are never read: load them with transformers and save them as safetensors)"
        )
    specs: list[TensorSpec] = []
    files: dict[str, Path] = {}
    for path in paths:
        for spec in _read_header(path, listed):
            if spec.name in files:
                raise CheckpointMismatch(
                    f"{spec.name} is both in {files[spec.name]} and in {path.name}; save the checkpoint again"
                )
            files[spec.name] = path
            specs.append(spec)
    if listed is not None:
        _check_index(index, listed, files)
    derived = tuple(spec.name for spec in specs if spec.name.endswith(DERIVED_SUFFIXES))
    if derived:
        logger.info("%s: %d derived buffers are passed over, the first is %s", folder, len(derived), derived[0])
    kept = tuple(spec for spec in specs if spec.name not in derived)
    return CheckpointFiles(folder, kept, {spec.name: files[spec.name] for spec in kept}, derived)


def open_file(path: Path) -> CheckpointFiles:
    """Read the header of one safetensors file under any name. Raises `CheckpointMismatch`."""
    specs = tuple(_read_header(path, None))
    return CheckpointFiles(path.parent, specs, {spec.name: path for spec in specs})


def check_tensors(checkpoint: CheckpointFiles, expected: Sequence[TensorSpec], optional: Collection[str] = ()) -> None:
    """Every expected tensor is there in its shape, and no other but the `optional` ones.

    Dtypes are not compared, since values are cast; only whole numbers where weights belong are refused, because they
    would be codes of some quantisation, and their cast nonsense.

    Raises `CheckpointMismatch` that names the tensor, the file and the remedy.
    """
    found = {spec.name: spec for spec in checkpoint.specs}
    known = {spec.name for spec in expected} | set(optional)
    for spec in expected:
        if spec.name not in found:
            raise CheckpointMismatch(
                f"{spec.name} {spec.shape} is in no safetensors file of {checkpoint.folder}; the configuration wants "
                "it: take the config.json and the weights of the same model"
            )
        if (got := found[spec.name].shape) != spec.shape:
            raise CheckpointMismatch(
                f"{spec.name} has shape {got} in {checkpoint.files[spec.name]}, the configuration wants {spec.shape}; "
                "take the config.json and the weights of the same model"
            )
        if spec.dtype.is_floating_point and not found[spec.name].dtype.is_floating_point:
            raise CheckpointMismatch(
                f"{spec.name} has the dtype {found[spec.name].dtype} in {checkpoint.files[spec.name]}, the "
                f"configuration wants weights in {spec.dtype}; save the checkpoint in a floating dtype"
            )
    for name in found:
        if name not in known:
            raise CheckpointMismatch(
                f"{name} in {checkpoint.files[name]} is no tensor of this configuration; remove it from the "
                "checkpoint, or take the config.json and the weights of the same model"
            )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        listed = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(
            f"{index} is not an index of safetensors files ({error!r}); download or save the checkpoint again"
        ) from error
    for name, file in listed.items():
        if Path(file).name != file or not (index.parent / file).is_file():
            raise CheckpointMismatch(
                f"{index} says that {name} is in {file!r}, which is no file of that folder; "
                "download the missing file, or save the checkpoint again"
            )
    return listed


def _check_index(index: Path, listed: Mapping[str, str], files: Mapping[str, Path]) -> None:
    for name in sorted(listed.keys() | files.keys()):
        said = listed.get(name, "no file")
        got = files[name].name if name in files else "no file"
        if said != got:
            raise CheckpointMismatch(
                f"{index} says that {name} is in {said}, but it is in {got}; "
                "the index belongs to other files: download or save the checkpoint again"
            )


def _read_header(path: Path, listed: Mapping[str, str] | None) -> Iterator[TensorSpec]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                header = file.get_slice(name)
                yield TensorSpec(name, HEADER_DTYPES[header.get_dtype()], tuple(header.get_shape()))
    except SafetensorError as error:
        names = [name for name, file in (listed or {}).items() if file == path.name]
        raise CheckpointMismatch(
            f"{path} ({path.stat().st_size} bytes) is cut short or damaged: {error}; it holds "
            f"{_find_cut_tensor(path) or ', '.join(names[:3]) or 'the whole model'}: download or copy it again"
        ) from error
    except KeyError as error:
        raise CheckpointMismatch(
            f"{name} in {path} has the dtype {error}, which is none of {', '.join(HEADER_DTYPES)}"
        ) from error


def _find_cut_tensor(path: Path) -> str | None:
    """The first tensor that reaches past the end of the file, where the header can be read at all."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
            room = path.stat().st_size - 8 - length
            cut = [name for name, entry in header.items() if entry.get("data_offsets", [0, 0])[1] > room]
        except (ValueError, AttributeError, LookupError, TypeError):
            return None
    return min(cut, key=lambda name: int(header[name]["data_offsets"][0]), default=None)
