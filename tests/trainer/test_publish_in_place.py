"""`publish.expose` and `publish.in_place`: an engine of the same host reads a step's version, packed or where it lies.

The GPU is a stand-in whose device is host memory.
"""

from pathlib import Path

import pytest
import torch
from tests.sync.host_driver import HostDriver
from tests.sync.parts import PATIENT, WAIT_S, Engine, assert_same_bits, running

from weightcast.sync import ModuleSource
from weightcast.sync.report_log import read_reports
from weightcast.sync.transports import cuda_ipc
from weightcast.trainer.config import PublishConfig
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport
from weightcast.trainer.publishing import StepPublisher


@pytest.mark.parametrize("kind", ["cuda_ipc", "shared_memory"])
@pytest.mark.parametrize("in_place", [False, True], ids=["packed", "in-place"])
def test_engines_read_a_steps_version_out_of_the_trainers_memory(
    kind: str, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Linear(64, 48)
    if kind == "cuda_ipc":
        driver = HostDriver()
        monkeypatch.setattr(cuda_ipc, "find_driver", lambda: driver)
        for name, moved in driver.move_in(dict(module.named_parameters())).items():
            getattr(module, name).data = moved
    address, log = f"ipc://{tmp_path}/weights", tmp_path / "reports.jsonl"
    publish = PublishConfig(to=address, wait_for=1, timeout_s=WAIT_S, expose=[kind], delta="off", in_place=in_place)
    publish.report_log = str(log)
    device = "cpu" if kind == "cuda_ipc" else None
    engine = Engine("engine", address, kwargs={"device": device, "transport": kind}, limits=PATIENT)
    with running(engine), StepPublisher(ModuleSource(module), publish, EventLog(None, rank=0)) as publisher:
        for number in (1, 2):
            with torch.no_grad():
                module.weight.mul_(-1)
            publisher.after_step(StepReport(step=number, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.1))
            assert_same_bits(engine.tensors, {name: p.detach() for name, p in module.named_parameters()})
            assert engine.numbers[-1] == number and not engine.errors
    for report in read_reports(log):
        assert [line.transport for line in report.engines] == [kind]
        assert ("hold" in report.phases_s) == in_place
