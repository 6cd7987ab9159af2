"""Parity: a Megatron model built and filled by a bridge computes the logits of transformers, in every layout.

fp32, random small models with every feature on; the largest absolute difference allowed is 1e-5. The whole matrix is
computed by one job of four gloo processes (`parity_job.py`), and read here case by case.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("parity_job.py")
WORLD_SIZE = 4
TOLERANCE = 1e-5
MOE_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient

MODELS = (
    "llama2",
    "llama3-tied-one-kv-head",
    "llama-linear-rope-all-biases",
    "llama-attention-biases",
    "llama-mlp-biases",
    "qwen2-one-kv-head",
    "qwen2-tied-windows",
    "qwen3-biases-windows",
    "qwen3-tied-one-kv-head",
    "gemma3-tied-one-kv-head",
    "gemma3-biases",
)
LAYOUTS = (
    "tp1",
    "tp2-sequence-parallel",
    "tp4",
    "pp2-vpp2",
    "tp2-pp2",
    "cp4",
    "cp2-tp2-sequence-parallel",
)
GRADIENT_LAYOUTS = ("tp2-sequence-parallel", "tp4", "pp2-vpp2", "tp2-pp2", "cp2-tp2-sequence-parallel")
MOE_MODELS = (
    "qwen3-moe-biases-one-dense-layer",
    "qwen3-moe-tied-unnormalised",
    "mixtral-window",
    "qwen2-moe-gated-shared-expert",
    "glm4-moe-groups",
)
MOE_LAYOUTS = (
    "tp1",
    "tp2-sequence-parallel-etp1",
    "ep4",
    "ep2-pp2",
    "ep2-tp2-etp1",
    "ep2-tp2-etp2",
)
MOE_GRADIENT_LAYOUTS = ("ep2-pp2", "ep2-tp2-etp1", "ep2-tp2-etp2")
SABOTAGE = (
    "rope-numbers-of-megatron",
    "no-linear-scaling",
    "window-one-longer",
    "one-rope-for-all-layers",
    "plain-softmax-scale",
    "unscaled-embeddings",
    "weights-of-experts-as-they-are",
    "weights-of-experts-normalised",
    "unscaled-experts",
    "no-groups-of-experts",
)

Differences = dict[str, dict[str, float]]


def start_rank(rank: int, port: int, out: Path) -> subprocess.Popen[str]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in variables.items()}}
    environment["PYTHONPATH"] = os.pathsep.join([str(JOB.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["CUDA_VISIBLE_DEVICES"] = ""  # fp32 on CPU is the reference; a GPU's matmuls are not that exact
    return subprocess.Popen(
        [sys.executable, str(JOB), str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Differences:
    out = tmp_path_factory.mktemp("parity")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    ranks = [start_rank(rank, port, out) for rank in range(WORLD_SIZE)]
    try:
        errors = [rank.communicate(timeout=400)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, error in zip(ranks, errors, strict=True):
        assert rank.returncode == 0, error
    result: Differences = json.loads((out / "differences.json").read_text())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(differences: Differences, model: str, layout: str) -> None:
    assert differences[layout][model] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_transformers(differences: Differences, model: str, layout: str) -> None:
    assert differences[f"gradients-{layout}"][model] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", MOE_LAYOUTS)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_logits_of_experts_are_those_of_transformers(differences: Differences, model: str, layout: str) -> None:
    assert differences[f"moe-{layout}"][model] <= MOE_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", MOE_GRADIENT_LAYOUTS)
@pytest.mark.parametrize("model", MOE_MODELS)
def test_gradients_of_experts_are_those_of_transformers(differences: Differences, model: str, layout: str) -> None:
    assert differences[f"moe-gradients-{layout}"][model] <= GRADIENT_TOLERANCE


@pytest.mark.slow
def test_every_model_of_the_job_is_looked_at(differences: Differences) -> None:
    dense = {*LAYOUTS, *(f"gradients-{layout}" for layout in GRADIENT_LAYOUTS)}
    moe = {f"moe-{name}" for name in (*MOE_LAYOUTS, *(f"gradients-{layout}" for layout in MOE_GRADIENT_LAYOUTS))}
    assert set(differences) == {*dense, *moe, "sabotage"}
    assert all(set(differences[layout]) == set(MODELS) for layout in dense)
    assert all(set(differences[layout]) == set(MOE_MODELS) for layout in moe)
    assert set(differences["sabotage"]) == set(SABOTAGE)


@pytest.mark.slow
@pytest.mark.parametrize("change", SABOTAGE)
def test_a_wrong_setting_shows(differences: Differences, change: str) -> None:
    assert differences["sabotage"][change] > 100 * TOLERANCE
