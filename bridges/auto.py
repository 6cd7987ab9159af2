"""AutoBridge: one door between Hugging Face models and Megatron-Core.

It finds the bridge of a model's architecture and joins the parts of this folder: providers build the model, plans say
where each byte lies, and import, export and streaming walk through the plan.

    bridge = AutoBridge.from_hf_pretrained("path/to/hf")
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, "path/to/export")
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from transformers import PretrainedConfig

from weightcast.bridges import one_call
from weightcast.bridges.auto_adapters import BridgeAdapters
from weightcast.bridges.hf_config import as_native
from weightcast.bridges.hf_options import read_options
from weightcast.bridges.hf_source import HFSource
from weightcast.bridges.megatron_checkpoint import load_checkpoint, save_checkpoint
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.registry import BUILT_IN, find_bridge, supported_architectures
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.shards import Model
from weightcast.sync.errors import ConfigError, UnsupportedModel, WeightcastError

logger = logging.getLogger(__name__)


class AutoBridge(BridgeAdapters):
    """The bridge of one Hugging Face model; make one with `from_hf_pretrained` or `from_hf_config`.

    Attributes: `hf_config`, the configuration; `family`, the `ModelBridge` that maps it.
    """

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> "AutoBridge":
        """The bridge of a Hugging Face folder (nothing else is asked) or hub repository; no weights are read yet.

        `torch_dtype` or `dtype` is the dtype of the Megatron parameters (default: the checkpoint's). `bridges` are
        `ModelBridge`s of your own, looked at before the built-in ones. `trust_remote_code`, `revision`, `token`,
        `cache_dir`, `local_files_only` are as in transformers. Options that only concern a transformers model in
        memory (`device_map`, ...) have nothing to act on here. Raises `UnsupportedModel`, `ConfigError`.
        """
        options = read_options(kwargs)
        source = HFSource.make(path, **options.hub)
        config = source.load_config(trust_remote_code=options.trust_remote_code)
        return cls(config, find_bridge(config, (*options.bridges, *BUILT_IN)), source, options.dtype)

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig, *, bridges: Sequence[ModelBridge] = ()) -> "AutoBridge":
        """The bridge of a configuration alone, without weights. Raises `UnsupportedModel`."""
        return cls(as_native(config), find_bridge(config, (*bridges, *BUILT_IN)))

    @classmethod
    def can_handle(cls, path: str | Path, trust_remote_code: bool = False) -> bool:
        """Whether the folder or repository has a configuration that a bridge covers; the log says why not."""
        try:
            reason = cls.explain(HFSource.make(path).load_config(trust_remote_code=trust_remote_code))
        except (WeightcastError, OSError) as error:
            reason = str(error)
        if reason is not None:
            logger.warning("cannot handle %s: %s", path, reason)
        return reason is None

    @classmethod
    def supports(cls, config: Any) -> bool:
        """Whether the configuration's architecture has a bridge."""
        try:
            find_bridge(config)
        except UnsupportedModel:
            return False
        return True

    @classmethod
    def explain(cls, config: PretrainedConfig, *, bridges: Sequence[ModelBridge] = ()) -> str | None:
        """Why the configuration cannot be handled (architecture or field) and the remedy; `None` when it can."""
        try:
            cls.from_hf_config(config, bridges=bridges).to_megatron_provider(load_weights=False)
        except UnsupportedModel as error:
            return str(error)
        return None

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """Names of the HF architectures that have a bridge, sorted."""
        return list(supported_architectures())

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> GPTModelProvider:
        """A provider of the same model in Megatron; set the parallel sizes on it and `finalize()` it.

        With `load_weights` the model that it provides is filled from `hf_path`, by default the bridge's own folder.
        Raises `UnsupportedModel` for a field of the configuration that Megatron would compute differently.
        """
        if load_weights and hf_path is None and self._source is None:
            raise ConfigError(
                "a bridge made by from_hf_config has no weights to load; pass load_weights=False, or hf_path"
            )
        bridge = self.at(hf_path)
        provider = bridge.family.translate(bridge.hf_config)
        if self._dtype is not None:
            provider.set_dtype(self._dtype)
        if load_weights:
            provider.register_pre_wrap_hook(bridge.load_hf_weights)
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, hf_path: str | Path | None = None, **kwargs: Any
    ) -> list[MegatronModule]:
        """This rank's chunks of the model, with the provider's default settings. Every rank must call it.

        `kwargs` go to `GPTModelProvider.provide_distributed_model`.
        """
        provider = self.to_megatron_provider(load_weights, hf_path)
        provider.finalize()
        return provider.provide_distributed_model(**kwargs)

    def save_megatron_model(self, model: Model, path: str | Path) -> None:
        """Write a Megatron checkpoint (`torch_dist`) of the weights to a new folder. Every rank must call it.

        The folder appears only when it is complete. Raises `ConfigError` when it holds something, `StorageError`.
        """
        save_checkpoint(model, Path(path).absolute())

    def load_megatron_model(self, path: str | Path, **kwargs: Any) -> list[MegatronModule]:
        """The model filled from a Megatron checkpoint of any layout. Every rank must call it.

        `kwargs` are settings of the provider (`tensor_model_parallel_size=2`, ...) and `wrap_with_ddp` (default
        False). Raises `ConfigError` for a setting that the provider does not have, `CheckpointMismatch`.
        """
        wrap_with_ddp = bool(kwargs.pop("wrap_with_ddp", False))
        provider = self.to_megatron_provider(load_weights=False)
        for name, value in kwargs.items():
            if not hasattr(provider, name):
                raise ConfigError(f"the provider has no setting {name!r}; see weightcast.bridges.provider")
            setattr(provider, name, value)
        provider.finalize()
        provider.register_pre_wrap_hook(partial(load_checkpoint, folder=Path(path).absolute()))
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    @classmethod
    def import_ckpt(cls, hf_model_id: str | Path, megatron_path: str | Path, **kwargs: Any) -> None:
        """Hugging Face to Megatron checkpoint in one call (see `one_call`); `kwargs` as of `from_hf_pretrained`."""
        one_call.import_ckpt(cls.from_hf_pretrained(hf_model_id, **kwargs), Path(megatron_path))

    def export_ckpt(self, megatron_path: str | Path, hf_path: str | Path, show_progress: bool = True) -> None:
        """Megatron checkpoint to Hugging Face folder in one call (see `one_call`)."""
        one_call.export_ckpt(self, Path(megatron_path), Path(hf_path), show_progress)

    @property
    def transformer_config(self) -> TransformerConfig:
        """The model's Megatron configuration with default settings, finalized; it is the provider itself."""
        provider = self.to_megatron_provider(load_weights=False)
        provider.finalize()
        return provider

    @property
    def mla_transformer_config(self) -> MLATransformerConfig:
        """`transformer_config` of a model with multi-head latent attention. Raises `ConfigError` for any other."""
        config = self.transformer_config
        if not isinstance(config, MLATransformerConfig):
            raise ConfigError(
                f"a {self.family.family} model has no multi-head latent attention; use transformer_config, which is "
                "for every model"
            )
        return config
