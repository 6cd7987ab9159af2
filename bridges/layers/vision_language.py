"""A language model that sees: transformers' own vision tower in front of a chunk of Megatron's GPT model.

The tower is a copy on every tensor parallel rank of the first pipeline stage. Its outputs take the places of the image
and video tokens among the embeddings; from there on the ranks share the work as for text. Every rank computes the same
gradients for its copy, and `finalize_model_grads` averages them, so that kernels whose sums differ in the last bit
cannot drive the copies apart.

    model = VisionLanguageModel(provider, build_gpt(provider, True, True, None), build_tower(provider))
    logits = model(input_ids, pixel_values=patches, image_grid_thw=grids)
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import nn

from weightcast.bridges.layers.mrope import rope_index
from weightcast.bridges.layers.vision_inputs import VisionInputs, hidden_positions
from weightcast.sync.errors import ConfigError

if TYPE_CHECKING:
    from weightcast.bridges.provider_vl import Qwen25VLModelProvider


def build_tower(provider: "Qwen25VLModelProvider") -> nn.Module:
    """The vision tower with random weights, the same on every rank that asks: they follow from the provider's seed."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    assert provider.hf_config is not None
    config = copy.deepcopy(provider.hf_config.vision_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(provider.seed)
        tower: Any = Qwen2_5_VisionTransformerPretrainedModel._from_config(
            config, dtype=provider.params_dtype, attn_implementation=provider.vision_attention
        )
    tower.rotary_pos_emb.keeps_fp32_buffers = True
    for parameter in tower.parameters():
        parameter.average_gradients_across_tp_domain = True
        parameter.requires_grad = not provider.freeze_vision_model
    for parameter in tower.merger.parameters():
        parameter.requires_grad = not provider.freeze_vision_projection
    result: nn.Module = tower.train()
    return result


class VisionLanguageModel(MegatronModule):  # type: ignore[misc]
    """One chunk: `language_model` and, on the first pipeline stage, `visual`."""

    def __init__(
        self, config: "Qwen25VLModelProvider", language_model: GPTModel, visual: nn.Module | None = None
    ) -> None:
        super().__init__(config=config)
        self.visual = visual
        self.language_model = language_model
        # Megatron's schedules, wrappers and `finalize_model_grads` read these of a chunk.
        self.pre_process: bool = language_model.pre_process
        self.post_process: bool = language_model.post_process
        self.model_type = language_model.model_type
        self.vp_stage = language_model.vp_stage
        self.pg_collection = language_model.pg_collection
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the hidden states of the stage before; called by Megatron's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied weight, where this chunk has a copy; `finalize_model_grads` sums their gradients."""
        weight: torch.Tensor | None = self.language_model.shared_embedding_or_output_weight()
        return weight

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [batch, s, vocabulary] or, with `labels` [batch, s], losses [batch, s]; hidden states between stages.

        The arguments are those of the HF model, and the same on every pipeline stage; only the first one looks at the
        pixels. `position_ids` are [3, batch, s], or [batch, s] for text alone; by default they are computed, which
        needs the grids. `attention_mask` is HF's, [batch, s] with 0 for padding, or Megatron's, bool and of four
        dimensions with True where a query must not see a key. Raises `ConfigError` when grids, pixels and the tokens
        that stand for them do not match.
        """
        seen = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        vision = VisionInputs(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        vision.check(self.config.hf_config, input_ids, positions_given=position_ids is not None)
        if position_ids is None:
            positions = rope_index(
                self.config.hf_config,
                input_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts,
                attention_mask=seen,
            )
        else:
            positions = _three_positions(position_ids)
        hidden = hidden_positions(seen) if seen is not None else attention_mask
        embeddings = self._embed(input_ids, vision) if self.pre_process else None
        output: torch.Tensor = self.language_model(
            input_ids, positions, hidden, decoder_input=embeddings, labels=labels
        )
        return output

    def _embed(self, input_ids: torch.Tensor, vision: VisionInputs) -> torch.Tensor:
        """Embeddings [s, batch, hidden] of all tokens, this rank's part of s under sequence parallelism."""
        assert self.visual is not None
        embeddings: torch.Tensor = self.language_model.embedding(input_ids=input_ids, position_ids=None).transpose(0, 1)
        for token, pixels, grids in vision.present(self.config.hf_config):
            features = self.visual(pixels, grid_thw=grids).pooler_output
            embeddings = embeddings.masked_scatter((input_ids == token)[..., None], features.to(embeddings.dtype))
        if not vision and torch.is_grad_enabled():
            embeddings = embeddings + _no_gradient_but_zero(self.visual)
        embeddings = embeddings.transpose(0, 1).contiguous()
        if not self.config.sequence_parallel:
            return embeddings
        group = self.pg_collection.tp
        if embeddings.shape[0] % group.size():
            raise ConfigError(
                f"{embeddings.shape[0]} tokens do not divide by tensor_model_parallel_size={group.size()}, which "
                "sequence_parallel needs; pad them on the right to a multiple of it"
            )
        scattered: torch.Tensor = scatter_to_sequence_parallel_region(embeddings, group=group)
        return scattered


def _three_positions(position_ids: torch.Tensor) -> torch.Tensor:
    if position_ids.dim() == 2:
        return position_ids.expand(3, -1, -1)
    if position_ids.dim() == 3 and position_ids.shape[0] == 3:
        return position_ids
    raise ConfigError(
        f"position_ids have shape {tuple(position_ids.shape)}; give [3, batch, s], [batch, s] for text alone, or None "
        "to have them computed"
    )


def _no_gradient_but_zero(tower: nn.Module) -> torch.Tensor:
    """Zero, with a gradient of zero for each trained weight of `tower`.

    Data parallelism that overlaps with the backward waits for every parameter's gradient, and text brings none.
    """
    zero = torch.zeros((), device=next(tower.parameters()).device)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            zero = zero + 0.0 * parameter.flatten()[0]
    return zero
