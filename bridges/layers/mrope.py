"""Multimodal rope: each token has three positions (time, height, width), and each rotated pair turns by one of them.

Tokens of text have three times the same position, so that text alone is rotated as by a plain rope. An image's tokens
have the places of their patches, and a video's the time of their frame as well. Frequencies are those of a `Rope`;
positions are computed by transformers' own function, because its numbering of videos has changed between versions.

    positions = rope_index(hf_config, input_ids, image_grid_thw=grids)
    angles = MultimodalRope(rope, head_dim=128, sections=(16, 24, 24))(positions)
"""

import inspect
from collections.abc import Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from weightcast.bridges.layers.rope import Rope, inverse_frequencies

TEXT, IMAGE, VIDEO = 0, 1, 2  # kinds of tokens, as transformers numbers them in `mm_token_type_ids`


class MultimodalRope(nn.Module):
    """Angles of rotation for positions of the shape [3, batch, s]; stands where `GPTModel` has its own for "mrope".

    Megatron's multiplies positions and frequencies as matrices, which a GPU may do in TF32; here they are multiplied
    one by one, in fp32, as in transformers.
    """

    def __init__(self, rope: Rope, head_dim: int, sections: Sequence[int]) -> None:
        super().__init__()
        self.sections = list(sections)
        self.inv_freq = inverse_frequencies(rope, head_dim)  # no buffer, so that it stays in fp32

    def forward(
        self, position_ids: torch.Tensor, mrope_section: object = None, cp_group: object = None
    ) -> torch.Tensor:
        """Angles fp32 [s, batch, 1, head_dim]. The other arguments are those that `GPTModel` passes besides."""
        angles = position_ids[..., None].float() * self.inv_freq.to(position_ids.device)
        parts = torch.split_with_sizes(angles, self.sections, dim=-1)
        chosen = torch.cat([part[number % 3] for number, part in enumerate(parts)], dim=-1)
        return torch.cat((chosen, chosen), dim=-1).transpose(0, 1)[:, :, None].contiguous()


def token_kinds(hf: PretrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """`TEXT`, `IMAGE` or `VIDEO` for each token."""
    kinds = torch.full_like(input_ids, TEXT)
    kinds[input_ids == hf.image_token_id] = IMAGE
    kinds[input_ids == hf.video_token_id] = VIDEO
    return kinds


def rope_index(
    hf: PretrainedConfig,
    input_ids: torch.Tensor,
    *,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    second_per_grid_ts: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Positions [3, batch, s] of `input_ids` [batch, s], as the installed transformers computes them.

    `image_grid_thw` and `video_grid_thw` hold time, height and width in patches, one row an image or video;
    `second_per_grid_ts` the seconds between a video's frames; `attention_mask` [batch, s] is 1 for tokens and 0 for
    padding, which is passed over where there are images. Text alone is counted from the first column on.
    """
    if image_grid_thw is None and video_grid_thw is None:
        count = torch.arange(input_ids.shape[1], device=input_ids.device)
        return count.expand(3, *input_ids.shape)
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    # The function is a method that reads nothing of its model but the configuration.
    model = SimpleNamespace(config=hf)
    if hasattr(Qwen2_5_VLModel, "get_vision_position_ids"):
        model.get_vision_position_ids = MethodType(Qwen2_5_VLModel.get_vision_position_ids, model)
    inputs: dict[str, Any] = {
        "image_grid_thw": image_grid_thw,
        "video_grid_thw": video_grid_thw,
        "second_per_grid_ts": second_per_grid_ts,
        "attention_mask": attention_mask,
    }
    # Before transformers 5.3 it found the kinds of tokens by itself.
    if "mm_token_type_ids" in inspect.signature(Qwen2_5_VLModel.get_rope_index).parameters:
        inputs["mm_token_type_ids"] = token_kinds(hf, input_ids)
    positions: torch.Tensor = Qwen2_5_VLModel.get_rope_index(model, input_ids, **inputs)[0]
    return positions
