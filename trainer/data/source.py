"""Where a step's samples come from, whatever they are made of, and which of them a rank computes.

batches = batches_of_rank(source, consumed_samples=0)
"""

from typing import Protocol

from megatron.core import parallel_state

from weightcast.trainer.data.context_parallel import cut_along_sequence
from weightcast.trainer.data.samples import Batch


class BatchSource(Protocol):
    """Samples in an order that the position alone decides, so that a resume needs one number."""

    def of_step(self, *, consumed_samples: int, data_parallel_rank: int, data_parallel_size: int) -> list[Batch]:
        """A data-parallel rank's micro-batches of the step that starts after `consumed_samples` samples."""
        ...


def batches_of_rank(source: BatchSource, consumed_samples: int) -> list[Batch]:
    """This rank's micro-batches of the step that starts after `consumed_samples` samples.

    Tensor- and pipeline-parallel ranks have the same ones; context-parallel ranks have their part of each sequence.
    """
    whole = source.of_step(
        consumed_samples=consumed_samples,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return [cut_along_sequence(batch, rank=rank, size=size) for batch in whole]
