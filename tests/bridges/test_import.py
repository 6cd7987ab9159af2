"""Import refuses a checkpoint that is not whole, naming the tensor, the file and the remedy, before it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ranks import run_ranks

from weightcast.sync.checkpoint_files import INDEX_FILE, check_tensors, open_checkpoint
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region, TensorSpec

SPECS = [TensorSpec(name, torch.float32, (4, 3)) for name in ("a", "b", "c", "d")]


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder with one file."""
    save_file({spec.name: torch.rand(spec.shape) for spec in SPECS}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two files and an index."""
    for number, names in ((1, "ab"), (2, "cd")):
        save_file({name: torch.rand(4, 3) for name in names}, tmp_path / f"model-{number}.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2, "d": 2})
    return tmp_path


def write_index(folder: Path, numbers: dict[str, int]) -> None:
    weight_map = {name: f"model-{number}.safetensors" for name, number in numbers.items()}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file with other tensors."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


def test_regions_are_read_and_counted(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert list(checkpoint.specs) == SPECS
    with checkpoint.reader() as reader:
        part = reader.read(Region("c", (1, 1), (2, 2)))
        assert torch.equal(part, load_file(sharded / "model-2.safetensors")["c"][1:3, 1:3])
        reader.read(SPECS[0].whole())
        assert reader.num_bytes == 4 * 4 + 12 * 4


def test_derived_buffers_of_old_checkpoints_are_passed_over(sharded: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(sharded / "model-2.safetensors", lambda tensors: tensors.update({name: torch.rand(4)}))
    write_index(sharded, {"a": 1, "b": 1, "c": 2, "d": 2, name: 2})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.derived == (name,)
    assert list(checkpoint.specs) == SPECS and set(checkpoint.files) == {"a", "b", "c", "d"}
    check_tensors(checkpoint, SPECS)


@pytest.mark.parametrize(
    ("num_bytes", "tensor"),
    [(1, "d"), (60, "c"), (190, "a"), (250, "the whole model")],
    ids=["last", "third", "all", "header"],
)
def test_a_truncated_file_is_refused(single: Path, num_bytes: int, tensor: str) -> None:
    cut(single / "model.safetensors", num_bytes)
    with pytest.raises(CheckpointMismatch, match=rf"model\.safetensors .* cut short .* it holds {tensor}: download"):
        open_checkpoint(single)


def test_a_truncated_shard_is_refused(sharded: Path) -> None:
    (sharded / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointMismatch, match=r"model-2\.safetensors \(0 bytes\) is cut short .* it holds c, d"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"a": 1, "b": 1, "c": 2, "d": 3}, r"d is in 'model-3\.safetensors', which is no file of that folder"),
        ({"a": 1, "b": 1, "c": 1, "d": 2}, r"c is in model-1\.safetensors, but it is in model-2\.safetensors"),
        ({"a": 1, "b": 1, "c": 2}, r"d is in no file, but it is in model-2\.safetensors"),
        ({"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}, r"e is in model-2\.safetensors, but it is in no file"),
    ],
)
def test_an_index_that_lies_is_refused(sharded: Path, numbers: dict[str, int], message: str) -> None:
    write_index(sharded, numbers)
    with pytest.raises(CheckpointMismatch, match=message):
        open_checkpoint(sharded)


def test_an_index_does_not_reach_outside_its_folder(sharded: Path) -> None:
    shutil.copy(sharded / "model-2.safetensors", sharded.parent / "outside.safetensors")
    weight_map = {"c": "../outside.safetensors", "d": "../outside.safetensors"}
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointMismatch, match="which is no file of that folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointMismatch, match="is not an index"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    change(sharded / "model-2.safetensors", lambda tensors: tensors.update(a=torch.zeros(4, 3)))
    with pytest.raises(CheckpointMismatch, match=r"a is both in .*model-1\.safetensors and in model-2\.safetensors"):
        open_checkpoint(sharded)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointMismatch, match=r"has neither model\.safetensors nor .* never read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("b"), r"b \(4, 3\) is in no safetensors file of .* take the config\.json"),
        (lambda tensors: tensors.update(x=torch.zeros(1)), r"x in .*model\.safetensors is no tensor .* remove it"),
        (
            lambda tensors: tensors.update(b=torch.zeros(3, 4)),
            r"b has shape \(3, 4\) in .*model\.safetensors, .*\(4, 3\)",
        ),
    ],
    ids=["missing", "extra", "mis-shaped"],
)
def test_other_tensors_than_expected_are_refused(
    single: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    check_tensors(open_checkpoint(single), SPECS)
    change(single / "model.safetensors", edit)
    with pytest.raises(CheckpointMismatch, match=message):
        check_tensors(open_checkpoint(single), SPECS)


def load_broken(broken: str) -> dict[str, str]:
    """Import each broken folder into a model of NaNs; the error's text, or what was wrong about the refusal."""
    from weightcast.bridges import AutoBridge

    outcome: dict[str, str] = {}
    for case in sorted(Path(broken).iterdir()):
        bridge = AutoBridge.from_hf_pretrained(case)
        provider = bridge.to_megatron_provider(load_weights=False)
        provider.finalize()
        model = provider.provide_distributed_model(wrap_with_ddp=False)
        parameters = [parameter.data.fill_(float("nan")) for parameter in model[0].parameters()]
        try:
            bridge.load_hf_weights(model)
            exported = dict(bridge.export_hf_weights(model))
            tied = torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
            outcome[case.name] = f"loaded {len(exported)}, tied: {tied}"
        except CheckpointMismatch as error:
            written = sum(not parameter.isnan().all() for parameter in parameters)
            outcome[case.name] = f"{written} written: {error}"
    return outcome


def test_a_model_is_left_as_it_was_by_a_broken_checkpoint(tiny_models: Path, tmp_path: Path) -> None:
    edits: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "qwen2 missing": lambda tensors: tensors.pop("model.layers.3.self_attn.k_proj.bias"),
        "qwen2 extra": lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}),
        "qwen2 mis-shaped": lambda tensors: tensors.update({"model.norm.weight": torch.zeros(33)}),
        "qwen2-tied same copy": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        "qwen2-tied other copy": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
    }
    for case, edit in edits.items():
        shutil.copytree(tiny_models / case.partition(" ")[0], tmp_path / case)
        change(tmp_path / case / "model.safetensors", edit)
    shutil.copytree(tiny_models / "qwen3", tmp_path / "qwen3 cut")
    cut(sorted((tmp_path / "qwen3 cut").glob("*.safetensors"))[-1], 5)

    (outcome,) = run_ranks(load_broken, 1, str(tmp_path), process_group=False)
    assert outcome.pop("qwen2-tied same copy") == "loaded 51, tied: True"
    expected = {
        "qwen2 missing": "model.layers.3.self_attn.k_proj.bias",
        "qwen2 extra": "model.layers.4.mlp.up_proj.weight",
        "qwen2 mis-shaped": "model.norm.weight has shape (33,)",
        "qwen2-tied other copy": "lm_head.weight",
        "qwen3 cut": "it holds model.norm.weight",
    }
    assert outcome.keys() == expected.keys()
    for case, text in expected.items():
        assert outcome[case].startswith("0 written: ") and text in outcome[case], outcome[case]
