"""The provider of models with multi-head latent attention: `GPTModelProvider` with Megatron's `MLATransformerConfig`.

provider = AutoBridge.from_hf_pretrained("path/to/deepseek").to_megatron_provider()
provider.kv_lora_rank, provider.rope_type
"""

from dataclasses import dataclass

from megatron.core.transformer import MLATransformerConfig

from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.runtime import has_transformer_engine
from weightcast.sync.errors import ConfigError

_ROPE_TYPES = ("rope", "yarn")


@dataclass
class MLAModelProvider(GPTModelProvider, MLATransformerConfig):  # type: ignore[misc]
    """A GPT model with latent attention. Its rope is the attention's own: `rope_type` and the YaRN fields say which."""

    # Again, because a dataclass takes the fields of its first base last, and those include TransformerConfig's.
    multi_latent_attention: bool = True
    normalization: str = "RMSNorm"

    latent_layernorm_epsilon: float = 1e-6
    """Epsilon of the norms of the latents, which HF's DeepSeek models do not take from the configuration."""

    moe_router_group_score_experts: int | None = None
    """How many of a group's best experts make its score; None is Megatron's own number, topk / groups chosen."""

    def finalize(self) -> None:
        """As `GPTModelProvider.finalize`, with the checks of latent attention. Raises ConfigError."""
        check_latent_attention(self)
        if self.moe_router_group_score_experts is not None:
            self.moe_router_fusion = False  # the fused kernel has Megatron's own number built in
        super().finalize()


def check_latent_attention(provider: MLAModelProvider) -> None:
    """Ranks of the latents against tensor parallelism, and the kind of rope."""
    if provider.rope_type not in _ROPE_TYPES:
        raise ConfigError(
            f"rope_type={provider.rope_type!r} is not known to latent attention; use one of {_ROPE_TYPES}"
        )
    size = provider.tensor_model_parallel_size
    if has_transformer_engine() or size == 1:
        return
    # Without Transformer Engine the linears that make the latents are split over the tensor parallel ranks.
    rows = {"kv_lora_rank + qk_pos_emb_head_dim": provider.kv_lora_rank + provider.qk_pos_emb_head_dim}
    if provider.q_lora_rank is not None:
        rows["q_lora_rank"] = provider.q_lora_rank
    for what, value in rows.items():
        if value % size != 0:
            raise ConfigError(
                f"{what}={value} is not a multiple of tensor_model_parallel_size={size}; choose a "
                "tensor_model_parallel_size that divides it"
            )
