"""Makes Megatron-Core run on a machine without a GPU: one explicit, idempotent step, entered when it is first needed.

Megatron-Core assumes CUDA in a few dozen places. `MENDS` lists each of those, with the reason and what is put in its
place; `ensure_runtime()` applies the ones this machine needs. Whatever first builds a Megatron model or trains one
calls it; importing this module changes nothing, and with CUDA and Transformer Engine present neither does the call.

    from weightcast.bridges.runtime import ensure_runtime

    ensure_runtime()
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightcast.bridges import cuda_kernels as kernels
from weightcast.bridges import cuda_stand_ins as stand_ins

logger = logging.getLogger(__name__)


def has_cuda() -> bool:
    """True where a CUDA device can be used."""
    return torch.cuda.is_available()


def has_transformer_engine() -> bool:
    """True where Transformer Engine can be imported; it decides the layer spec and needs CUDA itself."""
    return has_cuda() and importlib.util.find_spec("transformer_engine") is not None


@functools.cache
def can_compile_kernels() -> bool:
    """True where torch.compile can make kernels for a GPU: with CUDA, Triton, a C compiler and Python's headers.

    Triton builds what starts a kernel with the last two (`triton/runtime/build.py`).
    """
    if not has_cuda() or importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


def current_device() -> torch.device:
    """The device on which this process builds its model: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


@dataclass(frozen=True)
class Mend:
    """One name in torch or Megatron, what is put in its place, and why.

    `target` is "module:attribute" (the attribute may have dots); `make` gets the present value and returns the new
    one. `needed` says on which machines it is applied.
    """

    target: str
    why: str
    make: Callable[[Any], Any]
    needed: Callable[[], bool]

    def apply(self) -> None:
        """Put the stand-in in place."""
        module_name, path = self.target.split(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, self.make(getattr(owner, name, None)))


def _no_cuda() -> bool:
    return not has_cuda()


def _no_transformer_engine() -> bool:
    return not has_transformer_engine()


def _cuda_alone() -> bool:
    return has_cuda() and not has_transformer_engine()


def _without_cuda(target: str, value: Any, why: str) -> Mend:
    return Mend(target, why, lambda present: value, _no_cuda)


def _without_transformer_engine(target: str, value: Any, why: str) -> Mend:
    return Mend(target, why, lambda present: value, _no_transformer_engine)


_DEVICE = "about 60 call sites (mappings, p2p, rotary, router) make tensors on it"
_STREAMS = "DDP overlap, the MoE dispatcher and the pipeline schedules order their work with it"
_WAITS = "schedules, timers and checkpointing call it unconditionally"
_RNG = "dropout, initialisation and recomputation switch CUDA random states; on a CPU they must switch the CPU's"
_UNEVEN = (
    "experts that are split over ranks gather as many tokens from each rank as chose them; gloo wants equally many"
)
_BUFFERS = "megatron.core.distributed.param_and_grad_buffer"
_ALONE = (
    "DDP scatters all gradients and gathers all parameters in each step, in place; a rank alone has them already, but "
    "gloo copies them twice (0.12 s of a 1.8 s step for 92 MB)"
)
_NVTX = "profiler ranges need a CUDA build"
_CLIPPING = "megatron.core.optimizer.clip_grads"

