"""Context parallelism for attention without Transformer Engine: each rank's queries over everybody's keys and values.

Megatron cuts a sequence into two chunks a rank and gives rank r of n the chunks r and 2n - 1 - r, so that under a
causal mask all ranks have as much to do (`get_batch_on_this_cp_rank` in megatron/core/utils.py). Keys and values are
gathered as they lie, and masks are made from positions, so nothing is put back into order.

    query_at = positions_of_rank(len(query), rank=group.rank(), size=group.size())
    key, key_at = gather_sequence(key, group), positions_of_all(len(key), group.size())
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from weightcast.sync.errors import ConfigError


def positions_of_rank(num_here: int, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Where the `num_here` tokens of `rank` are in the sequence: int64 [num_here].

    Raises `ConfigError` for an odd number, which is not two chunks.
    """
    chunk, odd = divmod(num_here, 2)
    if odd:
        raise ConfigError(
            f"a sequence with {num_here} tokens on each of {size} context parallel ranks is not cut into two chunks a "
            f"rank; pad sequences to a multiple of {2 * size} tokens, or set context_parallel_size=1"
        )
    first = torch.arange(chunk, device=device)
    return torch.cat([first + rank * chunk, first + (2 * size - 1 - rank) * chunk])


def positions_of_all(num_here: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """The positions of all ranks' tokens, one rank behind the other: int64 [size * num_here]."""
    return torch.cat([positions_of_rank(num_here, rank, size, device) for rank in range(size)])


def gather_sequence(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The parts [s, ...] of every rank, one behind the other: [size * s, ...]; its gradient is summed over the ranks.

    A collective of `group`, in the forward and in the backward.
    """
    whole: torch.Tensor = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    return whole
