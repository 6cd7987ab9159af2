"""What an HF folder holds, read from the headers of its safetensors files.

An engine expects, of every update, exactly the tensors of the checkpoint that it was started on. Reading headers
costs milliseconds, needs no model class and no tensor data.

    specs = read_checkpoint_specs(Path("path/to/hf"))
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import TensorSpec

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# The element types of the safetensors format, https://github.com/huggingface/safetensors (Dtype).
_DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def read_checkpoint_specs(folder: Path) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of every tensor in an HF folder, in the order of its files.

    Raises `CheckpointMismatch` when there is no safetensors file, when a file of the index is missing, or when a
    tensor is listed in the index and in no file.
    """
    specs = [spec for path in _weight_files(folder) for spec in _read_header(path)]
    index = folder / _INDEX
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"])
        if lost := sorted(listed - {spec.name for spec in specs}):
            raise CheckpointMismatch(f"{index} lists {', '.join(lost)}, but no file of the folder holds them")
    return tuple(specs)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        paths = [folder / _SINGLE]
    for path in paths:
        if not path.is_file():
            raise CheckpointMismatch(
                f"{path} does not exist; an engine that takes updates is started on an HF folder with "
                f"{_SINGLE} or {_INDEX} and the files that it names"
            )
    return paths


def _read_header(path: Path) -> list[TensorSpec]:
    with safe_open(path, framework="pt") as file:
        slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
        return [_spec_of(path, name, part.get_dtype(), part.get_shape()) for name, part in slices]


def _spec_of(path: Path, name: str, dtype: str, shape: list[int]) -> TensorSpec:
    if dtype not in _DTYPES:
        raise CheckpointMismatch(
            f"{name} in {path} has the element type {dtype}; weightcast carries {', '.join(_DTYPES)}"
        )
    return TensorSpec(name, _DTYPES[dtype], tuple(shape))
