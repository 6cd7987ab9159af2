"""The example of an architecture of one's own: run as its docstring says, and against transformers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.bridges.test_bits import check_same_files
from tests.ranks import find_free_port, run_ranks
from transformers import AutoModelForCausalLM, Ernie4_5Config

from weightcast.bridges import AutoBridge, ModelBridge
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import UnsupportedModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_architecture.py"
TOKENS = torch.arange(48).reshape(2, 24) * 5 % 131


def write_model(folder: Path) -> Path:
    """A random small model with weights large enough that every feature moves the logits."""
    torch.manual_seed(5)
    config = Ernie4_5Config(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.15,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def family() -> ModelBridge:
    """What the example defines."""
    spec = importlib.util.spec_from_file_location("own_architecture", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: ModelBridge = module.ERNIE
    return found


def largest_difference(folder: str) -> float:
    """Of the logits that Megatron and transformers compute of the checkpoint."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    (model,) = AutoBridge.from_hf_pretrained(folder, bridges=[family()]).to_megatron_model(wrap_with_ddp=False)
    with torch.no_grad():
        found = model.eval()(TOKENS, torch.arange(24).expand_as(TOKENS), None)
    return float((found[..., :131] - expected).abs().max())


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60


@pytest.mark.slow
def test_it_gives_the_bits_of_the_file_and_the_logits_of_transformers(tmp_path: Path) -> None:
    model, export = write_model(tmp_path / "model"), tmp_path / "export"
    with pytest.raises(UnsupportedModel, match=r"Ernie4_5ForCausalLM.*A family of your own is a ModelBridge"):
        AutoBridge.from_hf_pretrained(model)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(find_free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, str(EXAMPLE), str(model), str(export)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    check_same_files(export, open_checkpoint(model))
    (difference,) = run_ranks(largest_difference, 1, str(model), process_group=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert difference <= 1e-5


def test_what_it_does_not_map_it_refuses() -> None:
    hf = Ernie4_5Config(use_bias=True, architectures=["Ernie4_5ForCausalLM"])
    said = AutoBridge.explain(hf, bridges=[family()])
    assert said is not None and "use_bias=True is not supported: the table has no biases" in said
