"""Damaged HF folders: each is refused by name, with the file and the remedy, and the model stays as it was, bit by bit.

`test_import` has the pure half, file by file, and tensors that are missing, extra or of another shape.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import run_ranks

from weightcast.bridges import AutoBridge
from weightcast.sync.checkpoint_files import INDEX_FILE
from weightcast.sync.errors import WeightcastError

Damage = Callable[[Path], object]
"""Damages the folder of a model in place."""

FIRST, SECOND = (f"model-0000{number}-of-00004.safetensors" for number in (1, 2))
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def edit_bytes(file: str, edit: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / file).write_bytes(edit((folder / file).read_bytes()))


def edit_header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Rewrite the header of the first file, and leave its data."""

    def damage(folder: Path) -> None:
        raw = (folder / FIRST).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        (folder / FIRST).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Rewrite the first file with other tensors."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / FIRST)
        edit(tensors)
        save_file(tensors, folder / FIRST)

    return damage


def edit_index(edit: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text())
        edit(index["weight_map"])
        (folder / INDEX_FILE).write_text(json.dumps(index))

    return damage


def edit_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return damage


def as_folder(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def swap_files(folder: Path) -> None:
    (folder / FIRST).rename(folder / "aside")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "aside").rename(folder / SECOND)


def outside(weight_map: dict[str, str]) -> None:
    weight_map[EMBEDDING] = f"../qwen3/{FIRST}"


def scaled(dtype: torch.dtype) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].mul(100).to(dtype)}))


MISMATCH = "CheckpointMismatch: "
DAMAGED_FILES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "header is no JSON": (
        edit_bytes(FIRST, lambda raw: raw[:8] + b"!" * 40 + raw[48:]),
        (FIRST, "cut short or damaged", EMBEDDING, "download or copy it again"),
    ),
    "header longer than the file": (
        edit_bytes(FIRST, lambda raw: struct.pack("<Q", len(raw) + 1) + raw[8:]),
        (FIRST, "cut short or damaged", EMBEDDING, "download or copy it again"),
    ),
    "header longer than any": (
        edit_bytes(FIRST, lambda raw: b"\xff" * 8 + raw[8:]),
        (FIRST, "cut short or damaged", EMBEDDING, "download or copy it again"),
    ),
    "tensors overlap": (
        edit_header(lambda header: header.update(extra=dict(header[EMBEDDING]))),
        (FIRST, "cut short or damaged", "download or copy it again"),
    ),
    "shape and bytes differ": (
        edit_header(lambda header: header[EMBEDDING].update(shape=[131, 33])),
        (FIRST, "cut short or damaged", "download or copy it again"),
    ),
    "unknown dtype": (
        edit_header(lambda header: header[EMBEDDING].update(dtype="F128")),
        (FIRST, "cut short or damaged", "F128"),
    ),
    "trailing bytes": (
        edit_bytes(FIRST, lambda raw: raw + b"\0" * 64),
        (FIRST, "cut short or damaged", "download or copy it again"),
    ),
    "empty file": (
        edit_bytes(FIRST, lambda raw: b""),
        (FIRST, "(0 bytes) is cut short", EMBEDDING, "download or copy it again"),
    ),
    "file missing": (
        lambda folder: (folder / FIRST).unlink(),
        (INDEX_FILE, EMBEDDING, FIRST, "download the missing file"),
    ),
    "file is a folder": (
        as_folder(FIRST),
        (INDEX_FILE, EMBEDDING, FIRST, "download the missing file"),
    ),
    "two files swapped": (
        swap_files,
        (INDEX_FILE, FIRST, SECOND, "download or save the checkpoint again"),
    ),
    "index is no JSON": (
        edit_bytes(INDEX_FILE, lambda raw: raw[:-20]),
        (INDEX_FILE, "is not an index", "download or save the checkpoint again"),
    ),
    "index is no text": (
        edit_bytes(INDEX_FILE, lambda raw: b"\xff\xfe\x00" + raw),
        (INDEX_FILE, "is not an index", "download or save the checkpoint again"),
    ),
    "index names a tensor that its file lacks": (
        edit_index(lambda weight_map: weight_map.update({NORM: FIRST})),
        (INDEX_FILE, NORM, FIRST, "download or save the checkpoint again"),
    ),
    "index lacks a tensor": (
        edit_index(lambda weight_map: weight_map.pop(NORM)),
        (INDEX_FILE, NORM, "no file", "download or save the checkpoint again"),
    ),
    "index leads outside": (edit_index(outside), (INDEX_FILE, EMBEDDING, "../qwen3", "no file of that folder")),
    "tensor in two files": (
        edit_tensors(lambda tensors: tensors.update({NORM: torch.zeros(32)})),
        (NORM, FIRST, "save the checkpoint again"),
    ),
    "whole numbers for weights": (
        scaled(torch.int8),
        (EMBEDDING, "torch.int8", FIRST, "save the checkpoint in a floating dtype"),
    ),
    "config of a wider model": (
        edit_config(hidden_size=64),
        (EMBEDDING, "(131, 32)", FIRST, "wants (131, 64)", "config.json and the weights of the same model"),
    ),
    "config of a deeper model": (
        edit_config(num_hidden_layers=5, layer_types=["full_attention"] * 5),
        ("model.layers.4.", "no safetensors file", "config.json and the weights of the same model"),
    ),
    "config of a shallower model": (
        edit_config(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        ("model.layers.3.", "is no tensor of this configuration", "config.json and the weights of the same model"),
    ),
}


