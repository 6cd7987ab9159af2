"""The loss on held-out samples: the forward passes of `train.eval_iters` global batches, and nothing else.

report = evaluate(state, forward_step, validation)
"""

import time

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from weightcast.trainer.data.source import BatchSource, batches_of_rank
from weightcast.trainer.figures import EvalReport
from weightcast.trainer.gpt_step import LOSS, ForwardStep
from weightcast.trainer.losses import sum_losses
from weightcast.trainer.state import TrainState


@torch.no_grad()
def evaluate(state: TrainState, forward_step: ForwardStep, validation: BatchSource) -> EvalReport:
    """Evaluate on the first samples of `validation`, the same each time. Every rank calls it; a collective.

    Dropout is off, and neither random states nor the position in the training data move.
    """
    config, start_s = state.config, time.monotonic()
    state.gather_parameters()
    for chunk in state.model:
        chunk.eval()
    total, num_tokens = 0.0, 0.0
    for iteration in range(config.train.eval_iters):
        micro_batches = batches_of_rank(validation, iteration * config.train.global_batch_size)
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in state.model],
            model=state.model,
            num_microbatches=len(micro_batches),
            seq_length=config.dataset.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=True,
        )
        batch_total, batch_tokens = sum_losses([entry[LOSS] for entry in losses])
        total, num_tokens = total + batch_total, num_tokens + batch_tokens
    for chunk in state.model:
        chunk.train()
    return EvalReport(state.step, total / num_tokens, int(num_tokens), time.monotonic() - start_s)
