"""The options of `AutoBridge.from_hf_pretrained`, sorted by who needs them and checked by name.

options = read_options({"torch_dtype": "bfloat16", "revision": "main"})
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from weightcast.bridges.models.bridge import ModelBridge
from weightcast.sync.errors import ConfigError

logger = logging.getLogger(__name__)
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# They place or tune a transformers model in memory, and none is ever built here; code written for it may pass them.
_IDLE_OPTIONS = ("device_map", "low_cpu_mem_usage", "attn_implementation", "max_memory", "offload_folder")
_OWN_OPTIONS = ("torch_dtype", "dtype", "trust_remote_code", "bridges")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class HFOptions:
    """Checked options."""

    dtype: torch.dtype | None
    """Of the Megatron parameters; `None` for the checkpoint's."""
    trust_remote_code: bool = False
    bridges: tuple[ModelBridge, ...] = ()
    hub: Mapping[str, Any] = field(default_factory=dict)
    """What reaching the hub needs."""


def read_options(options: Mapping[str, Any]) -> HFOptions:
    """Sort `options`. Raises `ConfigError` for an unknown name or dtype."""
    known = (*_OWN_OPTIONS, *_HUB_OPTIONS, *_IDLE_OPTIONS)
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"from_hf_pretrained has no option {unknown[0]!r}; it takes {', '.join(known)}")
    if idle := [name for name in options if name in _IDLE_OPTIONS]:
        logger.info("%s: no effect, since no transformers model is built", ", ".join(idle))
    return HFOptions(
        dtype=read_dtype(options.get("torch_dtype", options.get("dtype"))),
        trust_remote_code=bool(options.get("trust_remote_code", False)),
        bridges=tuple(options.get("bridges", ())),
        hub={name: options[name] for name in _HUB_OPTIONS if name in options},
    )


def read_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype for weights, by itself or by name; `None` for `None` and "auto". Raises `ConfigError` for any other."""
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)} and 'auto'")
    return found
