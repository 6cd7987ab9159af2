"""The table of checks, and what each is given. Pure: nothing here imports torch."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckFailed(Exception):
    """What was found is not what must be; the message has both."""


def require(is_right: bool, message: str) -> None:
    """`CheckFailed` unless it is right."""
    if not is_right:
        raise CheckFailed(message)


@dataclass(frozen=True, slots=True)
class Scale:
    """Where a check runs, how large, and a folder of its own."""

    device: str
    is_quick: bool
    folder: Path

    def pick(self, quick: int, full: int) -> int:
        """A size."""
        return quick if self.is_quick else full


@dataclass(frozen=True, slots=True)
class Check:
    """A function (`module:name` beside this file) that takes a `Scale`, returns figures, and raises when it fails."""

    name: str
    target: str
    about: str
    timeout_s: float = 60.0
    is_timed: bool = False
    """Whether it measures: then nothing else runs meanwhile."""
    needs_cuda: str = ""
    """Why it cannot run on a CPU; empty where it can."""

    def lack(self, device: str) -> str:
        """Why it is not run on `device`; empty when it is."""
        return f"needs a CUDA GPU: {self.needs_cuda}" if device == "cpu" and self.needs_cuda else ""


CHECKS: tuple[Check, ...] = (
    Check("runtime", "models:check_runtime", "the CPU runtime leaves torch and Megatron alone where CUDA is present"),
    Check(
        "parity",
        "models:check_parity",
        "built, imported and run in fp32 without TF32: the logits of transformers, and the same bits out as in",
        timeout_s=120,
    ),
    Check(
        "training",
        "training:check_training",
        "three steps in bf16, each published to engines in other processes over zmq and shared memory: equal bits",
        timeout_s=120,
    ),
    Check("checkpoint", "training:check_checkpoint", "saved and resumed in another process, to the last bit", 120),
    Check("deltas", "codecs:check_deltas", "made and applied on the device: the CPU codec's bytes, in every dtype"),
    Check("digests", "codecs:check_digests", "taken on the device: the digests that a CPU takes"),
    Check("fp8", "codecs:check_fp8", "FP8 made on the device: the codes and scales that a CPU makes, of both kinds"),
    Check(
        "passes",
        "passes:check_passes",
        "many pieces copied and digested in one pass on the device: the bits of a copy, torch's digests; GB/s",
        timeout_s=120,
        is_timed=True,
    ),
    Check(
        "device_delta",
        "devices:check_device_delta",
        "a source that packs and compares on the device: the chunks, deltas and digests of one that does on the host",
    ),
    Check(
        "cuda_ipc",
        "devices:check_cuda_ipc",
        "versions over CUDA IPC, packed and not, to engines that stage on device or host, or land in place: equal bits",
        timeout_s=120,
        needs_cuda="CUDA IPC is between processes with one",
    ),
    Check(
        "collective",
        "groups:check_collective",
        "a version broadcast over Gloo out of the device's memory, to an engine in another process: equal bits",
    ),
    Check(
        "nccl_alone",
        "groups:check_nccl_alone",
        "our NCCL group with one rank: built, broadcast in, closed, its watchdog quiet",
        needs_cuda="NCCL has no other device",
    ),
    Check(
        "packing", "packing:check_packing", "GB/s from the device into a source's arena, pinned and not", is_timed=True
    ),
    Check(
        "bench",
        "benches:check_bench",
        "the benchmark program's cases of one GPU, with small models",
        timeout_s=200,
        is_timed=True,
        needs_cuda="its cases measure nothing else",
    ),
)


def find_function(check: Check) -> Callable[[Scale], Mapping[str, Any]]:
    """The check's function; imported now."""
    module, name = check.target.split(":")
    function: Callable[[Scale], Mapping[str, Any]] = getattr(importlib.import_module(f"tests.gpu.{module}"), name)
    return function
