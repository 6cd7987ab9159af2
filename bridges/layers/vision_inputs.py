"""What a language model that sees is given besides tokens, checked against the tokens that stand for it.

vision = VisionInputs(pixel_values=patches, image_grid_thw=grids)
vision.check(hf_config, input_ids, positions_given=False)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from weightcast.bridges.runtime import has_transformer_engine
from weightcast.sync.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class VisionInputs:
    """Images and videos of a batch, in the order of their tokens; the names are HF's.

    Pixels are [patches, numbers a patch]; grids [images, 3]: time, height and width in patches.
    """

    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None
    pixel_values_videos: torch.Tensor | None = None
    video_grid_thw: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return self.pixel_values is not None or self.pixel_values_videos is not None

    def present(self, hf: PretrainedConfig) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The token, the pixels and the grids of what there is: images first, as in transformers."""
        if self.pixel_values is not None and self.image_grid_thw is not None:
            yield hf.image_token_id, self.pixel_values, self.image_grid_thw
        if self.pixel_values_videos is not None and self.video_grid_thw is not None:
            yield hf.video_token_id, self.pixel_values_videos, self.video_grid_thw

    def check(self, hf: PretrainedConfig, input_ids: torch.Tensor, *, positions_given: bool) -> None:
        """Raise `ConfigError` unless there are as many tokens for images and videos as the grids make.

        Pixels may be missing: only the first pipeline stage looks at them. Grids may be missing where positions are
        given, because then nothing else is made of them.
        """
        kinds = (
            ("image", hf.image_token_id, self.pixel_values, self.image_grid_thw),
            ("video", hf.video_token_id, self.pixel_values_videos, self.video_grid_thw),
        )
        for kind, token, pixels, grids in kinds:
            if grids is None and pixels is not None:
                raise ConfigError(f"{kind} pixels came without {kind}_grid_thw; pass it, on every pipeline stage")
            if grids is None and positions_given:
                continue
            wanted = 0 if grids is None else int(grids.prod(-1).sum()) // hf.vision_config.spatial_merge_size**2
            num_tokens = int((input_ids == token).sum())
            if num_tokens != wanted:
                raise ConfigError(
                    f"there are {num_tokens} {kind} tokens (id {token}) and {kind}_grid_thw makes {wanted}; "
                    f"pass the {kind}s of these tokens, all of them and no others, on every pipeline stage"
                )


def hidden_positions(seen: torch.Tensor) -> torch.Tensor | None:
    """HF's `attention_mask` [batch, s] as Megatron's: bool [batch, 1, s, s], True where a query must not see a key.

    None where causal attention says it all: without padding, and with padding on the right, which no token in front
    of it sees. A padding token sees itself, because attention to nothing is not a number.
    """
    keep = seen.bool()
    if not (keep[:, 1:] & ~keep[:, :-1]).any():
        return None
    if has_transformer_engine():
        raise ConfigError(
            "attention_mask has padding in front of tokens, and Transformer Engine's causal attention takes no mask; "
            "pad on the right"
        )
    itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    return ~(keep[:, None, None, :] | itself)
