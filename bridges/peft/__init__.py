"""Adapters on a Megatron model: LoRA, canonical LoRA and DoRA, to and from PEFT folders, merged exactly.

from weightcast.bridges.peft import LoRA
"""

from weightcast.bridges.peft.merge import merge_adapters, merged_adapters, unmerge_adapters
from weightcast.bridges.peft.recipes import CanonicalLoRA, DoRA, LoRA

__all__ = ["CanonicalLoRA", "DoRA", "LoRA", "merge_adapters", "merged_adapters", "unmerge_adapters"]
