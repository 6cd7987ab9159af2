"""Which model is trained, and how it lies over the ranks.

cfg.model.hf_path = "path/to/hf"
cfg.model.tensor_model_parallel_size = 2
"""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which model, and how it is laid out over the ranks. A provider of `AutoBridge` may stand in its place."""

    hf_path: str = ""
    """Folder of the Hugging Face checkpoint (or its hub id) that training starts from."""
    load_weights: bool = True
    """Start from the checkpoint's weights; false takes its configuration alone and draws weights by `rng.seed`."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, in stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline rank holds (VPP), for the interleaved schedule; null means one and plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, two chunks each, one from either end of it (CP)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer (EP); the ranks are those of data, context and tensor parallelism."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices (ETP); null means as many as `tensor_model_parallel_size`."""
    sequence_parallel: bool = False
    """Split the activations between the matrices along the sequence over the TP ranks."""
    calculate_per_token_loss: bool = True
    """Average the loss over all unmasked tokens of the global batch, so that it does not depend on the layout;
    false averages micro-batch means, as Megatron-Core does by default."""
