"""The checks that a machine with a GPU is lent for: one command, one JSON, every answer that it can give.

    python tests/gpu/check.py                              all of them on the first GPU, under eight minutes
    python tests/gpu/check.py --device cpu --quick         the same program where there is none
    python tests/gpu/check.py --checks deltas,fp8 --out out/gpu-check.json

Each check (`table.py`) runs in a process of its own with a deadline; one that fails, hangs or kills its process is
recorded and the next one goes on. The file is written after each, so that a run that is cut short keeps what it has:
machine, versions, and for each check its name, whether it passed (null: not run, and why), seconds, figures, and the
end of the traceback. The exit status is 1 when one failed.

It needs no network, no vLLM, no pytest and no installation: Python 3.11 or newer with torch, transformers, safetensors,
numpy, xxhash, typer, rich, hypothesis and PyYAML, and the wheels that `README.md` beside this file says how to carry.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests" / "benchmarks")]
sys.path[:0] = [path for path in PATHS if path not in sys.path]

from tests.gpu.table import CHECKS, Check, Scale, find_function  # noqa: E402  the paths come first

LIMIT_S = 450.0
ERROR_LINES = 25


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a check. `passed` is None for one that was not run; `error` then says why."""

    name: str
    about: str
    passed: bool | None
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: to try the program")
    parser.add_argument("--checks", default="", help="names, separated by commas; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-check.json", help="the JSON file")
    jobs = max(1, min(4, (os.cpu_count() or 1) // 4))
    parser.add_argument("--jobs", type=int, default=jobs, help="checks at a time, of those that measure nothing")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for all of them")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = [name for name in options.checks.split(",") if name]
    if unknown := sorted(set(wanted) - {check.name for check in CHECKS}):
        parser.error(f"--checks {', '.join(unknown)} unknown; known are {', '.join(check.name for check in CHECKS)}")
    options.chosen = [check for check in CHECKS if not wanted or check.name in wanted]
    return options


def environment(device: str) -> dict[str, str]:
    """Of a check's process. A check that asks for the CPU sees no GPU, whatever the machine has."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])}
    env |= {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    # Sums in one order, so that a resumed run can be compared bit by bit; cuBLAS reads it when it is loaded.
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return env if device == "cuda" else env | {"CUDA_VISIBLE_DEVICES": ""}


def run_check(check: Check, options: argparse.Namespace, end_s: float) -> Outcome:
    """In a process of its own, within its deadline and what is left for all of them."""
    if lack := check.lack(options.device):
        return Outcome(check.name, check.about, None, error=lack)
    left_s = min(check.timeout_s, end_s - time.monotonic())
    if left_s <= 0:
        return Outcome(check.name, check.about, False, error=f"no time was left of --limit-s {options.limit_s:g}")
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, str(Path(__file__)), "--run", check.name, "--device", options.device]
        command += ["--out", str(answer), *(["--quick"] if options.quick else [])]
        with (Path(folder) / "log").open("w+") as log:
            error = _wait(command, options.device, folder, log, left_s)
            seconds = time.monotonic() - start_s
            if answer.exists():
                said = json.loads(answer.read_text())
                return Outcome(check.name, check.about, said["passed"], seconds, said["figures"], said["error"])
            log.seek(0)
            lines = log.read().splitlines()[-ERROR_LINES:]
    return Outcome(check.name, check.about, False, seconds, error="\n".join([error, *lines]))


def _wait(command: list[str], device: str, folder: str, log: Any, left_s: float) -> str:
    """Run the process to its end; what is wrong with that end, if anything. All that it started ends with it."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment(device), stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = process.wait(left_s)
        return "" if code == 0 else f"its process ended with status {code}"
    except subprocess.TimeoutExpired:
        return f"it did not end within {left_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def run_here(check: Check, options: argparse.Namespace) -> None:
    """The child's side: run the function, and write what it found."""
    folder = options.out.parent
    said: dict[str, Any] = {"passed": True, "figures": {}, "error": ""}
    try:
        function: Callable[[Scale], Mapping[str, Any]] = find_function(check)
        said["figures"] = dict(function(Scale(options.device, options.quick, folder)))
    except BaseException:
        lines = traceback.format_exc().splitlines()[-ERROR_LINES:]
        said |= {"passed": False, "error": "\n".join(lines)}
    draft = options.out.with_suffix(".draft")
    draft.write_text(json.dumps(said))
    draft.replace(options.out)


def describe_setting() -> dict[str, Any]:
    """Machine, versions, and which compiled loops were found; in a child, so that no GPU is opened here."""
    import torch
    from machine import describe_machine, describe_versions

    from weightcast.sync import delta_kernel, digest_kernel

    versions: dict[str, Any] = dict(describe_versions())
    for name in ("megatron-core", "msgpack"):
        versions[name] = _version(name)
    cuda = {"cuda": torch.version.cuda, "nccl": None}
    if torch.cuda.is_available():
        cuda["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    kernels = {"delta": delta_kernel.is_available(), "digest": list(digest_kernel.available_levels())}
    return {"machine": describe_machine(), "versions": versions | cuda, "kernels": kernels}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def find_setting(device: str) -> dict[str, Any]:
    """`describe_setting` of a process as the checks have it."""
    code = "import json, sys; from tests.gpu.check import describe_setting; json.dump(describe_setting(), sys.stdout)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(device), capture_output=True, text=True, timeout=120, check=False
    )
    if found.returncode:
        return {"error": "\n".join(found.stderr.splitlines()[-ERROR_LINES:])}
    setting: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return setting


def run_all(options: argparse.Namespace) -> list[Outcome]:
    """Those that measure nothing several at a time, then the others one by one; written after each."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + options.limit_s
    report: dict[str, Any] = {
        "device": options.device,
        "quick": options.quick,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **find_setting(options.device),
    }
    found: dict[str, Outcome] = {}
    lock = threading.Lock()

    def run(check: Check) -> None:
        outcome = run_check(check, options, end_s)
        with lock:
            found[check.name] = outcome
            tell(outcome)

    def tell(outcome: Outcome) -> None:
        word = {True: "passed", False: "FAILED", None: "not run"}[outcome.passed]
        print(f"{outcome.name}: {word} ({outcome.seconds:.1f} s) {json.dumps(outcome.figures)}", flush=True)
        if outcome.error:
            print(outcome.error, flush=True)
        ordered = [found[other.name] for other in options.chosen if other.name in found]
        options.out.write_text(json.dumps(report | {"checks": [asdict(item) for item in ordered]}, indent=1) + "\n")

    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        list(pool.map(run, [check for check in options.chosen if not check.is_timed]))
    for check in options.chosen:
        if check.is_timed:
            run(check)
    return [found[check.name] for check in options.chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    options = parse(arguments)
    if options.run:
        run_here(next(check for check in CHECKS if check.name == options.run), options)
        return 0
    outcomes = run_all(options)
    count = {state: sum(outcome.passed is state for outcome in outcomes) for state in (True, False, None)}
    print(f"{count[True]} passed, {count[False]} failed, {count[None]} not run: {options.out}")
    return 1 if count[False] else 0


if __name__ == "__main__":
    sys.exit(main())
