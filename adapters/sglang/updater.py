"""Brings a version into SGLang servers over one process group: rank 0 broadcasts, all workers of all engines receive.

    engines = [SGLangTarget("a", client_a, num_workers=2), SGLangTarget("b", client_b, num_workers=2)]
    with SGLangUpdater(engines, host="10.0.0.1") as updater:
        updater.connect()
        updater.update("3", specs, tensors.__getitem__)

Each engine has a rank offset of its own. Every call to an engine runs beside the broadcast that it announces, and an
engine that refuses it breaks the broadcast off, which would otherwise wait for that engine in vain. SGLang does not
check what it receives: tensors must be verified before (a `WeightSubscriber` did so), and an engine whose update broke
off holds parts of two versions. It is then left paused, and `EngineError` says so.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch

from weightcast.adapters.sglang.client import PauseKind, SGLangClient
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, WeightcastError
from weightcast.sync.regions import TensorSpec
from weightcast.sync.transports.collective_backend import check_backend, listen_store
from weightcast.sync.transports.collective_foreign import Find, NamedSender, meet_sglang
from weightcast.sync.transports.collective_roster import assign_rank_offsets
from weightcast.sync.transports.collective_rules import (
    SGLANG_BUCKET_BYTES,
    SGLANG_GROUP_NAME,
    NamedBucket,
    plan_sglang_buckets,
    plan_singles,
    sglang_init_payload,
    sglang_update_payload,
)

_FLUSH_S = 10.0
_NOT_IN_GLOO = (torch.float8_e4m3fn, torch.float8_e5m2)  # "Invalid scalar type" on the receiving side


@dataclass(frozen=True)
class SGLangTarget:
    """One server: its name, its client, its tensor-parallel size. (With pipeline stages SGLang gives ranks twice.)"""

    name: str
    client: SGLangClient
    num_workers: int = 1


class SGLangUpdater(AbstractContextManager["SGLangUpdater"]):
    """Rank 0 of a group with SGLang's workers. For one thread.

    `host` is the address that the workers reach this process at; `bucket_bytes` is what one broadcast carries (None: a
    broadcast a tensor, as SGLang does without a `load_format`). `timeout_s` bounds the meeting and each update.
    """

    def __init__(
        self,
        engines: Sequence[SGLangTarget],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        backend: str = "nccl",
        group_name: str = SGLANG_GROUP_NAME,
        bucket_bytes: int | None = SGLANG_BUCKET_BYTES,
        timeout_s: float = 300.0,
    ) -> None:
        self._engines = tuple(engines)
        self._offsets, self._size = assign_rank_offsets({engine.name: engine.num_workers for engine in engines})
        if len(self._offsets) != len(self._engines):
            raise ConfigError("two SGLang engines have one name; name each once")
        self._host, self._port = host, port
        self._backend = check_backend(backend)
        self._base_name = group_name
        self._generation = 0
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._sender: NamedSender | None = None
        self.poisoned: frozenset[str] = frozenset()
        """Engines whose last update broke off after it had begun: they hold parts of two versions."""

    @property
    def group_name(self) -> str:
        """Every meeting has a name of its own: torch refuses one that a process had before."""
        return f"{self._base_name}-{self._generation}"

    @property
    def is_connected(self) -> bool:
        """Whether there is a group."""
        return self._sender is not None

    def connect(self) -> None:
        """Meet all workers. Raises `EngineError` with an engine's reason, `DeadlineExceeded` when some do not come."""
        self.disconnect()
        self._generation += 1
        deadline = time.monotonic() + self._timeout_s
        store = listen_store(self._host, self._port, self._timeout_s)
        calls = Calls(
            (
                engine.name,
                partial(engine.client.init_group, self._init_payload(engine.name, store.port), self._timeout_s),
            )
            for engine in self._engines
        )
        meeting = partial(
            meet_sglang, store, self.group_name, self._backend, self._size, self._timeout_s, self._interface()
        )
        self._sender = NamedSender(calls.beside(meeting, deadline))
        calls.join(deadline)

    def _init_payload(self, engine: str, port: int) -> dict[str, Any]:
        return sglang_init_payload(
            (self._host, port),
            rank_offset=self._offsets[engine],
            world_size=self._size,
            group_name=self.group_name,
            backend=self._backend,
        )

    def _interface(self) -> str:
        return self._host if self._host.startswith("127.") else ""

    def update(self, label: str, specs: Sequence[TensorSpec], find: Find, *, pause: PauseKind | None = None) -> int:
        """Load `specs`, whole, into every engine, and give them `label`; the bytes that were broadcast.

        With `pause` the engines are paused before and continued after; without, the caller does that. Raises
        `EngineError` when an engine refused; where it may hold parts of two versions it is left paused, and named.
        """
        if self._sender is None:
            self.connect()
        buckets = self._plan(specs)
        deadline = time.monotonic() + self._timeout_s
        if pause is not None:
            self._all(lambda engine: engine.client.pause(pause, self._timeout_s), deadline)
        self._all(self._begin, deadline)
        try:
            self._send(label, buckets, find, deadline)
            self._all(lambda engine: engine.client.end_weight_update(), deadline)
        except BaseException as error:
            self._poison(error)
            raise
        self._all(lambda engine: engine.client.flush_cache(_FLUSH_S), deadline)
        self._check_labels(label)
        if pause is not None:
            self._all(lambda engine: engine.client.resume(), deadline)
        return sum(bucket.num_bytes for bucket in buckets)

    def _plan(self, specs: Sequence[TensorSpec]) -> tuple[NamedBucket, ...]:
        if not specs:
            raise ConfigError("a version without tensors; SGLang takes at least one")
        if self._bucket_bytes is not None:
            return plan_sglang_buckets(specs, self._bucket_bytes)
        if self._backend == "gloo" and (odd := [spec for spec in specs if spec.dtype in _NOT_IN_GLOO]):
            raise ConfigError(
                f"{odd[0].name} is {odd[0].dtype}, of which Gloo has no broadcast by tensor; give bucket_bytes"
            )
        return plan_singles(specs)

    def _begin(self, engine: SGLangTarget) -> None:
        """Open a session; one that an update left open when it broke off is closed before."""
        if engine.name in self.poisoned:
            with suppress(EngineError):  # there is none where the engine was started again
                engine.client.end_weight_update()
        engine.client.begin_weight_update()

    def _send(self, label: str, buckets: Sequence[NamedBucket], find: Find, deadline: float) -> None:
        """Each bucket is packed while the engines still load the one before."""
        assert self._sender is not None
        before: Calls | None = None
        for number, bucket in enumerate(buckets):
            packed = self._sender.pack(bucket, find)
            if before is not None:
                before.join(deadline)
            is_last = number == len(buckets) - 1
            payload = sglang_update_payload(
                bucket, group_name=self.group_name, weight_version=label if is_last else None
            )
            left_s = max(0.1, deadline - time.monotonic())
            before = Calls(
                (engine.name, partial(engine.client.update_from_distributed, payload, left_s))
                for engine in self._engines
            )
            self._sender.broadcast(bucket, packed, deadline, before.check)
        if before is not None:
            before.join(deadline)

    def _all(self, call: Callable[[SGLangTarget], None], deadline: float) -> None:
        Calls((engine.name, partial(call, engine)) for engine in self._engines).join(deadline)

    def _poison(self, error: BaseException) -> None:
        self.poisoned = frozenset(engine.name for engine in self._engines)
        self.disconnect()
        if isinstance(error, WeightcastError):
            raise EngineError(
                f"an update broke off after it had begun: {error}. The engines {', '.join(sorted(self.poisoned))} hold "
                "parts of two versions and are left paused: send them a whole version, or start them again"
            ) from error

    def _check_labels(self, label: str) -> None:
        """An answer of 200 is not yet an update: the label shows that the last bucket was taken."""
        for engine in self._engines:
            if (got := engine.client.weight_version()) != label:
                self.poisoned = self.poisoned | {engine.name}
                raise EngineError(f"{engine.name} reports the version {got!r} after an update to {label!r}; restart it")
        self.poisoned = frozenset()

    def disconnect(self) -> None:
        """Close this end of the group. Workers that wait in it notice by their own timeout, or when they are told."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def close(self) -> None:
        """Let the workers leave the group, as far as they answer, and close this end."""
        if self._sender is not None:
            calls = Calls((e.name, partial(e.client.destroy_group, self.group_name)) for e in self._engines)
            self.disconnect()
            calls.settle(_FLUSH_S)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class Calls:
    """Calls to several engines at once, each in a thread; errors are raised by whoever looks."""

    def __init__(self, calls: Iterable[tuple[str, Callable[[], None]]]) -> None:
        self._done: dict[str, Event] = {}
        self._errors: dict[str, BaseException] = {}
        for name, call in calls:
            self._done[name] = Event()
            Thread(target=self._run, args=(name, call), daemon=True, name=f"weightcast-calls-{name}").start()

    def _run(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._errors[name] = error
        finally:
            self._done[name].set()

    def check(self) -> None:
        """Raise the first error, if there is one by now."""
        for name, error in list(self._errors.items()):
            if isinstance(error, WeightcastError):
                raise type(error)(f"{name}: {error}") from error
            raise error

    def join(self, deadline: float) -> None:
        """Wait for all; `DeadlineExceeded` names those that have not answered."""
        while late := [name for name, done in self._done.items() if not done.is_set()]:
            self.check()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the engines {', '.join(late)} did not answer in time; see their logs")
            self._done[late[0]].wait(0.05)
        self.check()

    def settle(self, timeout_s: float) -> None:
        """Wait a while for all; errors are not of interest any more."""
        deadline = time.monotonic() + timeout_s
        for done in self._done.values():
            done.wait(max(0.0, deadline - time.monotonic()))

    def beside(self, function: Callable[[], Any], deadline: float) -> Any:
        """What `function` returns, unless a call fails first: then that error, and a thread stays with the function."""
        result: list[Any] = []
        waiting = Calls([("rank 0", lambda: result.append(function()))])
        while not waiting._done["rank 0"].wait(0.05):
            self.check()
            if time.monotonic() > deadline + 1.0:
                raise DeadlineExceeded("the engines' workers did not meet in time; see their logs")
        if error := waiting._errors.get("rank 0"):
            raise error
        return result[0]