def load_damaged(source: str, damaged: str) -> dict[str, str]:
    """Load each damaged folder into one model of `source`'s weights; the error, or what was wrong about the refusal."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    outcome: dict[str, str] = {}
    for case in sorted(Path(damaged).iterdir()):
        try:
            AutoBridge.from_hf_pretrained(case).load_hf_weights(model)
            outcome[case.name] = "loaded"
        except WeightcastError as error:
            outcome[case.name] = f"{type(error).__name__}: {error}"
        after = [parameter.detach() for parameter in model[0].parameters()]
        if not all(map(torch.equal, before, after)):
            outcome[case.name] = f"written before it was refused: {outcome[case.name]}"
    return outcome


def test_damaged_files_are_refused_and_leave_the_model_as_it_was(tiny_models: Path, tmp_path: Path) -> None:
    for case, (damage, _) in DAMAGED_FILES.items():
        shutil.copytree(tiny_models / "qwen3", tmp_path / case)
        damage(tmp_path / case)
    (outcome,) = run_ranks(load_damaged, 1, str(tiny_models / "qwen3"), str(tmp_path), process_group=False)
    assert outcome.keys() == DAMAGED_FILES.keys()
    wrong = {
        case: outcome[case]
        for case, (_, texts) in DAMAGED_FILES.items()
        if not outcome[case].startswith(MISMATCH) or not all(text in outcome[case] for text in texts)
    }
    assert not wrong


def load_in_other_dtypes(folder: str, wanted: str) -> bool:
    """Whether the embedding is what the file's values are in the parameters' dtype."""
    model = AutoBridge.from_hf_pretrained(folder).to_megatron_model(wrap_with_ddp=False)
    loaded = model[0].embedding.word_embeddings.weight[:131]
    expected = load_file(Path(folder, wanted))[EMBEDDING]
    return loaded.dtype is torch.float32 and torch.equal(loaded, expected.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_dtypes_than_the_configurations_are_cast(
    dtype: torch.dtype, tiny_models: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "qwen3", folder)
    scaled(dtype)(folder)
    assert run_ranks(load_in_other_dtypes, 1, str(folder), FIRST, process_group=False) == [True]


DAMAGED_CONFIGS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "cut short": (
        edit_bytes("config.json", lambda raw: raw[:50]),
        ("ConfigError: ", "is no JSON", "download it again"),
    ),
    "empty": (edit_bytes("config.json", lambda raw: b""), ("ConfigError: ", "(0 bytes) is no JSON")),
    "zeros": (edit_bytes("config.json", lambda raw: b"\0" * len(raw)), ("ConfigError: ", "is no JSON")),
    "no text": (edit_bytes("config.json", lambda raw: b"\xff\xfe\x00"), ("ConfigError: ", "is no JSON")),
    "a list": (edit_bytes("config.json", lambda raw: b"[" + raw + b"]"), ("ConfigError: ", "holds a list")),
    "null": (edit_bytes("config.json", lambda raw: b"null"), ("ConfigError: ", "not the fields of a model")),
    "a folder": (
        as_folder("config.json"),
        ("ConfigError: ", "has no config.json"),
    ),
    "no model type": (edit_config(model_type=None), ("ConfigError: ", "model_type None", "install a newer")),
    "a list as type": (edit_config(model_type=["qwen3"]), ("ConfigError: ", "model_type ['qwen3']")),
    "no architecture": (edit_config(architectures=None), ("UnsupportedModel: ", "none named", "supported are")),
    "another architecture": (edit_config(architectures=["GPT9"]), ("UnsupportedModel: ", "GPT9", "supported are")),
    "a text as architecture": (edit_config(architectures="GPT9"), ("UnsupportedModel: ", "architecture GPT9;")),
    "a text as size": (edit_config(hidden_size="wide"), ("ConfigError: ", "'hidden_size' expected int", "field of it")),
    "null as size": (edit_config(hidden_size=None), ("ConfigError: ", "'hidden_size' expected int")),
    "layers and their kinds": (edit_config(num_hidden_layers=5), ("ConfigError: ", "`num_hidden_layers` (5)")),
    "a negative size": (edit_config(hidden_size=-1), ("ConfigError: ", "cannot build a qwen3 model", "correct")),
    "no heads": (edit_config(num_key_value_heads=0), ("ConfigError: ", "cannot build a qwen3 model", "correct")),
    "a text as rope": (edit_config(rope_parameters="x"), ("ConfigError: ", "'rope_parameters'")),
    "a list as quantisation": (edit_config(quantization_config=[]), ("ConfigError: ", "cannot read the config.json")),
}


@pytest.mark.parametrize("case", DAMAGED_CONFIGS)
def test_damaged_configurations_are_refused(case: str, tiny_models: Path, tmp_path: Path) -> None:
    damage, texts = DAMAGED_CONFIGS[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_models / "qwen3", folder)
    damage(folder)
    with pytest.raises(WeightcastError) as caught:
        AutoBridge.from_hf_pretrained(folder).hf_checkpoint()
    said = f"{type(caught.value).__name__}: {caught.value}"
    assert all(text in said for text in texts), said
