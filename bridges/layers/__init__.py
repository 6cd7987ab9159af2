"""Layers of Megatron models: specs for Transformer Engine and for none, and the modules of the latter.

`specs` says which module stands where; `norms`, `core_attention`, `rope` and `linears` are the modules; `gpt` builds a
chunk of a model from them.
"""
