"""Checkpoints written while training goes on, atomic, the newest k kept.

A checkpoint is written under another name by a process beside the trainer's (`checkpoint.async_save`), and renamed when
all ranks have written all of it; only then the record `latest_checkpointed_iteration.txt` moves on. A save that is
interrupted, or that the disk refuses, leaves the earlier checkpoints and the record as they were.

    with Saver(cfg, events, on_saved) as saver:
        saver.after_step(state, is_last=False)
"""

import inspect
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from safetensors.torch import save_file as save_safetensors
from torch.distributed.checkpoint.api import CheckpointException

from weightcast.bridges.exchange import agree, agreement
from weightcast.bridges.megatron_checkpoint import AgreedSave
from weightcast.bridges.runtime import current_device
from weightcast.bridges.whole_folder import explain_disk, on_rank_zero, take_name
from weightcast.sync.errors import StorageError
from weightcast.trainer.checkpoint import CONTENT, describe, random_states, rng_file, sharded_state
from weightcast.trainer.checkpoint_folders import LATEST, folder_name
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.events import EventLog
from weightcast.trainer.peft.record import write_record
from weightcast.trainer.state import TrainState
from weightcast.trainer.writer_process import ensure_results_queue

logger = logging.getLogger(__name__)

# Well above Megatron's first file, common.pt, which rank 0 writes alone; with an optimizer it lists the parameters.
_SMALL_FILES_BYTES = 1024 * 1024
_AGAIN = "start the run again: earlier checkpoints are as they were, and the newest of them is resumed"


@dataclass(frozen=True, slots=True)
class _Pending:
    """A checkpoint that is being written."""

    state: TrainState
    step: int
    work: Path
    folder: Path
    strategy: AgreedSave
    request: AsyncRequest
    caller: TemporalAsyncCaller


class Saver:
    """Saves where it is due. Every rank makes one and calls it alike; with `checkpoint.save` null it does nothing.

    Raises `StorageError`, on every rank, when the disk refuses a write; with `checkpoint.async_save` that comes with a
    later call, at the latest on leaving the context. `on_saved` is told of each checkpoint when it is whole.
    """

    def __init__(self, config: ConfigContainer, events: EventLog, on_saved: Callable[[TrainState, Path], None]) -> None:
        self._config = config.checkpoint
        self._events = events
        self._on_saved = on_saved
        self._pending: _Pending | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._pending is not None:  # other ranks may be gone: nothing can be agreed any more
            self._pending.caller.close(abort=True)

    def after_step(self, state: TrainState, *, is_last: bool) -> None:
        """Save where it is due, or see whether the save under way is done. A collective."""
        interval = self._config.save_interval
        if self._config.save is None:
            return
        if is_last or (interval is not None and state.step % interval == 0):
            with self._events.phase("save", version=state.step):
                self.finish()
                self.begin(state)
                if is_last or not self._config.async_save:
                    self.finish()
        elif self._pending is not None and self._pending.caller.is_current_async_call_done(blocking=False):
            self._complete()

    def begin(self, state: TrainState) -> None:
        """Start to save `state` as it is now; later changes of it do not matter. A collective."""
        assert self._config.save is not None and self._pending is None
        root = Path(self._config.save)
        folder = root / folder_name(state.step)
        # A name of its own: what a killed run started may still be writing into the folder of its last save.
        work = root / f".saving-{folder.name}-{_shared_token()}"
        strategy, caller = AgreedSave("torch_dist", 1), TemporalAsyncCaller()
        ensure_results_queue()
        with _discarded_on_error(folder, work):
            on_rank_zero(lambda: _make_room(root, work), f"making room for {folder}")
            request = dist_checkpointing.save(
                sharded_state(state, loading=False),
                str(work),
                sharded_strategy=strategy,
                async_sharded_save=True,
                content_metadata=dict(CONTENT),
                **_megatrons_own_writer(),
            )
            with agreement(f"writing small files for {folder}"):
                save_safetensors(random_states(), work / rng_file(dist.get_rank()))
                if dist.get_rank() == 0:
                    _write_synced(work / "trainer.json", json.dumps(describe(state), indent=1))
                    write_record(state.config, state.model, work)
            if self._config.async_save:
                caller.schedule_async_call(request)
            elif request.async_fn is not None:
                arguments = list(request.async_fn_args)
                arguments[1] = request.preload_fn()
                request.async_fn(*arguments, **request.async_fn_kwargs)
        self._pending = _Pending(state, state.step, work, folder, strategy, request, caller)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name. A collective."""
        if self._pending is not None:
            self._pending.caller.is_current_async_call_done(blocking=True)
            self._complete()

    def _complete(self) -> None:
        assert self._pending is not None
        done, self._pending = self._pending, None
        with _discarded_on_error(done.folder, done.work):
            try:
                done.request.finalize_fns[0]()  # Megatron's: all ranks learn whether all have written
            except CheckpointException as error:
                raise StorageError(_refusal(done.folder, _say_who(error))) from error
            agree(done.strategy.error, f"writing .metadata for {done.folder}")
            on_rank_zero(lambda: self._take_name(done), f"finishing {done.folder}")
        self._on_saved(done.state, done.folder)

    def _take_name(self, done: _Pending) -> None:
        assert self._config.save is not None
        root = Path(self._config.save)
        save_config(CheckpointingConfig(done.strategy.backend, done.strategy.version), str(done.work))
        take_name(done.work, done.folder)
        _write_synced(root / f"{LATEST}.new", str(done.step))
        os.replace(root / f"{LATEST}.new", root / LATEST)
        _remove_old(root, done.folder, self._config.most_recent_k)


@contextmanager
def _discarded_on_error(folder: Path, work: Path) -> Iterator[None]:
    """Remove what was begun when the disk refuses the rest, and say so as one `StorageError`."""
    with explain_disk(folder, _AGAIN):
        try:
            yield
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(work, ignore_errors=True)
            raise


def _megatrons_own_writer() -> dict[str, str]:
    """Megatron 0.17 and newer ask which writer to use, and take NVIDIA's resiliency extension unless told."""
    known = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _shared_token() -> str:
    token = torch.tensor([secrets.randbits(31)], device=current_device())
    dist.broadcast(token, src=0)
    return f"{int(token.item()):08x}"


def _make_room(root: Path, work: Path) -> None:
    for remains in root.glob(".saving-*"):
        shutil.rmtree(remains, ignore_errors=True)
    work.mkdir(parents=True)
    # Megatron writes its first file on rank 0 alone while the others go on; a disk that is full already must show here,
    # where all ranks agree.
    probe = work / "probe"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _SMALL_FILES_BYTES)
    probe.unlink()


def _refusal(folder: Path, why: str) -> str:
    return (
        f"{folder} could not be written: {why}; make room on the disk, or set checkpoint.save to another, and {_AGAIN}"
    )


def _say_who(error: CheckpointException) -> str:
    """The failed ranks; Megatron tells rank 0 alone."""
    return "; ".join(f"rank {rank}: {why[0]}" for rank, why in error.failures.items()) or "rank 0 says why"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove_old(root: Path, newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 that were saved before it; a later step is older where a run began again."""
    others = [path for path in root.glob("iter_*") if path.is_dir() and path != newest]
    others.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in others[: max(len(others) - keep + 1, 0)]:
        shutil.rmtree(path)
