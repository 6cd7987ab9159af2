"""Conversion without a model: the same bits as through one, in both directions, after kills, and out of damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.test_mla import write_in_fp8
from tests.bridges.tiny_mla import write_mla_model
from tests.ranks import ROOT, run_ranks
from transformers import AutoModelForCausalLM

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.standalone_blocks import split_box
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.bridges.standalone_import import import_checkpoint
from weightcast.bridges.standalone_journal import Journal
from weightcast.bridges.standalone_verify import Comparison, compare_checkpoints
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import BridgeError, CheckpointMismatch, ConfigError, UnmappedTensor

SMALL_BYTES = 40_000
NAMES = ("llama-biases", "qwen2-tied", "qwen3", "gemma3", "glm4-moe", "mixtral")
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


def equal(a: Path, b: Path, **options: Any) -> bool:
    return not compare(a, b, **options).differences


def compare(a: Path, b: Path, **options: Any) -> Comparison:
    return compare_checkpoints(a, b, show_progress=False, **options)


def to_megatron(source: Path, folder: Path) -> Path:
    import_checkpoint(AutoBridge.from_hf_pretrained(source), folder, show_progress=False, file_bytes=SMALL_BYTES)
    return folder


def to_hf(config: Path, checkpoint: Path, folder: Path) -> Path:
    bridge = AutoBridge.from_hf_pretrained(config)
    export_checkpoint(bridge, checkpoint, folder, show_progress=False, shard_bytes=SMALL_BYTES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_gives_the_bits_of_the_source(name: str, tiny_models: Path, tmp_path: Path) -> None:
    source = tiny_models / name
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    assert equal(source, checkpoint)
    back = to_hf(source, checkpoint, tmp_path / "back")
    assert equal(source, back) and open_checkpoint(back).specs == open_checkpoint(source).specs
    ours = AutoModelForCausalLM.from_pretrained(back).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(tmp_path.glob(".*")) and not list(back.glob("*journal*"))


def load_and_save(source: str, standalone: str, saved: str, tp: int, pp: int) -> bool:
    """A model of another layout takes the standalone checkpoint; its own checkpoint is saved for the other way."""
    bridge = AutoBridge.from_hf_pretrained(source)
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    model = bridge.load_megatron_model(standalone, **sizes, wrap_with_ddp=False)
    bridge.save_megatron_model(model, saved)
    with open_checkpoint(Path(source)).reader() as reader:
        specs = {spec.name: spec for spec in open_checkpoint(Path(source)).specs}
        weights = bridge.export_hf_weights(model, show_progress=False)
        return all(torch.equal(weight, reader.read(specs[name].whole())) for name, weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp"), [("llama3.2", 2, 2), ("qwen3", 4, 1)])
def test_megatron_reads_what_was_written_and_what_it_writes_is_read(
    name: str, tp: int, pp: int, tiny_models: Path, tmp_path: Path
) -> None:
    source = tiny_models / name
    standalone = to_megatron(source, tmp_path / "standalone")
    assert all(run_ranks(load_and_save, tp * pp, str(source), str(standalone), str(tmp_path / "saved"), tp, pp))
    assert equal(source, tmp_path / "saved")
    bridge = AutoBridge.from_hf_pretrained(source)
    assert equal(standalone, tmp_path / "saved", config=bridge)
    padded = {difference.name for difference in compare(standalone, tmp_path / "saved").differences}
    # TP=4 pads the 131 tokens to 512 rows, TP=1 and TP=2 to 256.
    assert padded == ({"embedding.word_embeddings.weight", "output_layer.weight"} if tp == 4 else set())


def save_as_megatron_lm(source: str, folder: str) -> None:
    """A checkpoint with Megatron's other spelling of layers, in the folders of a training run of Megatron-LM."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    bridge = AutoBridge.from_hf_pretrained(source)
    (chunk,) = bridge.to_megatron_model(wrap_with_ddp=False)
    state: dict[str, Any] = {
        key: entry for key, entry in chunk.sharded_state_dict().items() if not isinstance(entry, ShardedObject)
    }
    state["optimizer"] = _sharded("optimizer.state.exp_avg.output_layer.weight")
    state["iteration"] = 7
    Path(folder, "iter_0000007").mkdir(parents=True)
    Path(folder, "latest_checkpointed_iteration.txt").write_text("7")
    dist_checkpointing.save(state, str(Path(folder, "iter_0000007")))


def _sharded(key: str) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor.from_rank_offsets(key, torch.zeros(3), replica_id=0)


def test_megatron_lms_spelling_of_layers_is_read(tiny_models: Path, tmp_path: Path) -> None:
    source = tiny_models / "qwen3"
    run_ranks(save_as_megatron_lm, 1, str(source), str(tmp_path / "run"), process_group=False)
    checkpoint = DistCheckpoint.open(tmp_path / "run")
    assert "decoder.layers.self_attention.linear_qkv.weight" in checkpoint.specs
    assert "optimizer.state.exp_avg.output_layer.weight" in checkpoint.others
    assert equal(source, tmp_path / "run")
    assert equal(source, to_hf(source, tmp_path / "run", tmp_path / "back"))


