"""The benchmark program's cases of one GPU, as it runs them itself."""

import json
import subprocess
import sys
from typing import Any

from tests.gpu.table import Scale, require

BENCH = "tests/benchmarks/bench.py"


def check_bench(scale: Scale) -> dict[str, Any]:
    """`bench.py --gpu --quick`: no case fails, and only what lacks a package is not run."""
    from tests.gpu.check import ROOT

    out = scale.folder / "bench"
    command = [sys.executable, BENCH, "--gpu", "--quick", "--rounds", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = out / "results" / "gpu.json"
    require(results.exists(), f"no results: {done.stdout[-1500:]} {done.stderr[-1500:]}")
    records = json.loads(results.read_text())["records"]
    figures = {
        record["case"]: {key: record[key] for key in ("status", "value", "baseline_value", "unit", "note")}
        for record in records
    }
    failed = [name for name, record in figures.items() if record["status"] == "failed"]
    require(not failed and bool(figures), f"failed are {failed}: {figures}")
    return figures
