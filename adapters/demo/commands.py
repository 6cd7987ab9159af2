"""The command lines of a demo's processes: pure functions from settings to arguments and environment.

command = trainer_command(settings)
command = engine_command("vllm", folder, port=8000, publisher="tcp://127.0.0.1:5600", events=Path("events.jsonl"))
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
MAX_MODEL_LEN = 512
SEQ_LENGTH = 128
GLOBAL_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Command:
    """Arguments, and what is added to the environment."""

    arguments: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What the trainer of a demo is told."""

    model: Path
    data: Path | None  # None takes the trainer's default, Python's standard library
    steps: int
    tensor_parallel: int
    learning_rate: float
    publisher: str
    export: Path
    events: Path
    master_port: int


def trainer_command(settings: TrainerSettings) -> Command:
    """torchrun with one rank a tensor-parallel share, publishing after every step."""
    overrides = {
        "model.hf_path": str(settings.model),
        "model.tensor_model_parallel_size": settings.tensor_parallel,
        "train.train_iters": settings.steps,
        "train.global_batch_size": GLOBAL_BATCH_SIZE,
        "train.micro_batch_size": GLOBAL_BATCH_SIZE // 2,
        "dataset.seq_length": SEQ_LENGTH,
        "optimizer.lr": settings.learning_rate,
        "optimizer.min_lr": settings.learning_rate,
        "scheduler.lr_decay_style": "constant",
        "publish.to": settings.publisher,
        "publish.every": 1,
        "publish.wait_for": 1,
        "checkpoint.export_hf": str(settings.export),
        "publish.report_log": str(settings.events.with_name("reports.jsonl")),
        "logger.events": str(settings.events),
    }
    if settings.data is not None:
        overrides["dataset.files"] = json.dumps([str(settings.data)])
    torchrun = (
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(settings.tensor_parallel)),
        *("--master-addr", HOST, "--master-port", str(settings.master_port)),
        *("-m", "weightcast.trainer.pretrain"),
    )
    arguments = (*torchrun, *(f"{key}={value}" for key, value in overrides.items()))
    # A BLAS thread pool in every rank would fight the other ranks and the engine for the same cores.
    return Command(arguments, (("OMP_NUM_THREADS", "1"),))


def engine_command(
    engine: str, model: Path, *, port: int, publisher: str | None = None, events: Path | None = None
) -> Command:
    """A server on `model`; with a `publisher` it takes versions and writes its phases to `events`."""
    return (_vllm_command if engine == "vllm" else _transformers_command)(model, port, publisher, events)


def _transformers_command(model: Path, port: int, publisher: str | None, events: Path | None) -> Command:
    arguments = [sys.executable, "-m", "weightcast.adapters.transformers.server"]
    arguments += ["--model", str(model), "--host", HOST, "--port", str(port)]
    if publisher is not None:
        arguments += ["--publisher", publisher]
    if events is not None:
        arguments += ["--events", str(events)]
    return Command(tuple(arguments))


def _vllm_command(model: Path, port: int, publisher: str | None, events: Path | None) -> Command:
    from weightcast.adapters.vllm.server import server_command, server_environment

    # Eager, because compiling would take longer than all the requests of a demo.
    flags = ["--dtype", "auto", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"]
    # A GPU is shared with the trainer, and with the first engine while it ends; on a CPU the flag has no meaning.
    flags += ["--gpu-memory-utilization", "0.3"]
    settings = {"publisher": publisher, "events": None if events is None else str(events)}
    given = {key: value for key, value in settings.items() if value is not None}
    if given:
        flags += ["--additional-config", json.dumps({"weightcast": given})]
    command = server_command(str(model), f"http://{HOST}:{port}", flags)
    return Command(tuple(command), tuple(server_environment().items()))


def driver_command(engine_url: str, publisher: str, events: Path) -> Command:
    """The process that drives released versions into a vLLM server."""
    module = "weightcast.adapters.vllm.driver"
    flags = ("--engine", engine_url, "--publisher", publisher, "--events", str(events))
    return Command((sys.executable, "-m", module, *flags))
