"""A model before it is built: every setting of Megatron's `TransformerConfig`, and what makes a GPT model of it.

A provider is what a bridge makes of an HF configuration. Set the parallel sizes (or anything else) on it, `finalize()`
it, which checks the settings against each other, and ask for the model on every rank. The provider is the model's
Megatron config from then on.

    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from weightcast.bridges.layers.gpt import build_gpt
from weightcast.bridges.layers.rope import LongRope, Rope, Yarn, tell_attention_factor
from weightcast.bridges.process_groups import initialize_distributed, initialize_model_parallel
from weightcast.bridges.provider_checks import (
    check_compiled_kernels,
    check_layout,
    check_precision,
    padded_vocab_size,
    spell_whole_graphs,
    turn_off_fusions,
    turn_on_compiled_fusions,
)
from weightcast.bridges.runtime import can_compile_kernels, ensure_runtime, has_cuda, has_transformer_engine
from weightcast.bridges.wrapping import wrap_chunks
from weightcast.sync.errors import ConfigError

ModelHook = Callable[[list[MegatronModule]], list[MegatronModule] | None]
"""Gets the model's chunks on this rank and returns their replacements, or None to keep them."""


class _Hooks(list[ModelHook]):
    """Hooks to run in order. Megatron deep-copies its config; the copies share these instead of copying bridges."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@dataclass
class GPTModelProvider(TransformerConfig):  # type: ignore[misc]
    """`TransformerConfig` and the arguments of `GPTModel` in one record; fields are checked by `finalize()` only."""

    vocab_size: int = 0
    """Tokens of the HF model; Megatron's embedding has `padded_vocab_size` rows."""
    make_vocab_size_divisible_by: int = 128
    """The embedding's rows are padded to a multiple of this times the tensor parallel size."""
    padded_vocab_size: int | None = None
    """Set by `finalize()`."""
    mask_padded_vocabulary: bool = True
    """Give the padding tokens no probability, so that losses are those of the HF model."""
    seq_length: int = 4096
    """Longest sequence in tokens."""
    share_embeddings_and_output_weights: bool = False
    fp16_lm_cross_entropy: bool = False
    parallel_output: bool = True
    """Leave the logits split over the tensor parallel ranks along the vocabulary."""
    scatter_embedding_sequence_parallel: bool = True

    position_embedding_type: Literal["rope", "mrope"] = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    seq_len_interpolation_factor: float | None = None
    """Linear scaling: positions are divided by this."""
    rope_scaling: bool = False
    """Llama 3's scaling, by the four numbers below."""
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    rope_extension: Yarn | LongRope | None = None
    """YaRN's or LongRoPE's scaling, with all of its numbers."""
    rotary_base_local: float | None = None
    """Base for the layers with a sliding window, without scaling, where it differs from the others' (Gemma 3)."""

    qkv_bias: bool | None = None
    """Bias of the query, key and value projections; None follows `add_bias_linear` or `add_qkv_bias`."""
    attention_output_bias: bool | None = None
    """Bias of the attention's output projection; None follows `add_bias_linear`."""
    mlp_bias: bool | None = None
    """Biases of the MLP; None follows `add_bias_linear`."""
    moe_bias: bool = False
    """Biases of the router and of the experts (gpt-oss), in any layout; `add_bias_linear` needs whole experts."""
    post_norms: bool = False
    """Norms behind attention and MLP as well as before them (Gemma 2 and 3)."""
    embedding_scale: float | None = None
    """What token embeddings are multiplied with (Gemma)."""
    attn_logit_softcapping: float | None = None
    """Attention scores are squeezed into (-cap, cap) before the softmax (Gemma 2)."""
    final_logit_softcapping: float | None = None
    """Logits are squeezed into (-cap, cap) (Gemma 2)."""

    mtp_num_layers: int | None = None
    """Layers for multi-token prediction; `None` builds none of those that the checkpoint has."""

    compiled_kernels: bool | None = None
    """Whether elementwise work is fused by torch.compile (rotations, SwiGLU, the loss); None fuses it for weights of 16
    bits on a GPU without Transformer Engine, where there are Triton and a C compiler."""

    autocast_dtype: torch.dtype | None = None
    """What `enable_autocast` computes in; `finalize()` takes the parameters' dtype where it is None."""

    seed: int = 1234
    """Seed of the initial weights and of dropout."""
    pre_wrap_hooks: _Hooks = field(default_factory=_Hooks, repr=False)

    def __post_init__(self) -> None:
        """Leave Megatron's own checks to `finalize()`: sizes are set one by one after construction."""

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute and hold parameters in `dtype`: the three settings that Megatron reads it from, together."""
        self.params_dtype = dtype
        self.bf16 = dtype == torch.bfloat16
        self.fp16 = dtype == torch.float16

    def finalize(self) -> None:
        """Check the settings against each other and derive the rest; no collective, may be called again.

        Raises ConfigError naming the settings in conflict, what is allowed, and the remedy.
        """
        check_layout(self)
        check_precision(self)
        check_compiled_kernels(self)
        turn_off_fusions(self)
        if self.uses_compiled_kernels:
            turn_on_compiled_fusions(self)
        spell_whole_graphs(self)
        if not has_cuda():
            self.use_cpu_initialization = True
        self.mtp_num_layers = self.mtp_num_layers or None  # Megatron 0.16 takes 0 for some
        if self.virtual_pipeline_model_parallel_size is not None:
            # Without overlap one batch holds several sends between the same two ranks when PP is 2, and they are
            # mixed up: Megatron-LM refuses that, Megatron-Core computes another loss.
            self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        self.pipeline_dtype = self.params_dtype if self.pipeline_model_parallel_size > 1 else None
        if not self.enable_autocast or self.autocast_dtype is None:
            self.autocast_dtype = self.params_dtype
        self.padded_vocab_size = padded_vocab_size(self)
        tell_attention_factor(self, self.rope().attention_factor)
        try:
            super().__post_init__()
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"Megatron-Core refuses this provider: {error}") from error

    @property
    def uses_compiled_kernels(self) -> bool:
        """What `compiled_kernels` comes to on this machine."""
        if self.compiled_kernels is not None:
            return self.compiled_kernels
        return can_compile_kernels() and not has_transformer_engine() and self.params_dtype.itemsize == 2

    def rope(self) -> Rope:
        """The rotation frequencies of layers with full attention."""
        scalings = (self.rope_scaling, self.seq_len_interpolation_factor is not None, self.rope_extension is not None)
        if sum(scalings) > 1:
            raise ConfigError(
                "rope_scaling, seq_len_interpolation_factor and rope_extension exclude each other; set only one"
            )
        if self.rope_extension is not None and self.rotary_base_local is not None:
            raise ConfigError(
                "rope_extension is of all layers, and rotary_base_local gives some a rope of their own; unset one"
            )
        if self.rope_extension is not None:
            return Rope(self.rotary_base, self.rotary_percent, extension=self.rope_extension)
        if self.rope_scaling:
            return Rope(
                base=self.rotary_base,
                percent=self.rotary_percent,
                scaling="llama3",
                factor=self.rope_scaling_factor,
                low_freq_factor=self.rope_low_freq_factor,
                high_freq_factor=self.rope_high_freq_factor,
                original_max_position_embeddings=self.rope_original_max_position_embeddings,
            )
        if self.seq_len_interpolation_factor is not None:
            return Rope(self.rotary_base, self.rotary_percent, "linear", self.seq_len_interpolation_factor)
        return Rope(self.rotary_base, self.rotary_percent)

    def local_rope(self) -> Rope | None:
        """The rotation frequencies of layers with a sliding window, or None where they are those of the others."""
        return None if self.rotary_base_local is None else Rope(self.rotary_base_local, self.rotary_percent)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """Build one chunk of the model: this pipeline rank's layers of virtual stage `vp_stage`.

        Whether it has the embedding (`pre_process`) and the output layer (`post_process`) follows from the stage
        unless given. Needs `finalize()` and Megatron's process groups; a collective for tied embeddings when the
        pipeline has more than one stage. Works on meta tensors.
        """
        if self.padded_vocab_size is None:
            raise ConfigError("the provider is not finalized; call provider.finalize() before provide()")
        ensure_runtime()
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(**stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(**stage)
        return build_gpt(self, pre_process, post_process, vp_stage)

    def register_pre_wrap_hook(self, hook: ModelHook) -> None:
        """Run `hook` on the built chunks before they are wrapped for mixed precision and data parallelism."""
        self.pre_wrap_hooks.append(hook)

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        wrap_with_ddp: bool = True,
        pre_wrap_hook: ModelHook | None = None,
        post_wrap_hook: ModelHook | None = None,
    ) -> list[MegatronModule]:
        """Build this rank's part of the model, one chunk for each virtual pipeline stage, on its device.

        Every rank calls it; it is a collective. Sets up torch.distributed and Megatron's process groups where there
        are none (a lone process becomes a group of one), runs the registered hooks and `pre_wrap_hook`, then wraps
        each chunk for fp16 or bf16 and, if asked, in Megatron's `DistributedDataParallel`. Raises ConfigError.
        """
        self.finalize()
        initialize_distributed()
        initialize_model_parallel(self, self.seed)
        virtual_stages = self.virtual_pipeline_model_parallel_size
        stages = [None] if virtual_stages is None else list(range(virtual_stages))
        model: list[MegatronModule] = [self.provide(vp_stage=stage) for stage in stages]
        for hook in [*self.pre_wrap_hooks, *([pre_wrap_hook] if pre_wrap_hook is not None else [])]:
            replaced = hook(model)
            model = model if replaced is None else replaced
        model = wrap_chunks(self, model, ddp_config if wrap_with_ddp else None, wrap_with_ddp)
        if post_wrap_hook is not None:
            replaced = post_wrap_hook(model)
            model = model if replaced is None else replaced
        return model
