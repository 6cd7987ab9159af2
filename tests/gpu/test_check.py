"""The program that a machine with a GPU is lent for works, as far as a CPU can show it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.table import CHECKS
from tests.ranks import ROOT

# What takes long is left to the long matrix; tests of the trainer and the bridges cover it on a CPU.
LONG = ("training", "checkpoint")
SHORT = tuple(check.name for check in CHECKS if check.name not in LONG)


def run_checks(out: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the records by name."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "gpu" / "check.py"),
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=500, check=False)
    assert out.exists(), done.stderr
    content = json.loads(out.read_text())
    assert content["machine"]["cores"] >= 1 and content["versions"]["torch"] and content["device"] == "cpu"
    return done.returncode, {record["name"]: record for record in content["checks"]}


@pytest.mark.slow
def test_every_short_check_passes_here(tmp_path: Path) -> None:
    status, records = run_checks(tmp_path / "out.json", "--jobs", "2", "--checks", ",".join(SHORT))
    assert status == 0 and tuple(records) == SHORT, records
    for check in CHECKS:
        if check.name in SHORT:
            record = records[check.name]
            assert record["passed"] is (None if check.needs_cuda else True), record
            assert record["error"] == check.lack("cpu") and bool(record["figures"]) is not bool(check.needs_cuda)


@pytest.mark.long
def test_the_others_pass_too(tmp_path: Path) -> None:
    status, records = run_checks(tmp_path / "out.json", "--checks", ",".join(LONG))
    assert status == 0 and [record["passed"] for record in records.values()] == [True, True], records


def test_a_check_that_fails_hangs_or_dies_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    program = (
        "import sys; from dataclasses import replace; from pathlib import Path; import tests.gpu.check as check\n"
        "check.CHECKS = [check.Check(name, f'../{name}', name, 3.0) for name in ('fails', 'hangs', 'dies', 'passes')]\n"
        "check.find_setting = lambda device: {}\n"
        "check.__file__ = __file__\n"
        "def fails(scale): raise ValueError('on purpose')\n"
        "def hangs(scale): __import__('time').sleep(60)\n"
        "def dies(scale): print('last words', flush=True); __import__('os')._exit(7)\n"
        "def passes(scale): return {'device': scale.device}\n"
        "check.find_function = lambda item: globals()[item.name]\n"
        "if __name__ == '__main__': sys.exit(check.main())\n"
    )
    path, out = tmp_path / "program.py", tmp_path / "out.json"
    path.write_text(program)
    command = [sys.executable, str(path), "--device", "cpu", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    records = {record["name"]: record for record in json.loads(out.read_text())["checks"]}
    assert [record["passed"] for record in records.values()] == [False, False, False, True]
    assert records["fails"]["error"].splitlines()[-1] == "ValueError: on purpose"
    assert "did not end within 3 s" in records["hangs"]["error"]
    assert "status 7" in records["dies"]["error"] and "last words" in records["dies"]["error"]
    assert records["passes"]["figures"] == {"device": "cpu"}


def test_make_gpu_check(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = f"--device cpu --quick --checks deltas --out {out}"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "gpu-check", f"GPU_PYTHON={sys.executable}", f"GPU_ARGS={words}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["passed"] for record in json.loads(out.read_text())["checks"]] == [True]


def test_an_unknown_check_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "check.py"), "--checks", "deltas,nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "nothing unknown; known are runtime" in done.stderr


def test_every_check_has_its_function() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, name = check.target.split(":")
        text = (ROOT / "tests" / "gpu" / f"{module}.py").read_text(encoding="utf-8")
        assert f"\ndef {name}(scale: Scale) -> dict[str, Any]:" in text and check.about
    assert sum(check.timeout_s for check in CHECKS if check.is_timed) < 480
