"""Packed sequences train as their records do one by one, in every family of attention and every layout of ranks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.tiny_mla import make_mla_model
from tests.bridges.tiny_models import TINY_MODELS, VOCAB_SIZE, write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.runs import train_all
from tests.trainer.sft_files import write_lines
from transformers import AutoTokenizer

SEQ_LENGTH = 48
FAMILIES = ("llama3.2", "qwen3", "qwen3-moe", "gemma3", "deepseek-v2-lite")


def write_records(path: Path, count: int, seed: int) -> Path:
    """Records of 2 to 25 words."""
    draw = random.Random(seed)

    def words(longest: int) -> str:
        return " ".join(
            f"w{3 + int(draw.betavariate(1, 6) * (VOCAB_SIZE - 3))}" for _ in range(draw.randint(1, longest))
        )

    return write_lines(path, ({"prompt": words(15) + " ", "completion": words(10)} for _ in range(count)))


def losses_and_gradients(folder: str, records: str, cache: str) -> dict[str, dict[str, Any]]:
    """One pass over all records, packed, one by one, and packed without being told where records begin."""
    from weightcast.bridges import AutoBridge
    from weightcast.bridges.process_groups import destroy_model_parallel, initialize_distributed
    from weightcast.trainer.data.sft.rows import choose_rows
    from weightcast.trainer.data.sft.samples import PackedSftSamples, SftSamples
    from weightcast.trainer.data.sft.sources import JsonLines
    from weightcast.trainer.data.sft.store import EncoderSettings, load_or_encode

    initialize_distributed()
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.moe_aux_loss_coeff = 0.0  # the balance of experts depends on which tokens share a micro-batch
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    store = load_or_encode([JsonLines(Path(records))], folder, EncoderSettings(), Path(cache))
    rows, _ = choose_rows(store, seq_length=SEQ_LENGTH, too_long="refuse")
    packed = PackedSftSamples(store, rows, seq_length=SEQ_LENGTH, seed=1)
    single = SftSamples(store, rows, seq_length=SEQ_LENGTH, seed=1)
    passes = {
        "packed": one_pass(model, packed, micro=1),
        "single": one_pass(model, single, micro=4),
        "untold": one_pass(model, packed, micro=1, told=False),
    }
    destroy_model_parallel()
    reference = passes["single"]
    return {
        name: {
            "loss": abs(loss - reference[0]),
            "gradient": max((g - r).abs().max().item() for g, r in zip(grads, reference[1], strict=True)),
            "largest": max(g.abs().max().item() for g in grads),
            "samples": samples,
        }
        for name, (loss, grads, samples) in passes.items()
    }


def one_pass(model: Any, samples: Any, *, micro: int, told: bool = True) -> tuple[float, list[torch.Tensor], int]:
    """Mean loss over one epoch, and its gradients."""
    from dataclasses import replace

    from weightcast.trainer.data.samples import Batches
    from weightcast.trainer.gpt_step import forward_step

    model.zero_grad()
    whole = Batches(samples, micro_batch_size=micro, global_batch_size=samples.num_samples)
    total, count = torch.zeros(()), 0
    for batch in whole.of_step(consumed_samples=0, data_parallel_rank=0, data_parallel_size=1):
        given = batch if told else replace(batch, cu_seqlens=None)
        output, loss_of = forward_step(iter([given]), model)
        loss, num_tokens, _ = loss_of(output)
        total, count = total + loss.detach(), count + int(num_tokens)
        torch.autograd.backward(loss)
    grads = [parameter.grad / count for parameter in model.parameters() if parameter.grad is not None]
    return (total / count).item(), grads, samples.num_samples


def compare_all(folders: dict[str, str], records: str, cache: str) -> dict[str, Any]:
    """`losses_and_gradients` of each model."""
    return {name: losses_and_gradients(folder, records, f"{cache}/{name}") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The differences, by family."""
    out = tmp_path_factory.mktemp("models")
    folders = {name: str(write_tiny_model(name, out / name)) for name in FAMILIES if name in TINY_MODELS}
    for name in (name for name in FAMILIES if name not in folders):
        make_mla_model(name).save_pretrained(out / name)
        AutoTokenizer.from_pretrained(folders["qwen3"]).save_pretrained(out / name)
        folders[name] = str(out / name)
    records = write_records(out / "train.jsonl", 32, seed=5)
    (found,) = run_ranks(compare_all, 1, folders, str(records), str(out / "cache"), process_group=False)
    result: dict[str, Any] = found
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_loss_and_gradients_are_those_of_single_records(name: str, compared: dict[str, Any]) -> None:
    packed, single, untold = (compared[name][kind] for kind in ("packed", "single", "untold"))
    assert packed["loss"] < 1e-5
    assert packed["gradient"] < 1e-5
    assert packed["samples"] < single["samples"] / 2
    # What is not told apart is something else, so the comparison can fail.
    assert untold["loss"] > 1e-4
    assert untold["gradient"] > 1e-3


LAYOUTS = {
    "TP2": ["model.tensor_model_parallel_size=2"],
    "TP2 sequence parallel": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "PP2": ["model.pipeline_model_parallel_size=2"],
    "PP2 VPP2": ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"],
    "DP2": [],
}


@pytest.fixture(scope="module")
def on_two_ranks(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs on packed records in each layout, and two on padded ones."""
    out = tmp_path_factory.mktemp("runs")
    records = write_records(out / "train.jsonl", 64, seed=6)
    words = [f"model.hf_path={qwen3}", "dataset.kind=sft", f"dataset.files={json.dumps([str(records)])}"]
    words += [f"dataset.cache_dir={out / 'cache'}", f"dataset.seq_length={SEQ_LENGTH}", "train.global_batch_size=4"]
    words += ["train.train_iters=4", "optimizer.lr=2e-3", "optimizer.min_lr=2e-4", "dataset.val_proportion=0.1"]
    runs = {name: [*words, *extra, "dataset.packed_sequence=true"] for name, extra in LAYOUTS.items()}
    runs["padded TP2"] = [*words, "train.micro_batch_size=4", "model.tensor_model_parallel_size=2"]
    runs["padded DP2"] = [*words, "train.micro_batch_size=2"]
    first, second = run_ranks(train_all, 2, runs, timeout_s=240)
    assert first == second
    results: dict[str, Any] = first
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_curve(layout: str, on_two_ranks: dict[str, Any]) -> None:
    found = on_two_ranks[layout]
    assert "error" not in found, found
    assert found["losses"] == pytest.approx(on_two_ranks["TP2"]["losses"], abs=1e-5)
    assert found["losses"][-1] < found["losses"][0] - 0.05


def test_padded_records_too(on_two_ranks: dict[str, Any]) -> None:
    found = on_two_ranks["padded DP2"]
    assert "error" not in found, found
    assert found["losses"] == pytest.approx(on_two_ranks["padded TP2"]["losses"], abs=1e-5)
    assert found["losses"][-1] < found["losses"][0]
