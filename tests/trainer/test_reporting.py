"""A trainer tells of its publishes: a log line, a file of reports, Prometheus; real publisher, subscriber and HTTP."""

import logging
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

import weightcast.bridges  # noqa: F401  (first: it quietens Megatron's import-time notices)
from weightcast.sync import ModuleSource, WeightSubscriber
from weightcast.sync.errors import AddressError
from weightcast.sync.report_log import read_reports
from weightcast.trainer.config import PublishConfig
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport
from weightcast.trainer.plain_log import lines_on_stderr
from weightcast.trainer.publishing import StepPublisher

WAIT_S = 30.0


def follow(address: str, count: int) -> None:
    with WeightSubscriber(address, engine="engine-0") as subscriber:
        for _ in range(count):
            subscriber.wait(timeout_s=WAIT_S).commit(pause_s=0.01)


def test_a_script_without_logging_sees_lines_and_one_with_it_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, line = logging.getLogger("weightcast"), logging.getLogger("weightcast.trainer.step_log")
    with lines_on_stderr():  # pytest handles all lines
        line.info("step 1")
    assert "step 1" not in capsys.readouterr().err
    monkeypatch.setattr(package, "propagate", False)
    with lines_on_stderr():
        line.info("step 2")
    line.info("step 3")
    assert "weightcast.trainer.step_log step 2" in (seen := capsys.readouterr().err) and "step 3" not in seen
    assert (package.handlers, package.level) == ([], logging.NOTSET)


def make_step(number: int) -> StepReport:
    return StepReport(step=number, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.1)


def test_every_version_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, address = tmp_path / "reports.jsonl", f"ipc://{tmp_path}/weights"
    publish = PublishConfig(to=address, wait_for=1, timeout_s=WAIT_S, report_log=str(path), metrics_port=0)
    engine = threading.Thread(target=follow, args=(address, 2))
    engine.start()
    caplog.set_level(logging.INFO, "weightcast.trainer")
    events = EventLog(None, rank=0)
    with StepPublisher(ModuleSource(torch.nn.Linear(64, 64)), publish, events) as publisher:
        for number in (1, 2):
            publisher.after_step(make_step(number))
        (where,) = (line for line in caplog.messages if line.startswith("metrics at http://127.0.0.1:"))
        with urllib.request.urlopen(where.removeprefix("metrics at "), timeout=10) as answer:
            page = answer.read().decode()
    engine.join(WAIT_S)
    assert not engine.is_alive()
    assert "weightcast_sync_published_version 2.0" in page and "weightcast_sync_publishes_total 2.0" in page
    reports = list(read_reports(path))
    assert [report.version.number for report in reports] == [1, 2]
    assert [report.serving for report in reports] == [("engine-0",)] * 2
    lines = [line for line in caplog.messages if line.startswith("version ")]
    assert [line.split()[1] for line in lines] == ["1:", "2:"]
    assert all("to 1 engine" in line and "step held up for" in line for line in lines)
    with pytest.raises(OSError):  # closed with the publisher
        urllib.request.urlopen(where.removeprefix("metrics at "), timeout=10)


def test_a_port_that_is_taken_is_refused_before_engines_are_waited_for(tmp_path: Path) -> None:
    publish = PublishConfig(to=f"ipc://{tmp_path}/weights", wait_for=1, metrics_port=0, metrics_host="192.0.2.1")
    with pytest.raises(AddressError, match=r"cannot answer Prometheus at 192\.0\.2\.1:0"):
        StepPublisher(ModuleSource(torch.nn.Linear(4, 4)), publish, EventLog(None, rank=0))
