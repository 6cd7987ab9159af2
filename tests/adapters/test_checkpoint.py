"""Reading what an HF folder holds from its safetensors headers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightcast.adapters.checkpoint import read_checkpoint_specs
from weightcast.sync import TensorSpec
from weightcast.sync.errors import CheckpointMismatch

A = TensorSpec("a", torch.bfloat16, (2, 3))
B = TensorSpec("b", torch.float32, ())


def write(path: Path, *specs: TensorSpec) -> None:
    save_file({spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in specs}, path)


def write_index(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", A, B)
    assert set(read_checkpoint_specs(tmp_path)) == {A, B}


def test_several_files_by_their_index(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", A)
    write(tmp_path / "two.safetensors", B)
    write_index(tmp_path, a="one.safetensors", b="two.safetensors")
    assert read_checkpoint_specs(tmp_path) == (A, B)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"model\.safetensors does not exist; .* is started on an HF folder"):
        read_checkpoint_specs(tmp_path)


def test_a_file_of_the_index_is_missing(tmp_path: Path) -> None:
    write_index(tmp_path, a="one.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"one\.safetensors does not exist"):
        read_checkpoint_specs(tmp_path)


def test_a_tensor_of_the_index_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", A)
    write_index(tmp_path, a="one.safetensors", b="one.safetensors")
    with pytest.raises(CheckpointMismatch, match="lists b, but no file"):
        read_checkpoint_specs(tmp_path)
