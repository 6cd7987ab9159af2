"""The two examples, run as their docstrings say, against each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightcast.adapters.demo.embedded_model import make_embedded_model
from weightcast.adapters.demo.processes import find_free_port

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_push_and_receive(tmp_path: Path) -> None:
    model = make_embedded_model(tmp_path / "model")
    address = f"tcp://127.0.0.1:{find_free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(find_free_port())]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / "receive.py"), address], env=env, stdout=subprocess.PIPE, text=True
    ) as receiver:
        try:
            command = [*torchrun, str(EXAMPLES / "push_to_engine.py"), str(model), address]
            pushed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
            received, _ = receiver.communicate(timeout=60)
        finally:
            receiver.kill()
    assert pushed.returncode == 0, pushed.stderr[-4000:]
    assert "version 1: 7345664 bytes" in pushed.stdout
    assert receiver.returncode == 0
    assert "model.layers.3.mlp.down_proj.weight (256, 768) bfloat16" in received
    assert received.splitlines()[-1] == "serving version 1: 46 tensors"
