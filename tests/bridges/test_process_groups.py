"""Process groups that are closed leave nothing behind, however often other sizes are set up."""

import os

import pytest
import torch
import torch.distributed as dist
from tests.ranks import run_ranks

from weightcast.bridges.process_groups import destroy_model_parallel, initialize_model_parallel


def count_threads() -> list[int]:
    """This process's threads while groups of several sizes in turn are open, and after each was closed."""
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig

    counts = []
    for sizes in ({"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}) * 2:
        initialize_model_parallel(ModelParallelConfig(**sizes))
        dist.all_reduce(torch.zeros(1), group=parallel_state.get_model_parallel_group())
        counts.append(len(os.listdir("/proc/self/task")))
        destroy_model_parallel()
        counts.append(len(os.listdir("/proc/self/task")))
    dist.barrier()  # the default group is still there
    return counts


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux tells of a process's threads this way")
def test_closed_groups_leave_no_threads() -> None:
    for counts in run_ranks(count_threads, 2):
        opened, closed = counts[::2], counts[1::2]
        assert min(opened) > max(closed) + 10
        assert closed == [closed[0]] * len(closed)
