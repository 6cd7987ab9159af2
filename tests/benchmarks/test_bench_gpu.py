"""The cases of a GPU, as far as a machine without one can tell."""

import os
import subprocess
import sys
from pathlib import Path

import model_state
import overhead
import pytest
import torch
import train_gpu
from records import Settings
from shapes import MODELS

import gpu
from weightcast.sync.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, lay_out_chunks

HERE = Path(__file__).parent
QUICK = Settings(rounds=1, quick=True)
WAYS: dict[str, dict[str, bool]] = {
    "staged": {},
    "pointed": {"points": True},
    "landed": {"into": True},
    "direct": {"direct": True, "points": True},
    "direct and landed": {"direct": True, "into": True},
}


@pytest.mark.slow
def test_training_on_a_gpu_is_measured_as_far_as_a_cpu_can_show() -> None:
    """Both models, their weights and losses; in a process of its own, which makes Megatron's groups."""
    program = (
        "import train_gpu; from records import Settings; settings = Settings(rounds=2, quick=True)\n"
        "for measure in (train_gpu.measure_train_step, train_gpu.measure_peak_share):\n"
        "    reading = measure(settings, device='cpu')\n"
        "    assert len(reading.values) == len(reading.baseline_values) == 2 and min(reading.values) > 0\n"
        "    print(reading.unit, sorted(reading.details), reading.note)\n"
    )
    paths = [str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    step, share = done.stdout.splitlines()
    assert step.startswith("tokens/s ") and "'theirs_share_of_product'" in step and "losses fall from" in step
    assert share.startswith("TFLOP/s ") and "'ours_share_of_product'" in share and "'forward_backward_s'" in share


def test_the_gpus_model_is_the_recipes() -> None:
    config = train_gpu.Size({"hidden_size": 64, "vocab_size": 512}, 4096, 2, 8).config()
    assert config.mixed_precision == "bf16_mixed" and config.ddp.use_distributed_optimizer
    assert (config.train.micro_batch_size, config.dataset.seq_length, config.scheduler.lr_warmup_iters) == (2, 4096, 0)


def test_the_gpu_codec_case_compares_bits_wherever_it_runs() -> None:
    reading = gpu.measure_encode(QUICK, device="cpu")
    assert len(reading.values) == 1 and reading.values[0] > 0


@pytest.mark.parametrize("size", [3, 8, 8003])
def test_every_bit_changes_the_sums_that_a_gpus_bits_are_hashed_by(size: int) -> None:
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    sums = {model_state.sum_slabs(raw).numpy().tobytes()}
    for place in {0, size // 2, size - 1}:
        for bit in range(8):
            other = raw.clone()
            other[place] ^= 1 << bit
            sums.add(model_state.sum_slabs(other).numpy().tobytes())
    assert len(sums) == 1 + 8 * len({0, size // 2, size - 1})


def test_the_pass_alone_is_compared_with_torch_wherever_it_runs() -> None:
    reading = gpu.measure_pass(QUICK, device="cpu")
    assert reading.values[0] > 0 and reading.details["digests_alone_gbps"] > 0 and reading.note.endswith("torch")


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_the_case_of_cuda_ipc_moves_the_bits_where_a_stand_in_is_the_gpu(way: dict[str, bool]) -> None:
    reading = gpu.race_ipc(QUICK, baseline=None, device="cpu", mover="host_gpu_mover", **way)
    assert reading.note.startswith("carried by cuda_ipc,") and len(reading.values) == 1
    phases = {"pack_s", "stage_s", "check_s", "load_s", "publish_s", "ours_s", "theirs_s"}
    assert set(reading.details) == phases | ({"hold_s"} if "direct" in way else set())
    assert 0 < reading.details["pack_s"] < reading.details["publish_s"]


def test_the_overhead_of_a_version_is_measured_on_a_model_of_as_many_tensors_and_chunks_as_a_real_one() -> None:
    real, small = MODELS["qwen3-8b"](), MODELS[overhead.MODEL]()
    assert [spec.name for spec in small] == [spec.name for spec in real] and len(real) == 399
    counts = [
        len(lay_out_chunks([s.whole() for s in specs], {s.name: s.dtype for s in specs}, chunk_bytes))
        for specs, chunk_bytes in ((real, MAX_CHUNK_BYTES), (small, MIN_CHUNK_BYTES))
    ]
    assert counts[0] <= counts[1] < 1.5 * counts[0]
    reading = overhead.measure_overhead(QUICK)
    assert len(reading.values) == 1 and 0 < reading.details["work_ms"] < reading.values[0]
