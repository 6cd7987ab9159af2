"""The helper process that carries what checkpoint writers report, made to end with its rank and not before.

Megatron makes a `multiprocessing` manager for it at the first save (`_get_write_results_queue`, 0.16.1). A manager ends
when its parent leaves in good order; when the parent is killed, it stays for ever with a few hundred megabytes. A
scheduler (Slurm) sends a signal to all processes of a job, helpers too, and what the signal asks for is a checkpoint.

    ensure_results_queue()
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from weightcast.trainer.stopping import SIGNALS

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def ensure_results_queue() -> None:
    """Make Megatron's queue of writers' results ours, unless there is one. Idempotent; each rank for itself."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(_end_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _end_with_parent(parent: int) -> None:
    """In the helper: have the kernel end it when the thread that started it is gone (Linux; elsewhere it stays).

    What makes the rank save and leave does not end the helper, without which it could not save.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
