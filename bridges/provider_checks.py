"""Checks of a provider's settings against each other, and the few that follow from others.

Each check is a pure function of the provider that raises `ConfigError` with the setting, what it was, what is allowed
and what to do. Megatron's own checks come after these and catch what is not listed here.
"""

import logging

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from weightcast.bridges.provider_moe import check_experts
from weightcast.bridges.runtime import can_compile_kernels, has_cuda, has_transformer_engine
from weightcast.sync.errors import ConfigError

logger = logging.getLogger(__name__)

# Kernels of CUDA, Apex or Transformer Engine, or functions that torch.compile builds at the first call.
_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
)
# With CUDA but without Transformer Engine (and Apex), these of them have no implementation.
_FUSIONS_OF_EXTENSIONS = (
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "moe_permute_fusion",
    "moe_router_fusion",
)
# Those that are functions for torch.compile.
_FUSIONS_OF_COMPILER = ("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion")


def _divides(what: str, value: int, by_what: str, divisor: int, remedy: str) -> None:
    if value % divisor != 0:
        raise ConfigError(f"{what}={value} is not a multiple of {by_what}={divisor}; {remedy}")


def check_layout(config: TransformerConfig) -> None:
    """The model's sizes against tensor, sequence and pipeline parallelism."""
    if config.num_layers < 1 or config.vocab_size < 1:
        raise ConfigError(
            f"num_layers={config.num_layers} and vocab_size={config.vocab_size} must be set; "
            "take the provider from AutoBridge.to_megatron_provider()"
        )
    _check_tensor_parallel(config)
    _check_pipeline(config)
    check_experts(config)


def _check_tensor_parallel(config: TransformerConfig) -> None:
    name, size = "tensor_model_parallel_size", config.tensor_model_parallel_size
    remedy = f"choose a {name} that divides it"
    _divides("num_attention_heads", config.num_attention_heads, name, size, remedy)
    groups = config.num_query_groups if config.num_query_groups is not None else config.num_attention_heads
    if groups % size != 0 and size % groups != 0:
        raise ConfigError(
            f"num_query_groups={groups} (key-value heads) is neither a multiple nor a divisor of {name}={size}; "
            f"choose a {name} that divides it or that it divides"
        )
    if groups < size and config.kv_channels is not None and not config.multi_latent_attention:
        # Each rank gets the same number of rows of the fused projection, whatever heads they are of.
        rows = config.kv_channels * (config.num_attention_heads + 2 * groups)
        _divides("kv_channels x (num_attention_heads + 2 x num_query_groups)", rows, name, size, remedy)
    if config.ffn_hidden_size is not None:
        _divides("ffn_hidden_size", config.ffn_hidden_size, name, size, remedy)
    if config.sequence_parallel:
        if size == 1:
            raise ConfigError(f"sequence_parallel=True needs {name} > 1; set it, or sequence_parallel=False")
        _divides("seq_length", config.seq_length, name, size, "choose another seq_length or sequence_parallel=False")
    if config.context_parallel_size > 1:
        # Each rank takes two chunks of the sequence, one from either end.
        chunks = 2 * config.context_parallel_size
        remedy = "choose another seq_length or context_parallel_size=1"
        _divides("seq_length", config.seq_length, "2 x context_parallel_size", chunks, remedy)


def _check_pipeline(config: TransformerConfig) -> None:
    _read_listed_stages(config)
    stages, virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if virtual is not None and stages == 1:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1; "
            "set it, or set the virtual size to None"
        )
    first, last = config.num_layers_in_first_pipeline_stage, config.num_layers_in_last_pipeline_stage
    if virtual is not None and stages == 2 and first is not None and last is not None:
        # Megatron divides by the number of stages between them (get_transformer_layer_offset).
        raise ConfigError(
            f"num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last} cannot both be "
            "set for two stages with virtual ones; set the first alone, the last stage has the rest"
        )
    uneven = (first, last, config.pipeline_model_parallel_layout)
    counted = config.account_for_embedding_in_pipeline_split or config.account_for_loss_in_pipeline_split
    if counted or any(setting is not None for setting in uneven):
        return  # the user cuts the layers by hand; Megatron checks the cut
    _divides(
        "num_layers",
        config.num_layers,
        "pipeline_model_parallel_size x virtual_pipeline_model_parallel_size",
        stages * (virtual if virtual is not None else 1),
        "choose sizes that divide it, or set num_layers_in_first_pipeline_stage / num_layers_in_last_pipeline_stage",
    )


