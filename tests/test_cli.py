"""The commands that need no engine and no GPU, as a user calls them: what they do, and how they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.bridges.tiny_models import write_tiny_model

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120


def weightcast(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightcast", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_tiny_model("qwen3", root / "qwen3")
    return root


def test_plan_of_a_folder_and_of_a_configuration_alone(models: Path, tmp_path: Path) -> None:
    sizes = ("--tp", 2, "--pp", 2, "--cp", 2, "--world-size", 16)
    done = weightcast("plan", "qwen3", *sizes, "--json", tmp_path / "plan.json", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "Qwen3ForCausalLM: 47 tensors" in done.stdout and "on 16 ranks (4 distinct plans" in done.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert len(report["ranks"]) == 16 and not any(report["faults"].values())
    alone = weightcast("plan", "qwen3/config.json", *sizes, "--link-gbps", 400, cwd=models)
    assert alone.returncode == 0, alone.stderr
    assert "Qwen3ForCausalLM: 47 tensors" in alone.stdout and "at 400 Gbit/s a link" in alone.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "absent/x/y"), "absent/x/y is no folder; give a Hugging Face folder"),
        (("plan", "qwen3/tokenizer.json"), "as a configuration"),
        (("plan", "qwen3", "--tp", "3", "--world-size", "8"), "does not divide the world size 8"),
        (("plan", "qwen3", "--tp", "8"), "choose a tensor_model_parallel_size that divides it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_refused_in_one_message(arguments: tuple[str, ...], message: str, models: Path) -> None:
    done = weightcast(*arguments, cwd=models)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("weightcast: ") and message in last
    assert "Traceback" not in done.stderr
