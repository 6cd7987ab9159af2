"""Processes are watched, and ended with all that they started; real ones, of a few lines."""

import io
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from weightcast.adapters.demo.events import EventReader, VersionRow
from weightcast.adapters.demo.job import Watch
from weightcast.adapters.demo.live import LiveTable
from weightcast.adapters.demo.processes import Processes, describe_end, describe_exit, find_free_port
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, PeerLost

SLEEP = "import time; time.sleep(600)"
# A parent that started a child of its own, and tells its number.
FAMILY = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print(child.pid, flush=True)
child.wait()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_text(path: Path, timeout_s: float = 20.0) -> str:
    deadline_s = time.monotonic() + timeout_s
    while not path.read_text():
        assert time.monotonic() < deadline_s, f"{path} stayed empty"
        time.sleep(0.02)
    return path.read_text()


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> None:
    """A killed process is gone a moment later; one that nobody waits for stays as a zombie."""
    deadline_s = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s, f"process {pid} is still running"
        time.sleep(0.05)


def test_leaving_ends_children_and_grandchildren(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("family", python(FAMILY))
        grandchild = int(wait_for_text(child.log))
        assert psutil.pid_exists(grandchild)
        processes.check()
    assert not child.is_running()
    wait_until_gone(grandchild)


def test_an_error_ends_them_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path) as processes:
        child = processes.start("sleeper", python(SLEEP))
        raise KeyboardInterrupt
    assert not child.is_running()


def test_a_dead_child_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("trainer", python("print('step 1'); raise SystemExit('out of text')"))
        child.popen.wait()
        with pytest.raises(PeerLost, match=r"(?s)trainer ended with exit code 1.*trainer\.log.*out of text"):
            processes.check()


def test_a_child_that_may_end_must_end_well(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        good, bad = processes.start("good", python("")), processes.start("bad", python("raise SystemExit(3)"))
        good.popen.wait()
        bad.popen.wait()
        with pytest.raises(PeerLost, match="bad ended with exit code 3"):
            processes.check(may_end=good)
        with pytest.raises(PeerLost, match="good ended with exit code 0"):
            processes.check(may_end=bad)


def test_the_cause_is_found_in_a_log_of_torchrun() -> None:
    report = ["E11 .../torch/distributed/elastic/multiprocessing/api.py:1002] failed", *(["noise"] * 40)]
    log = Path("x.log")
    assert describe_end(["step 1", "error: no text", *report], log) == ": no text (log: x.log)"
    assert (
        describe_end(["step 1", "RuntimeError: odd", *report], log) == "; x.log ends with:\nstep 1\nRuntimeError: odd"
    )
    assert describe_end(["line"] * 100, log).count("line") == 25


def test_exits_are_named() -> None:
    assert [describe_exit(2), describe_exit(-9)] == ["exit code 2", "signal SIGKILL"]


def test_free_ports_are_loopback_ports() -> None:
    assert 1024 < find_free_port() < 65536


def plain_table() -> tuple[LiveTable, io.StringIO]:
    output = io.StringIO()
    return LiveTable(Console(file=output, force_terminal=False, width=200)), output


VERSION_LINE = (
    '{"process": "trainer-0", "event": "version", "version": 1, "step": 1, "loss": 7.5, "num_bytes": 1000, '
    '"stage_s": 0.5, "pause_ms": 2, "checksums_checked": 9, "engines": [{"state": "serving"}]}\n'
)


def test_events_are_read_line_by_line_while_they_are_written(tmp_path: Path) -> None:
    reader = EventReader(tmp_path)
    assert reader.read_new() == []
    with (tmp_path / "trainer.jsonl.0").open("w") as file:
        file.write(VERSION_LINE + VERSION_LINE[:30])
        file.flush()
        (first,) = reader.read_new()
        assert isinstance(first, VersionRow) and first.loss == 7.5
        assert reader.read_new() == []
        file.write(VERSION_LINE[30:])
        file.flush()
        assert reader.read_new() == [first]


def test_a_line_that_is_no_event_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"phase": "step", "process": "trainer-0"}\n')
    with pytest.raises(ConfigError, match="no event"):
        EventReader(tmp_path).read_new()


def test_a_refusal_of_the_engine_ends_the_run(tmp_path: Path) -> None:
    line = (
        '{"process": "engine", "phase": "refused", "version": 2, "start_s": 1, "end_s": 1, "reason": "other model"}\n'
    )
    (tmp_path / "engine.jsonl").write_text(line)
    table, _ = plain_table()
    with Processes(tmp_path) as processes, pytest.raises(EngineError, match="engine refused version 2: other model"):
        Watch(processes, table, EventReader(tmp_path)).look()


def test_waiting_has_a_deadline(tmp_path: Path) -> None:
    table, _ = plain_table()
    with Processes(tmp_path) as processes, pytest.raises(DeadlineExceeded, match="the engine was not ready within 0 s"):
        Watch(processes, table, EventReader(tmp_path)).wait_until(lambda: False, "the engine", 0.2)


def test_the_table_is_plain_lines_away_from_a_terminal() -> None:
    table, output = plain_table()
    row = VersionRow(1, 1, 7.5, 1000, 0.5, 2.0, 9, True)
    with table:
        table.say("starting")
        table.say("only for eyes", passing=True)
        table.add(row)
        table.add(row)
    text = output.getvalue()
    assert text.count("checksums checked") == 1 and text.count("7.5000") == 2
    assert "starting" in text and "only for eyes" not in text and "\x1b" not in text


def test_the_table_is_drawn_on_a_terminal() -> None:
    output = io.StringIO()
    with LiveTable(Console(file=output, force_terminal=True, width=200)) as table:
        table.say("training")
        table.add(VersionRow(1, 1, 7.5, 1000, 0.5, 2.0, 9, False))
    text = output.getvalue()
    assert "training" in text and "7.5000" in text and "NO" in text


def test_children_see_no_terminal(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("reader", python("import sys; print(repr(sys.stdin.read()))"))
        child.popen.wait()
        assert child.log.read_text() == "''\n"
        assert child.popen.pid != os.getpgid(0)
