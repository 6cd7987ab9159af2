"""A batch as one rank of context parallelism sees it: two chunks of each sequence, one from either end.

Every rank of a context-parallel group reads the same samples and keeps its own tokens, as Megatron cuts them
(`get_batch_on_this_cp_rank` in megatron/core/utils.py). Positions are cut along with the tokens, and the loss is summed
over all ranks, so the curve is that of one rank.

    batch = cut_along_sequence(batch, rank=parallel_state.get_context_parallel_rank(), size=2)
"""

from dataclasses import replace

from weightcast.bridges.layers.context_parallel import positions_of_rank
from weightcast.trainer.data.samples import Batch


def cut_along_sequence(batch: Batch, *, rank: int, size: int) -> Batch:
    """The part of `batch` that context-parallel `rank` of `size` computes; `batch` itself for one rank.

    Every tensor of [micro_batch_size, seq_length] becomes [micro_batch_size, seq_length / size].
    """
    if size == 1:
        return batch
    length = batch.tokens.shape[1]
    at = positions_of_rank(length // size, rank, size, batch.tokens.device)
    return replace(
        batch,
        tokens=batch.tokens.index_select(1, at),
        labels=batch.labels.index_select(1, at),
        loss_mask=batch.loss_mask.index_select(1, at),
        position_ids=batch.position_ids.index_select(1, at),
    )
