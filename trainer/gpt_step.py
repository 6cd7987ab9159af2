"""One micro-batch through a GPT model: what Megatron's schedules call, once a micro-batch.

The loss is the cross entropy summed over the unmasked tokens, together with their number; the schedule and
`finalize_model_grads` divide, so the mean is one per token. A training script may bring its own `forward_step`
of this shape.

    pretrain(cfg, forward_step)
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
from weightcast.trainer.data.samples import Batch

from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]
ForwardStep = Callable[..., tuple[Any, LossFunction]]
"""Takes the iterator of micro-batches and the model; with `comm_overlap.overlap_moe_expert_parallel_comm` it is called
with the keyword `return_schedule_plan=True` as well."""
LOSS = "lm loss"


def forward_step(
    data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """Run the next micro-batch; returns the model's output and the function that turns it into a loss.

    On the last pipeline stage the output is the cross entropy of each token, [micro_batch_size, seq_length]; on
    the others it is the hidden state that goes to the next stage, and the schedule does not call the function.
    `return_schedule_plan` gives, in place of the output, Megatron's plan of how to compute it: with overlapped experts
    the schedule runs two micro-batches side by side.
    """
    batch = next(data_iterator).to(next(model.parameters()).device)
    if return_schedule_plan:
        plan = model.build_schedule_plan(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return plan, partial(masked_loss, batch.loss_mask)
    # No mask tensor: the attention of every supported layer spec is causal by itself.
    packed = {} if batch.cu_seqlens is None else {"packed_seq_params": packed_seq_params(batch)}
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, **packed)
    return output, partial(masked_loss, batch.loss_mask)


def packed_seq_params(batch: Batch) -> PackedSeqParams:
    """What attention and rotary embeddings are told of a packed batch, in the terms of Transformer Engine's `thd`."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def masked_loss(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the unmasked tokens' losses, their number (int32), and both as float64 for the report."""
    total = (token_losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    report = torch.stack([total.detach().double(), num_tokens.double()])
    return total, num_tokens.to(torch.int32), {LOSS: report}
