"""Training with Megatron-Core: configuration, data, the loop, checkpoints, and a version of the weights a step.

Nothing heavy is imported here; `weightcast.trainer.pretrain` is the entry.
"""
