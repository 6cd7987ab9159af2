"""The cross entropy of a rank that has the whole vocabulary: torch's own kernel.

Megatron's, made for a vocabulary that is split over ranks, goes over the logits about ten times; torch's goes over them
twice. The value is the same up to rounding.

    use_whole_loss(model)
"""

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn


def use_whole_loss(model: GPTModel) -> None:
    """Let `model` compute its loss with torch where its output layer is not split and no fused kernel is asked for."""
    if model.pg_collection.tp.size() == 1 and not model.config.cross_entropy_loss_fusion:
        model.compute_language_model_loss = whole_cross_entropy


def whole_cross_entropy(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels [batch, seq] and logits [seq, batch, vocabulary] to the loss of each token, fp32 [batch, seq]."""
    rows = labels.transpose(0, 1).flatten()
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows, reduction="none")
    return losses.view(labels.shape[1], labels.shape[0]).transpose(0, 1).contiguous()
