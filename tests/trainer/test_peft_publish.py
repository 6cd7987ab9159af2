"""Versions of a run with adapters, as a subscriber gets them: merged, or the adapter alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.ranks import find_free_port, run_ranks
from tests.trainer.peft_runs import train_adapters
from tests.trainer.runs import words_for
from tests.trainer.test_publish import read_events
from transformers import AutoModelForCausalLM

from weightcast.bridges.peft.merge_files import merge_folder
from weightcast.sync import WeightSubscriber

STEPS = 2
UPDATED = "model.layers.0.self_attn.o_proj.weight"
Tensors = dict[str, torch.Tensor]


def publish(num_ranks: int, words: list[str], folder: Path) -> dict[int, Tensors]:
    """Train on some ranks; every version as it came."""
    address = f"tcp://127.0.0.1:{find_free_port()}"
    settings = [f"train.train_iters={STEPS}", f"publish.to={address}", "publish.wait_for=1", "train.micro_batch_size=8"]
    settings += [f"checkpoint.export_hf={folder / 'merged'}", f"peft.export_adapter={folder / 'adapter'}"]
    settings += [f"logger.events={folder / 'events.jsonl'}"]
    versions: dict[int, Tensors] = {}
    with ThreadPoolExecutor(1) as pool, WeightSubscriber(address, engine="test-engine") as subscriber:
        trainer = pool.submit(run_ranks, train_adapters, num_ranks, {"run": {"words": [*words, *settings]}})
        for _ in range(STEPS):
            update = subscriber.wait(timeout_s=60)
            versions[update.version.number] = {name: tensor.clone() for name, tensor in update}
            update.commit()
        assert all("error" not in results["run"] for results in trainer.result()), trainer.result()
    return versions


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """Names, dtypes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("scheme", ["lora", pytest.param("dora", marks=pytest.mark.long)])
def test_engines_are_served_the_merged_export(
    scheme: str, gemma3_bf16: Path, texts: list[Path], tmp_path: Path
) -> None:
    words = [*words_for(gemma3_bf16, texts, tmp_path / "cache"), f"peft.scheme={scheme}", "peft.dim=4"]
    versions = publish(2, [*words, "model.tensor_model_parallel_size=2"], tmp_path)
    assert list(versions) == [1, 2]
    assert_same(versions[STEPS], load_file(tmp_path / "merged" / "model.safetensors"))
    assert not torch.equal(versions[1][UPDATED], versions[2][UPDATED])
    if scheme == "lora":  # DoRA's norms are summed over the two ranks here, and by one process there
        merge_folder(gemma3_bf16, tmp_path / "adapter", tmp_path / "again", show_progress=False)
        assert_same(versions[STEPS], load_file(tmp_path / "again" / "model.safetensors"))
    base = load_file(gemma3_bf16 / "model.safetensors")
    frozen = {name for name in base if torch.equal(base[name], versions[STEPS][name])}
    assert {name for name in base if "_proj" not in name} == frozen
    phases = {record.get("phase") for record in read_events(tmp_path / "events.jsonl.1")}
    assert {"publish.prepare", "publish.pack"} <= phases


def test_the_adapter_alone(qwen3: Path, texts: list[Path], tmp_path: Path) -> None:
    words = [*words_for(qwen3, texts, tmp_path / "cache"), "peft.scheme=canonical_lora", "peft.dim=4"]
    engine_config = tmp_path / "received" / "adapter_config.json"
    engine_config.parent.mkdir()
    versions = publish(1, [*words, "publish.peft=adapter", f"publish.engine_config={engine_config}"], tmp_path)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
    assert_same(versions[STEPS], adapter)
    # With what the engine is told, the version is a PEFT folder.
    save_file(versions[STEPS], engine_config.with_name("adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen3), engine_config.parent)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        assert (loaded(input_ids=tokens).logits - merged(input_ids=tokens).logits).abs().max() <= 1e-5
