"""Process groups of torch's own backends, built beside the trainer's: no default group is needed, none is touched.

A trainer has its process groups already, and an engine has its own. A broadcast between the two wants a third that
neither knows of, that can be thrown away when a member dies, and that never waits longer than it was told. So the
backend is made directly on a store, as torch makes it inside, and every operation has a deadline of its own.

    store = listen_store("127.0.0.1", 0, timeout_s=30)             # rank 0
    group = BroadcastGroup.build("gloo", store, rank=0, size=3, timeout_s=30)
    work = group.broadcast(tensor, deadline)
    group.wait(work, deadline, watch)

Facts, seen with torch 2.13: a killed peer makes Gloo's operations fail at once; a stopped one leaves them waiting for
their timeout, which an operation may have for itself; `abort` of Gloo does nothing, and dropping the last reference to
a group waits for its operations. Hence `close` leaves that to a thread of its own where some are under way. torch's
NCCL watchdog by default ends the whole process when an operation times out, which must not happen to a trainer: these
groups have it off.

Collectives are neither encrypted nor authenticated. They belong on a private network.
"""

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import distributed_c10d as c10d

from weightcast.sync.errors import AddressError, ConfigError, DeadlineExceeded, PeerLost

BACKENDS = ("gloo", "nccl")
# How often a wait looks up to see whether a peer is lost.
SLICE_S = 0.25
_NCCL_POLL_S = 0.0005
_BURY_POLL_S = 0.05
# So much later torch itself gives an operation up, and closes connections: the wait's own deadline comes first.
_GRACE_S = 1.0
# What torch's NCCL groups read when they are made (torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp).
_QUIET_NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}

Watch = Callable[[], None]
Result = TypeVar("Result")


def call_within(function: Callable[[], Result], timeout_s: float) -> Result:
    """What `function` returns or raises, or `TimeoutError` after `timeout_s`: then a thread stays with it.

    Some requests of torch's store wait without limit for a host that was stopped.
    """
    answers: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((function(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True, name="weightcast-call").start()
    try:
        result, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:.1f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def listen_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A store on `host` alone (a port of 0 takes a free one). Raises `AddressError` when it cannot be bound.

    torch's own store listens on every interface whatever address it is given (CVE-2025-47277), so it gets a socket.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise AddressError(f"cannot listen on {host}:{port}: {error.strerror}; give a free port, or 0") from None
    port = listener.getsockname()[1]
    return TCPStore(host, port, None, True, timedelta(seconds=timeout_s), False, master_listen_fd=listener.detach())


def connect_store(host: str, port: int, deadline: float) -> TCPStore:
    """The store that another process listens with. Raises `DeadlineExceeded` when it is not there in time."""
    left_s = max(0.1, deadline - time.monotonic())
    _await_listener(host, port, deadline)
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=left_s), False)
    except RuntimeError as error:
        raise PeerLost(f"the store at {host}:{port} does not answer: {_first_line(error)}") from None


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Wait for the port quietly: torch's store writes a page of warnings while it does."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=1.0) as found:
                if found.getsockname() != found.getpeername():  # a port of this host's may be met with itself
                    return
            error: OSError = ConnectionRefusedError("nobody but this socket itself")
        except OSError as refused:
            error = refused
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"nobody listens at {host}:{port} ({error}); start source rank 0 first, or give more time"
            ) from None
        time.sleep(0.05)


