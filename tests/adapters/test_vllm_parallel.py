"""A real vLLM server with two tensor-parallel workers: each is a receiver of its own, and both must hold a version."""

import json
import threading
from pathlib import Path

import pytest
from tests.adapters.conftest import Checkpoint, free_port
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import TensorSource, wait_until

from weightcast.adapters.vllm.driver import drive
from weightcast.adapters.vllm.server import VLLMServer
from weightcast.sync import WeightPublisher


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "slices"),
    [("on", "auto"), *(pytest.param(*case, marks=pytest.mark.long) for case in (("off", "auto"), ("on", "on")))],
)
def test_every_worker_receives_and_the_version_is_one(
    share: str, slices: str, first: Checkpoint, second: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # two workers on one NUMA node must be bound by hand
    address, stop = f"tcp://127.0.0.1:{free_port()}", threading.Event()
    server = VLLMServer(
        first.folder,
        log_path=tmp_path / "log",
        dtype="float32",
        max_model_len=256,
        arguments=["--enforce-eager", "--tensor-parallel-size", "2"],
        settings={"events": str(tmp_path / "events.jsonl"), "share": share, "slices": slices},
    )
    source = TensorSource(second.tensors)
    with server, WeightPublisher(source, address, timeout_s=60, chunk_bytes=4096) as publisher:
        assert server.client.complete(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(first.model)
        driver = threading.Thread(target=drive, args=(server.url, address, stop))
        driver.start()
        try:
            wait_until(lambda: len(publisher.fleet()) == 3, "two workers and the driver")
            reports = {engine.engine: engine for engine in publisher.publish(version=1).engines}
            assert server.client.complete(PROMPT, NUM_TOKENS).token_ids == greedy_tokens(second.model)
        finally:
            stop.set()
            driver.join(20)
    assert {name: report.state for name, report in reports.items()} == {
        "vllm/0": "serving",
        "vllm/1": "serving",
        "vllm/driver": "serving",
    }
    workers = [reports["vllm/0"], reports["vllm/1"]]
    if share == "on":
        assert {worker.transport for worker in workers} == {"shared_memory", "host"}, "received once, read by both"
        assert sorted(worker.num_bytes for worker in workers) == [0, publisher.num_bytes]
    else:
        assert {worker.transport for worker in workers} == {"shared_memory"}
        shares = [worker.num_bytes / publisher.num_bytes for worker in workers]
        assert all(0.5 < share < 0.75 for share in shares), f"each received its slices: {shares}"
    phases = [json.loads(line)["phase"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sorted(phases) == ["prepare", "prepare", "stage", "stage", "swap", "swap"]
