"""The provider of Qwen2.5-VL: `GPTModelProvider` for the language model, with the vision tower's configuration.

provider = AutoBridge.from_hf_pretrained("path/to/qwen2.5-vl").to_megatron_provider()
provider.freeze_vision_model = True
"""

from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer.module import MegatronModule
from transformers import PretrainedConfig

from weightcast.bridges.layers.mrope import MultimodalRope
from weightcast.bridges.layers.vision_language import VisionLanguageModel, build_tower
from weightcast.bridges.provider import GPTModelProvider
from weightcast.sync.errors import ConfigError


@dataclass
class Qwen25VLModelProvider(GPTModelProvider):
    """A GPT model with multimodal rope behind transformers' vision tower. The fields of a GPT model are its text's."""

    hf_config: PretrainedConfig | None = None
    """The HF configuration of the whole: token ids, the vision tower, how positions are counted."""
    vision_attention: str = "sdpa"
    """The attention of the vision tower, by its name in transformers: "sdpa", "eager", "flash_attention_2"."""
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    """Keep the weights of the vision tower, without those that `freeze_vision_projection` is about."""
    freeze_vision_projection: bool = False
    """Keep the weights of the merger between the vision tower and the language model."""

    position_embedding_type: Literal["rope", "mrope"] = "mrope"
    scatter_embedding_sequence_parallel: bool = False
    """The ranks part the sequence only when images are in their places."""

    def finalize(self) -> None:
        """As `GPTModelProvider.finalize`, with the checks of what a model that sees does not do. Raises ConfigError."""
        check_vision_language(self)
        self.apply_rope_fusion = False  # the fused kernel takes one position a token for the whole batch
        super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> MegatronModule:
        """One chunk, as of `GPTModelProvider.provide`; the first one has the vision tower."""
        language_model = super().provide(pre_process, post_process, vp_stage)
        assert self.mrope_section is not None
        language_model.rotary_pos_emb = MultimodalRope(self.rope(), self.kv_channels, self.mrope_section)
        if self.freeze_language_model:
            language_model.requires_grad_(False)
        return VisionLanguageModel(self, language_model, build_tower(self) if language_model.pre_process else None)


def check_vision_language(provider: Qwen25VLModelProvider) -> None:
    """Settings that a model that sees cannot have."""
    if provider.hf_config is None or provider.mrope_section is None:
        raise ConfigError(
            "hf_config and mrope_section must be set; take the provider from AutoBridge.to_megatron_provider()"
        )
    if 2 * sum(provider.mrope_section) != provider.kv_channels:
        raise ConfigError(
            f"mrope_section={provider.mrope_section} names {sum(provider.mrope_section)} pairs, and a head has "
            f"{provider.kv_channels} dimensions; its sum must be half of that"
        )
    if provider.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size={provider.context_parallel_size} is not supported: images would have to be cut "
            "as their tokens are; set context_parallel_size=1"
        )
    if provider.scatter_embedding_sequence_parallel:
        raise ConfigError(
            "scatter_embedding_sequence_parallel=True would part the sequence before images are in their places; "
            "set it to False"
        )
