"""Layers of ours for Megatron-Core without Transformer Engine."""
