"""The delta codec's kernels for a GPU, in Triton's interpreter; `tests/gpu` runs them compiled."""

import os
import subprocess
import sys

import pytest
import torch

from weightcast.sync import delta_torch


def test_the_kernels_find_what_the_codec_finds() -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA and with the extra vllm")
    command = [sys.executable, "-m", "tests.sync.interpreted_delta"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 113  # four dtypes, seven sizes, four densities; and one more


def test_without_a_gpu_nothing_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weightcast.sync.delta_triton", None)  # an import of it would raise
    delta = delta_torch.encode_on_device(torch.zeros(4, dtype=torch.int16), torch.ones(4, dtype=torch.int16))
    assert delta is not None and delta.num_changes == 4
