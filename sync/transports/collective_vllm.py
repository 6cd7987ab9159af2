"""A group with vLLM's own workers, without vLLM and without pickle on this side.

vLLM's workers make a bare NCCL communicator. Through a store they exchange its id as a pickled object of vLLM's; by the
other way in, `nccl_unique_id_b64`, they are told the id in the call that has them join, and that is what is done here:
torch's NCCL backend makes an id for rank 0 and writes it to its store, and the store here keeps it and asks nobody.
Right after joining, every worker issues an all_reduce of one float, which rank 0 must match before all else.

    group = meet_vllm(size, timeout_s=60, announce=start_joining)    # announce(id_b64) posts to every engine, at once
    NamedSender(group).send_all(plan_vllm_packed(specs), find, deadline, watch)

All ranks must enter at the same time, so `announce` begins the calls and returns (see `vllm_init_info`). Read in vLLM
0.32 (`nccl_common.py`, `pynccl.py`) and torch 2.13; not run, as it takes a GPU for each of two processes.
"""

import base64
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from weightcast.sync.errors import ConfigError, DeadlineExceeded, PeerLost
from weightcast.sync.transports.collective_backend import BroadcastGroup, call_within, check_backend, make_nccl

NCCL_ID_BYTES = 128
# From there on torch makes several ids for one communicator (TORCH_NCCL_RANKS_PER_ROOT), and vLLM knows of one.
MAX_RANKS = 128


class IdStore(Store):
    """A store of this process alone, which hands on the NCCL id that is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._ids: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def await_id(self, timeout_s: float) -> bytes:
        """The id, once the backend has made it. `DeadlineExceeded` when it does not."""
        try:
            return self._ids.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(f"NCCL made no id within {timeout_s:.1f} s; see NCCL_DEBUG=INFO") from None

    def set(self, key: str, value: bytes | str) -> None:
        """Keep a value."""
        raw = value.encode() if isinstance(value, str) else bytes(value)
        with self._lock:
            self._values[key] = raw
        if len(raw) == NCCL_ID_BYTES:
            self._ids.put(raw)

    def get(self, key: str) -> bytes:
        """A value that was set."""
        with self._lock:
            return self._values[key]

    def add(self, key: str, amount: int) -> int:
        """Count."""
        with self._lock:
            count = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(count).encode()
        return count

    def check(self, keys: list[str]) -> bool:
        """Whether all keys were set."""
        with self._lock:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Nobody else writes here, so what is missing stays missing."""
        if not self.check(keys):
            raise RuntimeError(f"the keys {keys} were not set")

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing here waits."""


def meet_vllm(size: int, timeout_s: float, announce: Callable[[str], None]) -> BroadcastGroup:
    """Rank 0's end of a group of vLLM's workers, `size` ranks in all, on the present GPU.

    `announce` is given the id in base64 and lets all workers join at the same time, without waiting for them. Raises
    `DeadlineExceeded` when they have not all come within `timeout_s`.
    """
    check_backend("nccl")
    if not 2 <= size <= MAX_RANKS:
        raise ConfigError(f"a group of {size} ranks: vLLM's workers can be met in groups of 2 to {MAX_RANKS}")
    deadline = time.monotonic() + timeout_s
    store = IdStore()
    backend = make_nccl(store, 0, size, timeout_s)
    warm_up = torch.zeros(1, device="cuda")

    def enter() -> None:
        backend.allreduce([warm_up], dist.AllreduceOptions()).wait()
        torch.cuda.current_stream().synchronize()

    errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def tell() -> None:
        try:
            announce(base64.b64encode(store.await_id(timeout_s)).decode())
        except BaseException as error:
            errors.put(error)
            backend.abort()

    teller = threading.Thread(target=tell, daemon=True, name="weightcast-tells-id")
    teller.start()
    try:
        call_within(enter, max(0.1, deadline - time.monotonic()))
    except TimeoutError:
        backend.abort()
        raise DeadlineExceeded(
            f"vLLM's workers did not all join rank 0 within {timeout_s:.1f} s; see their logs, and their rank offsets"
        ) from None
    except RuntimeError as error:
        cause = PeerLost(f"vLLM's workers could not be met: {error}") if errors.empty() else errors.get()
        raise cause from error
    return BroadcastGroup(backend, "nccl", torch.device("cuda", torch.cuda.current_device()), store)
