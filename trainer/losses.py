"""A global batch's loss from what each rank has of it.

total, num_tokens = sum_losses([entry[LOSS] for entry in losses])
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from weightcast.bridges.runtime import current_device


def sum_losses(parts: list[torch.Tensor]) -> tuple[float, float]:
    """The sum of losses and the number of unmasked tokens over the global batch, on every rank. A collective.

    `parts` are [sum of losses, number of tokens] of each micro-batch on the last pipeline stage, and empty on the
    others.
    """
    total = torch.zeros(2, dtype=torch.float64, device=current_device())
    for part in parts:
        total += part
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last_stage = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(total, src=last_stage, group=parallel_state.get_pipeline_model_parallel_group())
    loss, num_tokens = total.tolist()
    return loss, num_tokens
