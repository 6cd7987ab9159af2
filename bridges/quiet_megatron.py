"""Imports Megatron-Core without its notices that Transformer Engine and Apex are not installed.

On a machine without a GPU those notices are expected: weightcast brings its own layers (`bridges/layers`). They are
raised while Megatron's modules are imported, so whoever imports Megatron first must hold them back; this module does,
for exactly the messages listed, and the package's `__init__` imports it before anything else. It changes nothing else.

    import weightcast.bridges.quiet_megatron  # then: from megatron.core import ...
"""

import warnings

# Seen on megatron-core 0.16.1 and 0.19.2 with torch 2.13; (start of the message as a regular expression, category).
EXPECTED_NOTICES: tuple[tuple[str, type[Warning]], ...] = (
    (r"Transformer Engine and Apex are not installed", UserWarning),
    (r"Apex is not installed", UserWarning),
    (r"absl.logging is not installed", UserWarning),
    (r"`torch.jit.script(_method)?` is deprecated", DeprecationWarning),
    (r"The following imports from `dynamic_context.py`", DeprecationWarning),
    (r"\s*The 'megatron.core.transformer.custom_layers.transformer_engine'", DeprecationWarning),
)

with warnings.catch_warnings():
    for message, category in EXPECTED_NOTICES:
        warnings.filterwarnings("ignore", message=message, category=category)
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel
    import megatron.core.transformer.multi_latent_attention  # noqa: F401
