"""The half of AutoBridge that knows adapters: to and from PEFT folders.

Which tensors there are and where they lie follows from the rules of the base weights (`weightcast.bridges.peft`).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from weightcast.bridges.auto_weights import BridgeWeights
from weightcast.bridges.exchange import agreement
from weightcast.bridges.hf_folder import DEFAULT_SHARD_BYTES
from weightcast.bridges.peft.attach import find_state
from weightcast.bridges.peft.folder import AdapterConfig, read_adapter
from weightcast.bridges.peft.load import load_adapter, recipe_of_folder
from weightcast.bridges.peft.merge import require_merged, show_when_merged
from weightcast.bridges.peft.merged_views import Merge, MergedSource, MergedWeights, merges_of, show_merged
from weightcast.bridges.peft.plan import build_adapter_plan, require_recipe
from weightcast.bridges.peft.rules import weight_settings
from weightcast.bridges.peft.save import save_adapter, target_modules
from weightcast.bridges.peft.settings import UpdateSettings
from weightcast.bridges.plan import Plan
from weightcast.bridges.rules import Rule
from weightcast.bridges.shards import Model, unwrap_chunks
from weightcast.bridges.spellings import find_spelling, respell
from weightcast.sync.regions import TensorSpec

logger = logging.getLogger(__name__)


class BridgeAdapters(BridgeWeights):
    """What `AutoBridge` does with adapters."""

    def plan(self, model: Model, hf_path: str | Path | None = None) -> Plan:
        """Where each byte of this rank's part of `model` lies in the HF model. No collective.

        Of a model with adapters it shows weights only while these are merged.
        """
        plan, state = super().plan(model, hf_path), find_state(model)
        return plan if state is None else show_when_merged(plan, state)

    def _plan_on_all(self, model: Model) -> Plan:
        require_merged(model)
        return super()._plan_on_all(model)

    def merged_source(
        self, model: Model, *, merges: Mapping[torch.Tensor, Merge] | None = None, dtype: torch.dtype | None = None
    ) -> MergedSource:
        """A source of the merged weights of a model with adapters, which stays as it is. No collective.

        `source.prepare()` comes before each version, on every rank. `merges` are of adapters other than LoRA and DoRA.
        Weights are published in the dtypes of the HF checkpoint unless `dtype` is given.
        """
        weights = MergedWeights(merges_of(model) if merges is None else merges)
        return MergedSource(super().plan(model), weights, dtype=dtype)

    def save_merged_hf(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        *,
        merges: Mapping[torch.Tensor, Merge] | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        write_extras: Callable[[Path], None] | None = None,
    ) -> None:
        """Write the merged model as a whole HF folder, as `save_hf_pretrained` does of a model without adapters.

        Every rank must call it. The model's own weights are not touched, nor copied as a whole; the bits are those of
        `merge_adapters`. `merges` as of `merged_source`, `write_extras` as of `save_hf_pretrained`.
        """
        weights = MergedWeights(merges_of(model) if merges is None else merges)
        with agreement("planning the export"):
            plan = show_merged(super().plan(model), weights)
        weights.prepare()
        self._save_plan(plan, path, show_progress, shard_bytes, self._companions_and(write_extras))

    def adapter_plan(self, model: Model) -> Plan:
        """Where each byte of this rank's adapters lies in a PEFT folder. No collective."""
        rules, specs = self.of_model(model)._base_in_memory()
        return build_adapter_plan(model, rules, specs)

    def _base_in_memory(self) -> tuple[tuple[Rule, ...], tuple[TensorSpec, ...]]:
        """The base model's rules and tensors, under the names that PEFT goes by: those of the model in memory."""
        specs = self.hf_specs()
        if find_spelling(self.family.spellings, specs) != self.family.in_memory:
            specs = tuple(replace(spec, name=respell(spec.name, self.family.in_memory)) for spec in specs)
        return self.rules(specs), specs

    def save_hf_adapter(self, model: Model, path: str | Path, base_model: str | None = None) -> None:
        """Write the adapters of `model` as a PEFT folder, which `peft` and vLLM load. Every rank must call it.

        `base_model` is what the folder names as its base; by default the bridge's own folder or hub name. The folder
        appears only when it is complete. Raises `ConfigError` when the model has no adapters or the folder holds
        anything else, `UnmappedTensor` for adapters that PEFT has no names for.
        """
        base_names = [spec.name for spec in self._base_in_memory()[1]]
        save_adapter(
            self.adapter_plan(model), Path(path).absolute(), self._adapter_config(model, base_model), base_names
        )

    def adapter_config(self, model: Model, base_model: str | None = None) -> str:
        """The text of `adapter_config.json` in the PEFT folder of the model's adapters. No collective."""
        base_names = [spec.name for spec in self._base_in_memory()[1]]
        targets = target_modules(self.adapter_plan(model).specs, base_names)
        return self._adapter_config(model, base_model).as_json(targets)

    def _adapter_config(self, model: Model, base_model: str | None) -> AdapterConfig:
        name = base_model if base_model is not None else self._source.name if self._source is not None else None
        return AdapterConfig.of_recipe(require_recipe(model), name, self._adapter_settings(model))

    def _adapter_settings(self, model: Model) -> dict[str, UpdateSettings]:
        """The rank and scaling of each weight of the whole model that has an adapter, by PEFT's names."""
        rules, _ = self.of_model(model)._base_in_memory()
        return weight_settings(rules, unwrap_chunks(model)[0].config.num_layers, require_recipe(model))

    def load_hf_adapter(self, model: Model, path: str | Path) -> None:
        """Fill the adapters of `model` from a PEFT folder; a model without any gets those that hold it exactly.

        Each rank reads its own regions. Without adapters every rank must call it, before the model is wrapped for data
        parallelism: `provider.register_pre_wrap_hook(partial(bridge.load_hf_adapter, path=path))`. With adapters there
        is no collective. All is checked before a parameter is written. Raises `CheckpointMismatch`, `ConfigError`,
        `UnsupportedModel`.
        """
        folder = read_adapter(Path(path))
        rules, _ = self.of_model(model)._base_in_memory()
        if find_state(model) is None:
            recipe_of_folder(folder, rules, unwrap_chunks(model)[0].config.num_layers).apply(model)
        settings = self._adapter_settings(model)
        report = load_adapter(self.adapter_plan(model), folder, require_recipe(model), settings)
        logger.info("read %d regions, %d bytes from %s", report.num_regions, report.num_bytes, path)
