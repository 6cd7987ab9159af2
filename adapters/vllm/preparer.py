"""A worker's thread that prepares what is staged while the engine serves, so that a pause only swaps pointers.

    preparer = Preparer(subscriber, spare, "auto", check, log)
    ...                                   # the fleet released a version
    if preparer.holds(version):
        preparer.swap()                   # no request runs
    preparer.close()

The thread has a lower priority than those that serve, and may run wherever the process may. It uses as many threads
for a kernel's packing as the engine's own thread does, because the layout of packed weights may depend on their number.

What cannot be prepared is loaded in the pause as it would be without: a kind of model that the check of `spare`
refuses, and any version for which there is no memory. When loading fails for a model that was prepared before, the
version is refused before any engine pauses, and the engine serves on.
"""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import torch
from vllm.config import VllmConfig
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

from weightcast.adapters.timeline import EventLog
from weightcast.adapters.vllm import UNTOUCHED
from weightcast.adapters.vllm.settings import PrepareMode
from weightcast.adapters.vllm.spare import CannotPrepareError, Prepared, SpareModel
from weightcast.sync import Version, WeightSubscriber, kind_of
from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch, WeightcastError
from weightcast.sync.preview import Preview

logger = logging.getLogger(__name__)

_TURN_S = 0.2
_CLOSE_S = 5.0
_NICENESS = 10
# Packing holds a layer twice, and vLLM pads.
_MEMORY_MARGIN = 1.25

AS_BEFORE = "versions are loaded in the pause"


