"""The main job, end to end, as a newcomer starts it: real trainer ranks, real engines, and the report they leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.sync.trace_format import check_trace

from weightcast.adapters.demo.embedded_model import make_embedded_model, standard_library_files

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMEOUT_S = 400


def make_demo(*variables: str) -> subprocess.CompletedProcess[str]:
    """`make demo` with this interpreter's environment as its `.venv`, taken as set up."""
    venv = Path(sys.prefix)
    ready = [f"--assume-old={venv}/{stamp}" for stamp in (".installed-base", ".installed-vllm")]
    command = ["make", "demo", *ready, f"VENV={venv}", *variables]
    return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT_S)


def check_report(out: Path, steps: int) -> str:
    """What every report of a run that went well must say; the page."""
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Proved: at version" in page and "DIFFERS" not in page
    table = page[page.index('<table class="versions">') : page.index("</table>")]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)][1:]
    assert [row[:2] for row in rows] == [[str(step), str(step)] for step in range(1, steps + 1)]
    num_bytes = sum(tensor.nbytes for tensor in load_file(out / "export" / "model.safetensors").values())
    for _, _, loss, served, sent, stage_s, pause_ms, checksums in rows:
        assert served == "yes" and 0 < float(loss) < 20
        assert int(sent.replace(",", "")) == num_bytes
        assert float(stage_s) > 0 and float(pause_ms) > 0 and int(checksums.replace(",", "")) > 0
    titles = re.findall(r"<title>([\w.-]+) · ([\w.]+) · version (\d+)", page)
    for version in map(str, range(1, steps + 1)):
        for lane, phase in (("trainer-0", "forward_backward"), ("trainer-0", "publish.stage"), ("engine", "stage")):
            assert (lane, phase, version) in titles
    return page


def check_drawn_trace(folder: Path, steps: int) -> None:
    """`weightcast trace` on the events of the demo in `out/demo`: the reports and all processes' logs, as one."""
    command = [sys.executable, "-m", "weightcast", "trace", "out/demo/events", "--out", "trace.json"]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert f"{steps} versions, {steps} reports" in done.stdout
    events = check_trace(json.loads((folder / "trace.json").read_text()))
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"trainer-0", "trainer-1", "fleet", "engine"}  # the report's spans are those of the logs
    # From this rank's packing to the engine's staging, and on to its loading, for every version.
    assert [event["ph"] for event in events if event["ph"] in "stf"] == ["s", "t", "f"] * steps
    assert sum(event["name"] == "received bytes" for event in events) == steps


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    out = tmp_path / "out" / "demo"
    done = make_demo("STEPS=3", f"OUT={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checksums checked" in done.stdout and "Proved: the engine at version 3" in done.stdout
    page = check_report(out, steps=3)
    assert "trainer-1" in page and "the embedded Qwen3" in page
    before, after = (load_file(out / name / "model.safetensors") for name in ("model", "export"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    check_drawn_trace(tmp_path, steps=3)


@pytest.mark.slow
@pytest.mark.vllm
def test_make_demo_with_vllm(tmp_path: Path) -> None:
    done = make_demo("ENGINE=vllm", "STEPS=3", f"OUT={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    page = check_report(tmp_path / "out", steps=3)
    assert "driver · pause · version 3" in page and "vllm" in page


@pytest.mark.slow
def test_demo_with_ones_own_model_and_text(tmp_path: Path) -> None:
    model = make_embedded_model(tmp_path / "mine")
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in standard_library_files(max_bytes=200_000)))
    done = make_demo(f"MODEL={model}", f"DATA={text}", "STEPS=1", "TP=1", f"OUT={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    page = check_report(tmp_path / "out", steps=1)
    assert str(model) in page and str(text) in page and "trainer-1" not in page


def run_demo_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "weightcast", "demo", "--steps", "1", *arguments]


@pytest.mark.slow
def test_a_trainer_that_dies_is_reported_and_the_engine_ended(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too little to fill one sample.")
    out = tmp_path / "out"
    command = run_demo_command("--data", str(text), "--out", str(out))
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("weightcast: trainer ended with exit code 1: the text has") and "trainer.log" in line
    assert processes_of(out) == []


@pytest.mark.slow
def test_sigterm_ends_everything(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(run_demo_command("--out", str(out)), env=ENV, stdout=subprocess.DEVNULL) as demo:
        wait_for(lambda: (out / "logs" / "trainer.log").exists())
        assert processes_of(out) != []
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: processes_of(out) == [])


def wait_for(happened: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def processes_of(out: Path) -> list[str]:
    """The command lines of living processes that were started for this output folder, this one's aside."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        is_child = "weightcast.trainer" in line or "weightcast.adapters" in line
        if str(out) in line and is_child and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found
