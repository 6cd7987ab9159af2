"""The training quickstart that users of Megatron-Bridge know: with our import path and a folder, else as it is."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks

SCRIPT = """
from weightcast.bridges import AutoBridge

import weightcast.trainer.recipes.llama.llama32_1b as llama32_1b
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.pretrain import pretrain

if __name__ == "__main__":
    # Load Llama from Hugging Face Hub and convert to Megatron
    bridge = AutoBridge.from_hf_pretrained("{folder}")
    model_provider = bridge.to_megatron_provider()

    # Get defaults for other configuration from an existing Llama 3.2 recipe
    cfg = llama32_1b.pretrain_config()
    cfg.model = model_provider
    cfg.train.train_iters = 10

    cfg.dataset.seq_length = cfg.model.seq_length
    cfg.tokenizer.vocab_size = cfg.model.vocab_size

    pretrain(cfg, forward_step)
"""
# 512 samples a step take a CPU a minute; the last line keeps the result, which the quickstart does not.
SMALLER = ("    pretrain(cfg, forward_step)", "    cfg.train.global_batch_size = 8\n    pretrain(cfg, forward_step)")
TOLD = ("    pretrain(cfg, forward_step)", "    losses = [step.loss for step in pretrain(cfg, forward_step)]")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama2", tmp_path_factory.mktemp("llama"))


def write_script(folder: Path, at: Path, *changes: tuple[str, str]) -> Path:
    script = SCRIPT.replace("{folder}", str(folder))
    for old, new in changes:
        assert old in script
        script = script.replace(old, new)
    at.write_text(script, encoding="utf-8")
    return at


def run_as_main(script: str) -> list[float]:
    losses: list[float] = runpy.run_path(script, run_name="__main__")["losses"]
    return losses


def test_it_runs_alone_and_on_two_ranks_with_the_same_losses(llama: Path, tmp_path: Path) -> None:
    script = write_script(llama, tmp_path / "train.py", SMALLER, TOLD)
    (alone,) = run_ranks(run_as_main, 1, str(script), process_group=False)
    two = run_ranks(run_as_main, 2, str(script), process_group=False)
    assert [len(losses) for losses in (alone, *two)] == [10, 10, 10]
    assert two[0] == two[1]
    assert two[0] == pytest.approx(alone, abs=0.02)  # in bf16


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_runs_to_the_letter(llama: Path, tmp_path: Path, ranks: int) -> None:
    """As users start it: by Python, and by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(write_script(llama, tmp_path / "train.py"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("step 10 of 10: loss ") == 1, done.stderr[-4000:]