KILLED = """
import sys
import weightcast.bridges.standalone_journal as journals
from tests.bridges.test_standalone import to_hf, to_megatron
from pathlib import Path

add = journals.Journal.add
def add_one_and_die(journal, file, record):
    add(journal, file, record)
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
journals.Journal.add = add_one_and_die
{call}
"""


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_killed_run_leaves_nothing_and_goes_on(way: str, tiny_models: Path, tmp_path: Path) -> None:
    source, out = tiny_models / "llama3.1", tmp_path / "out"
    checkpoint = to_megatron(source, tmp_path / "checkpoint") if way == "export" else None
    call = (
        f"to_megatron(Path({str(source)!r}), Path({str(out)!r}))"
        if checkpoint is None
        else f"to_hf(Path({str(source)!r}), Path({str(checkpoint)!r}), Path({str(out)!r}))"
    )
    for _ in range(2):  # killed after its first file, then after its second
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", KILLED.format(call=call)], env=env, capture_output=True, timeout=90
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        assert not out.exists()
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('{"file": "cut sho')
    bridge = AutoBridge.from_hf_pretrained(source)
    if checkpoint is None:
        report = import_checkpoint(bridge, out, show_progress=False, file_bytes=SMALL_BYTES)
    else:
        report = export_checkpoint(bridge, checkpoint, out, show_progress=False, shard_bytes=SMALL_BYTES)
    assert report.num_resumed == 2 and report.num_files > 3
    assert equal(source, out)


def test_another_conversion_starts_anew(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "work", {"of": 1})
    (tmp_path / "work" / "a").touch()
    journal.add("a", [1])
    journal.add("b", [2])  # no such file on disk
    assert Journal.open(tmp_path / "work", {"of": 1}).done == {"a": [1]}
    assert Journal.open(tmp_path / "work", {"of": 2}).done == {} and not (tmp_path / "work" / "a").exists()


def test_one_flipped_bit_is_found_and_named(tiny_models: Path, tmp_path: Path) -> None:
    source = tiny_models / "qwen2"
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    shutil.copytree(source, tmp_path / "flipped")
    path = tmp_path / "flipped" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    for other in (source, checkpoint):
        (difference,) = compare(other, tmp_path / "flipped").differences
        assert difference.how.startswith("1 of ") and "first at (" in difference.how


CASES: dict[str, tuple[Callable[[Path], Any], type[BridgeError], str]] = {
    "cut file": (
        lambda c: os.truncate(sorted(c.glob("*.distcp"))[-1], 100),
        CheckpointMismatch,
        "the checkpoint is incomplete",
    ),
    "missing file": (
        lambda c: sorted(c.glob("*.distcp"))[0].unlink(),
        CheckpointMismatch,
        "which .metadata lists",
    ),
    "no metadata": (lambda c: (c / ".metadata").unlink(), CheckpointMismatch, ".metadata is missing"),
    "cut metadata": (lambda c: os.truncate(c / ".metadata", 50), CheckpointMismatch, ".metadata cannot be read"),
    "another format": (
        lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        CheckpointMismatch,
        "metadata.json says 'zarr'",
    ),
    "no archive": (
        lambda c: sorted(c.glob("*.distcp"))[0].write_bytes(bytes(sorted(c.glob("*.distcp"))[0].stat().st_size)),
        CheckpointMismatch,
        "no archive of torch's at byte 0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint_is_refused(case: str, tiny_models: Path, tmp_path: Path) -> None:
    damage, error, message = CASES[case]
    checkpoint = to_megatron(tiny_models / "llama2", tmp_path / "checkpoint")
    damage(checkpoint)
    with pytest.raises(error, match=message):
        to_hf(tiny_models / "llama2", checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_another_model_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    checkpoint = to_megatron(tiny_models / "llama3.1", tmp_path / "checkpoint")
    with pytest.raises(UnmappedTensor, match="which the configuration wants"):
        to_hf(tiny_models / "qwen3", checkpoint, tmp_path / "out")
    with pytest.raises(UnmappedTensor, match="no rule maps"):
        to_hf(tiny_models / "llama3.1", to_megatron(tiny_models / "qwen3", tmp_path / "more"), tmp_path / "out")
    with pytest.raises(UnmappedTensor, match="4 query groups of 8 query, 8 key and 8 value rows make 96"):
        to_hf(tiny_models / "llama2", checkpoint, tmp_path / "out")


def test_folders_that_hold_something_are_left_alone(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        to_megatron(tiny_models / "llama2", tmp_path)
    checkpoint = to_megatron(tiny_models / "llama2", tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"holds notes.txt, which no export wrote|holds checkpoint"):
        to_hf(tiny_models / "llama2", checkpoint, tmp_path)
    with pytest.raises(ConfigError, match="holds neither safetensors"):
        compare(tmp_path, checkpoint)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_blocks_tile_their_box() -> None:
    for shape in ((7, 5), (1, 9, 3), (1,), (4,), (), (1, 1, 6)):
        seen = torch.zeros(shape)
        for offset, size in split_box(shape, 2, 12):
            seen[tuple(slice(a, a + b) for a, b in zip(offset, size, strict=True))] += 1
        assert bool((seen == 1).all()), shape


@pytest.mark.parametrize("coded", [False, True], ids=["bf16", "fp8"])
def test_latent_attention_experts_and_codes(coded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_mla_model("deepseek-v3", tmp_path, torch.randint(3, 131, (1, 9)), torch.bfloat16)
    source = write_in_fp8(tmp_path / "model", tmp_path / "coded") if coded else tmp_path / "model"
    checkpoint = to_megatron(source, tmp_path / "checkpoint")
    assert equal(source, checkpoint)
    back = to_hf(source, checkpoint, tmp_path / "back")
    assert equal(source, back, config=AutoBridge.from_hf_pretrained(source))
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert equal(source, tmp_path / "model") is not coded
