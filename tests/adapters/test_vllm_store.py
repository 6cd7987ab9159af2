"""A real vLLM server that follows a store of versions: its workers read it, the driver sees when they may load."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.adapters.conftest import Checkpoint
from tests.adapters.models import NUM_TOKENS, PROMPT, greedy_tokens
from tests.adapters.trainer_side import TensorSource, wait_until

from weightcast.adapters.engine import INITIAL_LABEL, version_label
from weightcast.adapters.vllm.server import VLLMServer
from weightcast.sync import DiskPublisher, FleetPolicy

pytestmark = [pytest.mark.vllm, pytest.mark.long]


@contextmanager
def driver(url: str, store: Path, key_file: Path) -> Iterator[None]:
    """The driver as a process of its own."""
    command = [sys.executable, "-m", "weightcast.adapters.vllm.driver", "--engine", url]
    command += ["--publisher", str(store), "--key-file", str(key_file)]
    with subprocess.Popen(command) as process:
        try:
            yield
            assert process.poll() is None, "the driver ended before it was told to"
        finally:
            process.terminate()
            assert process.wait(20) == 0


def test_vllm_follows_a_store(first: Checkpoint, second: Checkpoint, tmp_path: Path) -> None:
    store, key_file = tmp_path / "store", tmp_path / "key"
    key_file.write_bytes(os.urandom(32))
    key_file.chmod(0o600)
    key, settings = key_file.read_bytes(), {"publisher": str(store), "key_file": str(key_file)}
    expected = {"first": greedy_tokens(first.model), "second": greedy_tokens(second.model)}
    with (
        VLLMServer(
            first.folder,
            log_path=tmp_path / "log",
            dtype="float32",
            max_model_len=256,
            arguments=["--enforce-eager"],
            settings=settings,
        ) as server,
        driver(server.url, store, key_file),
    ):

        def serves(label: str, tokens: tuple[int, ...]) -> bool:
            return (
                server.client.weight_version() == label
                and server.client.complete(PROMPT, NUM_TOKENS).token_ids == tokens
            )

        # Without a policy: the engine comes to each version by itself.
        with DiskPublisher(TensorSource(second.tensors), store, key=key) as publisher:
            report = publisher.publish(1)
            wait_until(lambda: serves(version_label(report.version), expected["second"]), "version 1")
        # With one: the publish returns when worker and driver serve it.
        policy = FleetPolicy.all(minimum=1)
        with DiskPublisher(TensorSource(first.tensors), store, key=key, policy=policy, timeout_s=60) as publisher:
            publisher.wait_for_subscribers(1)
            wait_until(lambda: len(publisher.fleet()) == 2, "worker and driver")
            report = publisher.publish(2)
            assert serves(version_label(report.version), expected["first"])
            engines = {engine.engine: engine for engine in report.engines}
            assert {engine.state for engine in engines.values()} == {"serving"}
            assert engines["vllm"].num_bytes > 0 and engines["vllm/driver"].pause_s > 0
    # A driver and a server that start later take the newest version.
    with (
        VLLMServer(
            second.folder,
            log_path=tmp_path / "log2",
            dtype="float32",
            max_model_len=256,
            arguments=["--enforce-eager"],
            settings=settings,
        ) as server,
        driver(server.url, store, key_file),
    ):
        assert version_label(report.version) != INITIAL_LABEL
        wait_until(lambda: serves(version_label(report.version), expected["first"]), "the newest version")
