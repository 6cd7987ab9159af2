"""Builds one chunk of a GPT model from a provider: Megatron's `GPTModel` with this folder's layers and ropes."""

from typing import TYPE_CHECKING

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from weightcast.bridges.layers.mtp import PredictingGPTModel
from weightcast.bridges.layers.rope import RopeEmbedding, RopePerKindOfLayer
from weightcast.bridges.layers.specs import block_spec, prediction_spec
from weightcast.bridges.layers.whole_loss import use_whole_loss

if TYPE_CHECKING:
    from weightcast.bridges.provider import GPTModelProvider


def scale_output(module: nn.Module, factor: float) -> None:
    """Multiply what `module` puts out by `factor`, rounded to the output's dtype first as HF's Gemma does."""

    def scaled(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * torch.tensor(factor, dtype=output.dtype, device="cpu").item()

    module.register_forward_hook(scaled)


def mask_padding(output_layer: nn.Module, vocab_size: int, rank: int) -> None:
    """Set the logits of Megatron's padding tokens to the dtype's lowest value, so that they have no probability.

    The loss, its gradients and log-probabilities are then those of the HF model, which has no such tokens. Megatron
    leaves them in the softmax. `rank` is this rank's place in the tensor parallel group.
    """

    def masked(layer: nn.Module, inputs: object, output: tuple[torch.Tensor, object]) -> tuple[torch.Tensor, object]:
        logits = output[0]
        is_shard = logits.shape[-1] == layer.output_size_per_partition
        first = rank * logits.shape[-1] if is_shard else 0
        padding = max(vocab_size - first, 0)
        if padding < logits.shape[-1]:
            # In place: nothing needs the product's own values for the backward.
            logits[..., padding:] = torch.finfo(logits.dtype).min
        return output

    output_layer.register_forward_hook(masked)


def softcap_logits(output_layer: nn.Module, cap: float) -> None:
    """Squeeze the logits smoothly into (-cap, cap), as HF's Gemma 2 does: cap * tanh(logits / cap)."""

    def capped(layer: nn.Module, inputs: object, output: tuple[torch.Tensor, object]) -> tuple[torch.Tensor, object]:
        return torch.tanh(output[0] / cap) * cap, output[1]

    output_layer.register_forward_hook(capped)


def rope_module(provider: "GPTModelProvider", cp_group: object) -> RopeEmbedding:
    """The rotary embedding for the provider's settings."""
    rope, local = provider.rope(), provider.local_rope()
    if local is None:
        return RopeEmbedding(rope, provider.kv_channels, provider.rotary_interleaved, cp_group)
    return RopePerKindOfLayer(rope, local, provider.kv_channels, provider.rotary_interleaved, cp_group)


def build_gpt(provider: "GPTModelProvider", pre_process: bool, post_process: bool, vp_stage: int | None) -> GPTModel:
    """One chunk of the model on this rank: the layers of (pipeline rank, `vp_stage`), embedding and output as told.

    Every rank of a tied model calls it in the same order: Megatron sums the two copies of a tied embedding.
    """
    prediction = prediction_spec(provider, vp_stage)
    model = (PredictingGPTModel if provider.mtp_num_layers else GPTModel)(
        config=provider,
        mtp_block_spec=prediction,
        transformer_layer_spec=block_spec(provider, vp_stage),
        vocab_size=provider.padded_vocab_size,
        max_sequence_length=provider.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=provider.fp16_lm_cross_entropy,
        parallel_output=provider.parallel_output,
        share_embeddings_and_output_weights=provider.share_embeddings_and_output_weights,
        position_embedding_type=provider.position_embedding_type,
        rotary_percent=provider.rotary_percent,
        rotary_base=provider.rotary_base,
        scatter_embedding_sequence_parallel=provider.scatter_embedding_sequence_parallel,
        vp_stage=vp_stage,
    )
    if provider.position_embedding_type == "rope":
        model.rotary_pos_emb = rope_module(provider, model.pg_collection.cp)
    if (pre_process or prediction is not None) and provider.embedding_scale is not None:
        scale_output(model.embedding, provider.embedding_scale)
    if post_process and provider.final_logit_softcapping is not None:
        softcap_logits(model.output_layer, provider.final_logit_softcapping)  # before the padding is masked
    if post_process and provider.mask_padded_vocabulary:
        mask_padding(model.output_layer, provider.vocab_size, model.pg_collection.tp.rank())
    if post_process and not provider.mtp_num_layers:  # those that predict more have a loss of their own
        use_whole_loss(model)
    return model
