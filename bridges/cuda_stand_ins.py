"""Stand-ins for the CUDA calls that Megatron-Core makes, for a machine that has no GPU.

Each class or function here answers one thing that Megatron asks of CUDA with what the CPU has instead: a device, a
stream that is always done, the CPU's random generator. They are put in place by `weightcast.bridges.runtime` only,
which also says why each is needed; nothing here acts on import.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch.overrides import TorchFunctionMode

_MODEL_PARALLEL_STATE = "model-parallel-rng"


def cpu_device() -> torch.device:
    """The answer to `torch.cuda.current_device()`: tensors are made on the CPU."""
    return torch.device("cpu")


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """The answer to `synchronize`, `set_device`, `empty_cache` and their like: nothing is pending on a CPU."""


def new_nothing() -> Callable[..., None]:
    """A `do_nothing` of its own: torch.compile refuses one function in places for which it has different rules."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        do_nothing()

    return nothing


class Stream:
    """A stream on which everything has already run, because CPU operators return when they are done."""

    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = do_nothing

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event if event is not None else Event()

    def query(self) -> bool:
        return True


class Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = do_nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


def current_stream(*args: Any, **kwargs: Any) -> Stream:
    return Stream()


def stream_context(stream: Stream | None) -> contextlib.AbstractContextManager[None]:
    """The answer to `torch.cuda.stream(s)`: the CPU has one order of execution, so there is nothing to switch to."""
    return contextlib.nullcontext()


def get_cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def set_cpu_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def seed_cpu(seed: int) -> None:
    torch.manual_seed(seed)


class CpuRngStatesTracker(CudaRNGStatesTracker):  # type: ignore[misc]
    """Megatron's named random states, kept for the CPU generator.

    Differs from its base in `fork` alone: the base warns whenever the CPU's generator moved inside a fork, and here
    that is the generator the fork is for.
    """

    @contextlib.contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_STATE) -> Iterator[None]:
        """Draw from the state `name` inside the block, and from the previous state after it."""
        if name not in self.states_:
            raise KeyError(f"random state {name!r} is not set; call initialize_model_parallel() before using dropout")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes


def with_split_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.distributed.all_to_all_single` so that split sizes given as tensors become lists, as gloo wants."""

    def all_to_all_single_with_lists(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return all_to_all_single(
            output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), group=group, async_op=async_op
        )

    return all_to_all_single_with_lists


def with_uneven_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.distributed.all_gather` so that ranks may give different numbers of rows, which gloo refuses.

    The dispatcher gathers the tokens of experts that are split over ranks. Rows are padded to the longest rank's.
    """

    def all_gather_uneven(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        lengths = [part.shape[0] if part.ndim else 1 for part in tensor_list]
        if len(set(lengths)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        everyones = [torch.empty_like(padded) for _ in lengths]
        all_gather(everyones, padded, group=group)
        for part, rows in zip(tensor_list, everyones, strict=True):
            part.copy_(rows[: part.shape[0]])
        return None

    return all_gather_uneven


def with_uneven_scatter(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `torch.distributed.reduce_scatter` so that ranks may take different numbers of rows, as above."""

    def reduce_scatter_uneven(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        **more: Any,
    ) -> Any:
        if len({part.shape for part in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, **more)
        whole = torch.cat(input_list)
        dist.all_reduce(whole, op=op, group=group)
        sizes = [part.shape[0] for part in input_list]
        output.copy_(torch.split(whole, sizes)[dist.get_rank(group)])
        return None

    return reduce_scatter_uneven


def with_nothing_for_one(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a gather into, or a scatter out of, one tensor so that a rank alone does not copy a tensor onto itself."""

    @functools.wraps(collective)
    def unless_alone(output: torch.Tensor, source: torch.Tensor, *args: Any, group: Any = None, **more: Any) -> Any:
        in_place = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
        if in_place and dist.get_world_size(group) == 1:
            return None
        return collective(output, source, *args, group=group, **more)

    return unless_alone


def with_false_as_no_fp8(make: Callable[..., None]) -> Callable[..., None]:
    """The `__init__` of Megatron's recomputation, for which anything but None is FP8."""

    @functools.wraps(make)
    def made(self: Any, fp8: Any = None) -> None:
        make(self, fp8=fp8 or None)

    return made


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)  # an ordinal names a CUDA device


class CudaToCpuMode(TorchFunctionMode):
    """Rewrites every request for a CUDA tensor to the CPU: `device="cuda"`, `.cuda()`, `.to("cuda")`, pinned memory.

    While it is entered, `Tensor.type()` of a CPU tensor answers the CUDA type's name, because Megatron's optimizers
    and gradient clipping choose their path by comparing that string.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED_ALONE:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], cpu_device(), *args[2:])
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": cpu_device()}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


# Methods whose CPU answer is the tensor itself.
_ANSWERED_ALONE = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})
