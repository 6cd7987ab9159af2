"""The examples that start a training on several nodes, each "node" a process of this machine.

torchrun and the trainer are the real ones. Slurm cannot run here: `scontrol` and `srun` stand in for its commands, and
do what the script relies on: the first lists the hosts of a job, the second starts a task a node with its
SLURM_NODEID and fails when one does; a signal goes to all processes of the tasks. NeMo-Run is asked for what it would
start (a dry run), where it is there.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.ranks import find_free_port

EXAMPLES = Path(__file__).parents[1] / "examples" / "launch"
TIMEOUT_S = 200
PROXY = ("recipe=qwen3_600m.pretrain", "proxy=true", "logger.events=events/run")
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames 127.0.0.[1,1]" ] && printf '127.0.0.1\\n127.0.0.1\\n'
"""
SRUN = """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!)
done
echo $$ >srun.pid
for task in "${tasks[@]}"; do wait "$task" || failed=1; done
exit ${failed:-0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with Slurm's commands in `bin`."""
    (tmp_path / "bin").mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This interpreter's torchrun and the folder's commands first on the path, and one process a node."""
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1", "PATH": os.pathsep.join(path), **more}


def losses(events: Path) -> list[float]:
    records = [json.loads(line) for line in events.read_text().splitlines()]
    return [record["loss"] for record in records if record.get("event") == "step"]


def torchrun_node(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    words = [*PROXY, "train.train_iters=2"]
    more = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [str(EXAMPLES / "torchrun_two_nodes.sh"), *words],
        cwd=folder,
        env=environment(folder, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_on_two_nodes(folder: Path) -> None:
    port = find_free_port()
    nodes = [torchrun_node(folder, rank, port) for rank in range(2)]
    try:
        said = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    first, second = (losses(folder / "events" / f"run.{rank}") for rank in range(2))
    assert first == second and len(first) == 2  # the loss of all ranks, which each of them knows


def test_torchrun_asks_for_what_is_not_given(folder: Path) -> None:
    given = {name: value for name, value in environment(folder).items() if name not in ("NODE_RANK", "MASTER_ADDR")}
    script = str(EXAMPLES / "torchrun_two_nodes.sh")
    done = subprocess.run([script], env=given, capture_output=True, text=True)
    assert done.returncode != 0 and "NODE_RANK: 0 on the machine that MASTER_ADDR names" in done.stderr
    done = subprocess.run([script], env=given | {"NODE_RANK": "0"}, capture_output=True, text=True)
    assert done.returncode != 0 and "MASTER_ADDR: a name or address" in done.stderr


@pytest.fixture
def slurm_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The batch script on two nodes, with a training that would take long."""
    job = {"SLURM_JOB_NODELIST": "127.0.0.[1,1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(secrets.randbelow(10_000))}
    words = [*PROXY, "train.train_iters=100000", "checkpoint.save=run", "checkpoint.save_interval=2"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / "slurm.sbatch"), *words],
            cwd=folder,
            env=environment(folder, **job),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_job_of_slurm_saves_when_its_time_runs_out(folder: Path, slurm_job: subprocess.Popen[str]) -> None:
    seen = [folder / "events" / f"run.{rank}" for rank in range(2)]
    deadline = time.monotonic() + TIMEOUT_S
    while not all(path.exists() and len(losses_so_far(path)) >= 3 for path in seen):
        assert slurm_job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
        time.sleep(0.2)
    # As Slurm does for --signal=USR1@300: to torchrun, to the ranks and to the helpers that write checkpoints.
    for process in psutil.Process(int((folder / "srun.pid").read_text())).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    assert slurm_job.wait(timeout=TIMEOUT_S) != 0  # the training is not complete
    first, second = map(losses, seen)
    assert first == second
    saved = int((folder / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == len(first), (folder / "log").read_text()[-4000:]


def losses_so_far(events: Path) -> list[str]:
    """Whole lines alone: the last one may be half there."""
    return [line for line in events.read_text().split("\n")[:-1] if json.loads(line).get("event") == "step"]


def nemo_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example with a home of its own; NEMO_RUN_FOLDER is where `pip install --target` put nemo_run, if at all."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), os.environ.get("NEMO_RUN_FOLDER")]))
    more = {"NEMORUN_HOME": str(folder / "home"), "PYTHONPATH": path, "COLUMNS": "300"}
    command = [sys.executable, str(EXAMPLES / "nemo_run_launch.py"), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.fixture
def nemo_folder(folder: Path) -> Path:
    """`folder`, where NeMo-Run can be imported."""
    done = nemo_run(folder, "--help")
    if "No module named 'nemo_run'" in done.stderr:
        pytest.skip("nemo_run is not installed (pip install nemo_run, or NEMO_RUN_FOLDER)")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_nemo_run_starts_what_the_example_says(nemo_folder: Path) -> None:
    local = nemo_run(nemo_folder, "--dryrun", "--nproc", "2", *PROXY, "train.train_iters=2")
    assert local.returncode == 0, local.stderr
    said = " ".join(local.stdout.split())
    assert "'--nnodes', '1', '--nproc-per-node', '2'" in said
    assert "'-m', 'weightcast.trainer.pretrain', 'recipe=qwen3_600m.pretrain', 'proxy=true'" in said

    slurm = ("--slurm-account", "mine", "--slurm-partition", "gpu", "--nodes", "4", "--nproc", "8")
    words = ("recipe=llama3_70b.pretrain", "checkpoint.save=/shared/my run")
    done = nemo_run(nemo_folder, "--dryrun", *slurm, *words)
    assert done.returncode == 0, done.stderr
    (script,) = (nemo_folder / "home").rglob("train_sbatch.sh")
    text = script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for setting in ("account=mine", "partition=gpu", "nodes=4", "ntasks-per-node=1", "gpus-per-node=8"):
        assert f"#SBATCH --{setting}\n" in text
    assert "#SBATCH --signal=USR1@300\n" in text and "export PET_SHUTDOWN_TIMEOUT=280\n" in text
    assert "--nnodes 4 --nproc-per-node 8 " in text
    assert "-m weightcast.trainer.pretrain recipe=llama3_70b.pretrain 'checkpoint.save=/shared/my run'" in text

    mistaken = nemo_run(nemo_folder, "--dryrun", *slurm, *words, "train.trainiters=3")
    assert mistaken.returncode != 0 and "did you mean 'train.train_iters'" in mistaken.stderr