class BroadcastGroup:
    """A process group whose rank 0 sends to all others. Used by one thread; `close` it once it is broken."""

    def __init__(self, backend: Any, kind: str, device: torch.device, store: Store | None = None) -> None:
        # A store written in Python must outlive its backend, which holds the C++ half alone.
        self._store = store
        self.kind = kind
        self.device = device
        self.rank = int(backend.rank())
        self.size = int(backend.size())
        self._backend: Any = backend
        self._pending: list[tuple[Any, torch.Tensor]] = []

    @classmethod
    def build(
        cls, kind: str, store: Store, rank: int, size: int, timeout_s: float, interface: str = ""
    ) -> "BroadcastGroup":
        """Meet the other ranks; all must call with the same store. At most `timeout_s`, then `DeadlineExceeded`.

        `interface` is the address that Gloo binds to; empty for the one that this host's name has.
        """
        if check_backend(kind) == "gloo":
            return cls(make_gloo(store, rank, size, timeout_s, interface), kind, torch.device("cpu"))
        return cls(make_nccl(store, rank, size, timeout_s), kind, torch.device("cuda", torch.cuda.current_device()))

    def broadcast(self, tensor: torch.Tensor, deadline: float) -> Any:
        """Begin to broadcast from rank 0; what comes back goes to `wait`. `tensor` is contiguous, on `device`."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.asyncOp = True
        options.timeout = timedelta(seconds=max(0.0, deadline - time.monotonic()) + _GRACE_S)
        try:
            work = self._backend.broadcast([tensor], options)
        except RuntimeError as error:
            raise PeerLost(f"the group is broken: {_first_line(error)}") from None
        self._pending.append((work, tensor))
        return work

    def wait(self, work: Any, deadline: float, watch: Watch) -> None:
        """Until the broadcast is done here. Calls `watch` now and then, which may raise.

        Raises `PeerLost` when the backend says that a peer is gone, `DeadlineExceeded` at the deadline.
        """
        while not self._is_done(work, min(SLICE_S, max(0.001, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("a broadcast did not end in time")
            watch()
        self._pending = [pair for pair in self._pending if pair[0] is not work]

    def _is_done(self, work: Any, slice_s: float) -> bool:
        if not self._has_ended(work, slice_s):
            return False
        try:
            work.wait()  # comes back at once, and says whether it failed
        except RuntimeError as error:
            raise PeerLost(f"a broadcast failed: {_first_line(error)}") from None
        return True

    def _has_ended(self, work: Any, slice_s: float) -> bool:
        if self.kind == "gloo":
            # Its timeout is an error like any other, and the work may end between the two: only this tells them apart.
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=slice_s))
            return bool(work.is_completed())
        # A wait of NCCL's with a timeout aborts the communicator when it ends without success.
        end_s = time.monotonic() + slice_s
        while not work.is_completed():
            if time.monotonic() > end_s:
                return False
            time.sleep(_NCCL_POLL_S)
        return True

    def close(self) -> None:
        """Give the group up. Does not wait for broadcasts that are still under way, nor for the other ranks."""
        holder = [self._backend, *self._pending]
        works = [work for work, _ in self._pending]
        self._backend, self._pending = None, []
        if holder[0] is None:
            return
        if all(work.is_completed() for work in works):
            return
        threading.Thread(target=_bury, args=(holder, works), daemon=True, name="weightcast-closes-group").start()


def _bury(holder: list[Any], works: list[Any]) -> None:
    """Keep a group, and the memory that it sends from, until its broadcasts have timed out: it would wait for them."""
    if holder[0].name() != "gloo":
        holder[0].abort()
    while not all(work.is_completed() for work in works):
        time.sleep(_BURY_POLL_S)
    works.clear()
    holder.clear()


def check_backend(kind: str) -> str:
    """`kind` itself, or `ConfigError` when it is unknown or this torch lacks it."""
    if kind not in BACKENDS:
        raise ConfigError(f"unknown backend {kind!r}; choose one of {', '.join(BACKENDS)}")
    if kind == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ConfigError("backend 'nccl' needs a GPU and a torch built for CUDA; use 'gloo'")
    return kind


def make_gloo(store: Store, rank: int, size: int, timeout_s: float, interface: str = "") -> Any:
    """A Gloo backend on `store`. Raises `DeadlineExceeded` when the other ranks do not come."""
    gloo: Any = c10d.ProcessGroupGloo  # its options are not in torch's stubs
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname=interface) if interface else gloo.create_default_device()]
    options._threads = 2
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        # Its own timeout comes first, unless the store's host was stopped.
        return call_within(lambda: gloo(store, rank, size, options), timeout_s + 1.0)
    except (RuntimeError, TimeoutError) as error:
        raise DeadlineExceeded(
            f"rank {rank} of {size} did not meet the other ranks within {timeout_s:.1f} s: {_first_line(error)}"
        ) from None


def make_nccl(store: Store, rank: int, size: int, timeout_s: float) -> Any:
    """An NCCL backend on `store`, whose watchdog does not end the process. It meets its peers at its first use."""
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    store.set_timeout(timedelta(seconds=timeout_s))
    with _environment(_QUIET_NCCL):
        return c10d.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
