"""Adapters in training: what is frozen and what trains, adapter-only checkpoints, and how adapters are published.

The modules themselves (LoRA, canonical LoRA, DoRA) and the way to and from PEFT folders are `weightcast.bridges.peft`.
"""