class Preparer:
    """See the module. `check` raises `ModelMismatch` for a version that does not fit the model; `start` begins."""

    def __init__(
        self,
        subscriber: WeightSubscriber,
        spare: SpareModel,
        mode: PrepareMode,
        check: Callable[[Preview], None],
        log: EventLog,
    ) -> None:
        self._subscriber = subscriber
        self._spare = spare
        self._mode = mode
        self._check = check
        self._log = log
        self._ready: tuple[Version, Prepared] | None = None
        self._is_spent = False
        self._has_prepared = False
        self._failure = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightcast-prepare", daemon=True)

    def start(self) -> "Preparer":
        """Begin to prepare what is staged."""
        self._thread.start()
        return self

    def holds(self, version: Version) -> bool:
        """Whether `version`, which the engine took from the subscriber, is ready to be swapped in."""
        return self._ready is not None and self._ready[0] == version

    def swap(self) -> None:
        """Let the prepared version serve; while no request runs. `CannotSwapError` when that fails; nothing changed."""
        assert self._ready is not None
        try:
            self._ready[1].swap()
        finally:
            self.forget()

    def forget(self) -> None:
        """Drop what was prepared for the version that the engine took and swapped in, or is about to reject."""
        self._ready = None
        self._is_spent = True  # last, for the thread

    def close(self) -> None:
        """Stop, after `WeightSubscriber.close`. A load that takes long comes to its end, and is dropped."""
        self._stopping.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        yield_to_serving()
        while not self._stopping.is_set():
            try:
                preview = self._subscriber.preview(_TURN_S)
            except DeadlineExceeded:
                self._drop_spent()
            except WeightcastError:
                self._stopping.wait(_TURN_S)  # closed, or ended; `wait` says why
            else:
                self._take_or_leave(preview)

    def _drop_spent(self) -> None:
        """What served before the last swap: in the thread, since giving back memory takes time."""
        if self._is_spent and self._ready is None:
            self._is_spent = False
            self._spare.clear()

    def _take_or_leave(self, preview: Preview) -> None:
        """Whatever happens the version must not wait for ever."""
        try:
            self._take(preview)
        except Exception as error:
            logger.exception("nothing more is prepared, %s", AS_BEFORE)
            self._ready, self._failure = None, f"preparing ended with {error!r}"
            with suppress(WeightcastError):  # it may have been accepted, or the subscriber was closed
                preview.accept(read=False)

    def _take(self, preview: Preview) -> None:
        """Prepare a version and say so. While one is previewed the engine has taken none, and swaps nothing."""
        self._ready, self._is_spent = None, False
        self._spare.clear()
        if why := self._failure or self._lack_of_memory(preview) or self._misfit(preview):
            self._leave_it(preview, why)
            return
        try:
            with self._log.phase("prepare", preview.version):
                prepared = self._spare.load(dict(preview))
        except Exception as error:
            self._spare.clear()
            self._log.take(preview.version)
            self._fail(preview, error)
            return
        self._ready = (preview.version, prepared)
        if preview.accept(read=True):
            self._has_prepared = True
        else:
            self._log.take(preview.version)
            self.forget()

    def _fail(self, preview: Preview, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        is_kind = isinstance(error, CannotPrepareError)
        if self._mode == "auto" and (is_kind or not self._has_prepared):
            self._failure = f"this model cannot be prepared ({reason})"
            self._leave_it(preview, self._failure)
            return
        logger.error("version %s is refused: %s", preview.version, reason, exc_info=not is_kind)
        preview.refuse(f"{UNTOUCHED}: preparing version {preview.version} failed: {reason}")

    def _leave_it(self, preview: Preview, why: str) -> None:
        """Let the version be loaded in the pause, or refuse it where the operator wants no such pause."""
        if self._mode == "on":
            preview.refuse(f'{UNTOUCHED}: {why}; the operator set "prepare" to "on"')
            return
        logger.warning("version %s is not prepared, %s: %s", preview.version, AS_BEFORE, why)
        preview.accept(read=False)

    def _misfit(self, preview: Preview) -> str:
        try:
            self._check(preview)
        except ModelMismatch as error:
            return str(error)
        return ""

    def _lack_of_memory(self, preview: Preview) -> str:
        needed = int(_MEMORY_MARGIN * self._spare.share * sum(spec.num_bytes for spec in preview.specs))
        free = free_bytes() - self._spare.untouched_bytes()
        if needed <= free:
            return ""
        return f"it would take {needed / 1e9:.1f} GB, and {max(free, 0) / 1e9:.1f} GB are free beside the caches"


def free_bytes() -> int:
    """Memory that this process may still take, of its NUMA node and its container."""
    return int(min(get_memory_node_info(node).available_memory for node in get_visible_memory_node()))


def yield_to_serving() -> None:
    """Lower the calling thread's priority, and let it run on every CPU that some thread of this process may use.

    vLLM binds the thread that serves to one CPU, and threads inherit that.
    """
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        cpus: set[int] = set()
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it may have ended
                cpus |= os.sched_getaffinity(int(thread))
        os.sched_setaffinity(0, cpus)


def make_spare(
    vllm_config: VllmConfig, model: torch.nn.Module, device: torch.device, mode: PrepareMode, publisher: str
) -> SpareModel | None:
    """The model to prepare versions in, or None where that cannot be, which the log tells; in the worker's thread.

    Raises `ConfigError` for what cannot be where the operator insists on it.
    """
    why = why_not(mode, device, publisher, has_moving_experts=vllm_config.parallel_config.enable_eplb)
    if not why:
        try:
            return SpareModel(vllm_config, model)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    if mode == "on":
        raise ConfigError(f'versions cannot be prepared here ({why}); leave out "prepare": "on"')
    if mode == "auto":
        logger.warning("no version is prepared, %s: %s", AS_BEFORE, why)
    return None


def why_not(mode: PrepareMode, device: torch.device, publisher: str, *, has_moving_experts: bool) -> str:
    """Why a worker prepares nothing; empty where it may. Pure."""
    if mode == "off":
        return 'the operator set "prepare" to "off"'
    if kind_of(publisher) == "store":
        return f"{publisher} is a store, whose versions are not looked at before they are taken"
    if device.type != "cpu":
        return f"weights are prepared on CPUs only, this worker's are on {device}"
    return "experts move between workers (EPLB)" if has_moving_experts else ""
