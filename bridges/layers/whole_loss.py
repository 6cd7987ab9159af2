"""The cross entropy of a rank that has the whole vocabulary: torch's own kernel, or a compiled one.

Megatron's, made for a vocabulary that is split over ranks, goes over the logits about ten times; torch's goes over them
twice. The value is the same up to rounding.

    use_whole_loss(model)
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel

from weightcast.bridges.layers.compiled import compiled, row_losses


def use_whole_loss(model: GPTModel) -> None:
    """Let `model` compute its loss with torch where its output layer is not split and no fused kernel is asked for."""
    if model.pg_collection.tp.size() == 1 and not model.config.cross_entropy_loss_fusion:
        kernel = compiled(row_losses) if model.config.uses_compiled_kernels else row_losses
        model.compute_language_model_loss = partial(whole_cross_entropy, losses_of=kernel)


def whole_cross_entropy(
    labels: torch.Tensor,
    logits: torch.Tensor,
    losses_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = row_losses,
) -> torch.Tensor:
    """Labels [batch, seq] and logits [seq, batch, vocabulary] to the loss of each token, fp32 [batch, seq].

    `losses_of` takes logits [rows, vocabulary] and labels [rows].
    """
    rows = labels.transpose(0, 1).flatten()
    losses = losses_of(logits.flatten(0, 1), rows)
    return losses.view(labels.shape[1], labels.shape[0]).transpose(0, 1).contiguous()