def _read_listed_stages(config: TransformerConfig) -> None:
    """Read `pipeline_model_parallel_layout` for the present pipeline size, and take the virtual stages from it.

    Megatron reads it once and keeps what it was for the first size.
    """
    listed = config.pipeline_model_parallel_layout
    if listed is None:
        return
    if isinstance(listed, PipelineParallelLayerLayout):
        listed = listed.input_data
    stages = config.pipeline_model_parallel_size
    try:
        layout = PipelineParallelLayerLayout(listed, stages)
    except AssertionError as error:
        raise ConfigError(
            f"pipeline_model_parallel_layout={listed!r} does not list the stages of pipeline_model_parallel_size="
            f"{stages}: {error}; write a multiple of {stages} stages, as in 'Et|t|tL'"
        ) from error
    virtual = layout.virtual_pipeline_model_parallel_size
    if config.virtual_pipeline_model_parallel_size not in (None, virtual):
        raise ConfigError(
            f"pipeline_model_parallel_layout={listed!r} lists {virtual} virtual stages a rank, but "
            f"virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size}; set it to None"
        )
    config.pipeline_model_parallel_layout = layout
    if virtual > 1:
        config.virtual_pipeline_model_parallel_size = virtual


def check_precision(config: TransformerConfig) -> None:
    """`params_dtype`, `bf16` and `fp16` say the same."""
    marks = {torch.bfloat16: (True, False), torch.float16: (False, True), torch.float32: (False, False)}
    if config.params_dtype not in marks:
        raise ConfigError(
            f"params_dtype={config.params_dtype} is not supported; use torch.float32, torch.bfloat16 or torch.float16"
        )
    if (config.bf16, config.fp16) != marks[config.params_dtype]:
        raise ConfigError(
            f"params_dtype={config.params_dtype}, bf16={config.bf16} and fp16={config.fp16} contradict each other; "
            "set them together with provider.set_dtype(torch.bfloat16), or another dtype"
        )


def turn_off_fusions(config: TransformerConfig) -> None:
    """Turn off the fused kernels that this machine does not have; says so in the log."""
    if has_transformer_engine():
        return
    missing: tuple[str, ...] = _FUSIONS
    if has_cuda():
        missing = _FUSIONS_OF_EXTENSIONS + (() if can_compile_kernels() else _FUSIONS_OF_COMPILER)
    turned_off = [name for name in missing if getattr(config, name, False)]
    for name in turned_off:
        setattr(config, name, False)
    if turned_off:
        logger.info("fused kernels this machine does not have are off: %s", ", ".join(turned_off))


def check_compiled_kernels(config: TransformerConfig) -> None:
    """`compiled_kernels` is not asked for where nothing can compile them."""
    if config.compiled_kernels and not can_compile_kernels():
        raise ConfigError(
            "compiled_kernels=True needs CUDA, Triton, a C compiler and Python's headers, and this machine lacks one "
            "of them: install it, or leave compiled_kernels=None, which uses what there is"
        )


def turn_on_compiled_fusions(config: TransformerConfig) -> None:
    """Megatron's own function for torch.compile, SwiGLU, in dense models that are plain enough for it."""
    is_plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    is_swiglu = config.activation_func is torch.nn.functional.silu and config.gated_linear_unit
    # Experts get another number of tokens at each call, and a kernel is compiled for a shape.
    if is_swiglu and is_plain and config.num_moe_experts is None:
        config.bias_activation_fusion = True


def spell_whole_graphs(config: TransformerConfig) -> None:
    """What a CUDA graph captures is by default "full" in Megatron, which then warns of that spelling of everything."""
    name = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"  # its older name
    if getattr(config, name) == "full":
        setattr(config, name, [])


def padded_vocab_size(config: TransformerConfig) -> int:
    """Rows of Megatron's embedding: the vocabulary, up to a multiple that every tensor parallel rank shares evenly."""
    multiple = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    rows: int = -(-config.vocab_size // multiple) * multiple
    return rows