# Found by running megatron-core 0.16.1 with torch 2.13 for CPU; 0.19.2 wants the same.
MENDS: tuple[Mend, ...] = (
    _without_cuda("torch.cuda:current_device", stand_ins.cpu_device, _DEVICE),
    _without_cuda("torch.cuda:set_device", stand_ins.new_nothing(), _WAITS),
    _without_cuda("torch.cuda:synchronize", stand_ins.new_nothing(), _WAITS),
    _without_cuda("torch.cuda:empty_cache", stand_ins.new_nothing(), _WAITS),
    _without_cuda("torch.cuda:Stream", stand_ins.Stream, _STREAMS),
    _without_cuda("torch.cuda:Event", stand_ins.Event, _STREAMS),
    _without_cuda("torch.cuda:stream", stand_ins.stream_context, _STREAMS),
    _without_cuda("torch.cuda:current_stream", stand_ins.current_stream, _STREAMS),
    _without_cuda("torch.cuda:default_stream", stand_ins.current_stream, _STREAMS),
    _without_cuda("torch.cuda:set_stream", stand_ins.new_nothing(), _STREAMS),
    _without_cuda("torch.cuda.nvtx:range_push", stand_ins.new_nothing(), _NVTX),
    _without_cuda("torch.cuda.nvtx:range_pop", stand_ins.new_nothing(), _NVTX),
    _without_cuda("torch.cuda:get_rng_state", stand_ins.get_cpu_rng_state, _RNG),
    _without_cuda("torch.cuda:set_rng_state", stand_ins.set_cpu_rng_state, _RNG),
    _without_cuda("torch.cuda:manual_seed", stand_ins.seed_cpu, _RNG),
    _without_cuda("megatron.core.tensor_parallel.random:_get_cuda_rng_state", stand_ins.get_cpu_rng_state, _RNG),
    _without_cuda("megatron.core.tensor_parallel.random:_set_cuda_rng_state", stand_ins.set_cpu_rng_state, _RNG),
    _without_cuda("megatron.core.tensor_parallel.random:CudaRNGStatesTracker", stand_ins.CpuRngStatesTracker, _RNG),
    Mend(
        "torch.distributed:all_to_all_single",
        "the MoE dispatcher passes split sizes as tensors, also in the backward; gloo wants lists",
        stand_ins.with_split_lists,
        _no_cuda,
    ),
    Mend("torch.distributed:all_gather", _UNEVEN, stand_ins.with_uneven_gather, _no_cuda),
    Mend("torch.distributed:reduce_scatter", _UNEVEN, stand_ins.with_uneven_scatter, _no_cuda),
    Mend(f"{_BUFFERS}:dist_reduce_scatter_func", _ALONE, stand_ins.with_nothing_for_one, _no_cuda),
    Mend(f"{_BUFFERS}:dist_all_gather_func", _ALONE, stand_ins.with_nothing_for_one, _no_cuda),
    Mend(
        "megatron.core.transformer.moe.router:TopKRouter._apply_expert_bias",
        "counts tokens in one addition, for which torch.compile would start a C++ compiler at the first call",
        inspect.unwrap,
        _no_cuda,
    ),
    _without_transformer_engine(
        "megatron.core.transformer.moe.moe_utils:te_general_gemm",
        None,
        "used as a name that may be None, but never defined without Transformer Engine: NameError",
    ),
    _without_transformer_engine(
        "megatron.core.transformer.multi_latent_attention:HAVE_TE",
        False,
        "True without Transformer Engine, whose classes are then MagicMocks that isinstance() refuses",
    ),
    Mend(
        "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
        "takes False for FP8 (latent attention's recomputation), which then asks Transformer Engine: NameError",
        stand_ins.with_false_as_no_fp8,
        _no_transformer_engine,
    ),
    Mend(
        f"{_CLIPPING}:l2_norm_impl",
        "without Apex the norm of gradients is taken a parameter at a time, and each waits for the GPU",
        kernels.with_norm_of_all,
        _cuda_alone,
    ),
    Mend(
        f"{_CLIPPING}:multi_tensor_scale_impl",
        "without Apex gradients are clipped a parameter at a time, through a copy",
        kernels.with_scale_of_all,
        _cuda_alone,
    ),
    Mend(
        "megatron.core.transformer.attention:apply_rotary_pos_emb",
        "without Transformer Engine eight kernels go over the queries and the keys, and more in the backward",
        kernels.with_compiled_rotation,
        _cuda_alone,
    ),
)


def _mended() -> bool:
    """Whether the process-wide mends are in place; read off the mends themselves, so there is no flag to go stale."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    present: Any = torch.cuda.current_device
    cuda_mended = has_cuda() or present is stand_ins.cpu_device
    # One that every machine without Transformer Engine has; what others replace is right in some Megatron versions.
    return cuda_mended and (has_transformer_engine() or hasattr(CheckpointWithoutOutput.__init__, "__wrapped__"))


class _EndOfThread:
    """Empties a thread's stack of modes when its thread-local variables are cleared, while it still holds the GIL.

    What is left there is freed by C++ after the thread's last Python code; should the interpreter be ending at that
    moment, the process aborts with "terminate called without an active exception" (seen on torch 2.13, Python 3.11).
    """

    def __del__(self) -> None:
        overrides: Any = torch.overrides
        for _ in overrides._get_current_function_mode_stack():
            overrides._pop_mode()


_this_thread = threading.local()


def _enter_mode_for_this_thread() -> None:
    """Enter `CudaToCpuMode` at the bottom of this thread's stack of modes, for good.

    Function modes are per thread. It goes under the modes that are open now, because each of those (also
    `with torch.device(...)`, see THPDevice_exit in torch/csrc/Device.cpp) pops whatever is on top when its block ends.
    Only the mode of `torch.set_default_device` must stay lowest of all, which torch asserts when it takes it away.
    """
    overrides: Any = torch.overrides
    stack = overrides._get_current_function_mode_stack()
    if any(isinstance(mode, stand_ins.CudaToCpuMode) for mode in stack):
        return
    popped = [overrides._pop_mode() for _ in stack]
    default_device_mode = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    if popped and popped[-1] is default_device_mode:
        overrides._push_mode(popped.pop())
    overrides._push_mode(stand_ins.CudaToCpuMode())
    for mode in reversed(popped):
        overrides._push_mode(mode)
    if threading.current_thread() is not threading.main_thread():
        _this_thread.end = _EndOfThread()


def ensure_runtime() -> None:
    """Make Megatron-Core run on this machine; call it before building a Megatron model and before training one.

    Process-wide and idempotent, no collective. Every thread that runs Megatron code on a CPU calls it itself, because
    torch keeps function modes per thread. With CUDA and Transformer Engine it does nothing.
    """
    if not _mended():
        needed = [mend for mend in MENDS if mend.needed()]
        for mend in needed:
            mend.apply()
        logger.info("Megatron runtime: %d stand-ins in place (cuda: %s)", len(needed), has_cuda())
    if not has_cuda():
        _enter_mode_for_this_thread()
