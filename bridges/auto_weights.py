"""The half of AutoBridge that moves weights: between HF folders, a Megatron model and whoever wants HF-named tensors.

Each method lays the family's rules over the model (a plan) and hands it to import, export, saving or streaming.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from transformers import PretrainedConfig

from weightcast.bridges.codecs import decode_checkpoint
from weightcast.bridges.config import model_dtype
from weightcast.bridges.exchange import agreement
from weightcast.bridges.hf_export import DEFAULT_MAX_IN_FLIGHT_BYTES, HFWeightTuple, export_weights
from weightcast.bridges.hf_folder import DEFAULT_SHARD_BYTES, save_weights
from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.hf_options import read_dtype
from weightcast.bridges.hf_source import HFSource, specs_of_config, write_companions
from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.prediction import agree, as_stored, num_prediction_layers, with_prediction_layers
from weightcast.bridges.plan import Plan, WeightConversionTask, build_plan
from weightcast.bridges.progress import progress_bar
from weightcast.bridges.rules import Rule, Tied
from weightcast.bridges.shards import Model, unwrap_chunks
from weightcast.bridges.source import PlanSource
from weightcast.bridges.spellings import find_spelling, respell, respell_rule
from weightcast.sync.checkpoint_files import CheckpointFiles, check_tensors, has_weights, open_checkpoint
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec

logger = logging.getLogger(__name__)


class BridgeWeights:
    """What `AutoBridge` does with weights, given the model's configuration, family and, if any, folder."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        family: ModelBridge,
        source: HFSource | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._read_config = hf_config
        self._stored_config = stored_config(hf_config, family, source)
        self.hf_config = self._stored_config
        self.family = family
        self._source = source
        self._dtype = dtype

    def at(self, hf_path: str | Path | None) -> Self:
        """The bridge of the same model with the weights of `hf_path`; itself for `None`."""
        if hf_path is None:
            return self
        return type(self)(self._read_config, self.family, self._find_source(hf_path), self._dtype)

    def with_prediction_layers(self, count: int) -> Self:
        """The bridge of the same model with `count` layers for multi-token prediction, whatever is stored.

        Itself where it has as many, and of a family that stores none.
        """
        if not self.family.prediction_layers or count == num_prediction_layers(self.hf_config):
            return self
        bridge = copy.copy(self)
        bridge.hf_config = with_prediction_layers(self.hf_config, count)
        return bridge

    def of_model(self, model: Model) -> Self:
        """The bridge with as many layers for multi-token prediction as this rank's `model` was configured with."""
        if not self.family.prediction_layers:
            return self
        return self.with_prediction_layers(unwrap_chunks(model)[0].config.mtp_num_layers or 0)

    def load_hf_weights(self, model: Model, hf_path: str | Path | None = None) -> None:
        """Fill this rank's part of `model` from the safetensors of `hf_path`, by default the bridge's own folder.

        Each rank reads its own regions and no more; no collective. The whole checkpoint is checked before the first
        parameter is written. Raises `CheckpointMismatch`, `UnmappedTensor`.
        """
        bridge = self.at(hf_path).of_model(model)
        checkpoint = bridge.hf_checkpoint()
        report = import_weights(build_plan(model, bridge.rules(checkpoint.specs), checkpoint.specs), checkpoint)
        logger.info("read %d regions, %d bytes from %s", report.num_regions, report.num_bytes, checkpoint.folder)

    def hf_checkpoint(self, hf_path: str | Path | None = None) -> CheckpointFiles:
        """The safetensors of `hf_path`, by default the bridge's own; `CheckpointMismatch` unless as configured."""
        if hf_path is not None:
            return self.at(hf_path).hf_checkpoint()
        checkpoint = self._open(self._find_source(None).folder())
        # Stored prediction layers that the model does without are checked as well, and then passed over.
        fuller = self.with_prediction_layers(max(map(num_prediction_layers, (self._stored_config, self.hf_config))))
        rules = fuller.rules(checkpoint.specs)
        copies = {rule.copy for rule in rules if isinstance(rule, Tied) and rule.copy is not None}
        spelling = find_spelling(self.family.spellings, checkpoint.specs)
        wanted = [replace(spec, name=respell(spec.name, spelling)) for spec in fuller.specs_of_config()]
        check_tensors(checkpoint, [spec for spec in wanted if spec.name not in copies], optional=copies)
        return replace(checkpoint, specs=agree(checkpoint.specs, self._stored_config, self.hf_config))

    def rules(self, specs: Sequence[TensorSpec]) -> tuple[Rule, ...]:
        """The family's rules for this configuration, under the names of a checkpoint of the tensors `specs`."""
        spelling = find_spelling(self.family.spellings, specs)
        return tuple(respell_rule(rule, spelling) for rule in self.family.rules(self.hf_config))

    def plan(self, model: Model, hf_path: str | Path | None = None) -> Plan:
        """Where each byte of this rank's part of `model` lies in the HF model. No collective."""
        bridge = self.at(hf_path).of_model(model)
        specs = bridge.hf_specs()
        return build_plan(model, bridge.rules(specs), specs)

    def weight_source(self, model: Model, *, dtype: torch.dtype | None = None) -> PlanSource:
        """This rank's part of `model` as a source for a `WeightPublisher`, over the live parameters. No collective.

        Weights are published in the dtypes of the HF checkpoint unless `dtype` is given.
        """
        return PlanSource(self.plan(model), dtype=dtype)

    def get_conversion_tasks(
        self, megatron_model: Model, hf_path: str | Path | None = None
    ) -> list[WeightConversionTask]:
        """One task a Megatron tensor of the whole model, with the regions that this rank holds. No collective."""
        return list(self.plan(megatron_model, hf_path).tasks)

    def export_hf_weights(
        self,
        model: Model,
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Sequence[WeightConversionTask] | None = None,
        *,
        ranks: Sequence[int] | None = None,
        max_in_flight_bytes: int = DEFAULT_MAX_IN_FLIGHT_BYTES,
        dtype: torch.dtype | str | None = None,
    ) -> Iterator[HFWeightTuple]:
        """Yield (name, full tensor) in HF order; every rank must iterate to the end, with the same arguments.

        Tensors are new, on the parameters' device or, with `cpu`, the host. `conversion_tasks` limits the export to the
        tensors of those tasks. `ranks` are the global ranks that want tensors (default: all); on the others the
        iteration yields nothing, but must be gone through all the same, because they send. `dtype` (float32, float16,
        bfloat16) is what floating tensors are cast to, at their source; by default they have the dtypes of the HF
        checkpoint. No rank has more than `max_in_flight_bytes` of buffers and of tensors not yet yielded, or the
        largest tensor and a quarter of the limit where that is more. Raises `ConfigError`, `UnmappedTensor`.
        """
        wanted_dtype = read_dtype(dtype)
        plan = self._plan_on_all(model)
        specs = plan.specs
        if conversion_tasks is not None:
            wanted = {name for task in conversion_tasks for name in task.hf_names}
            specs = tuple(spec for spec in specs if spec.name in wanted)
        items = export_weights(
            plan,
            specs,
            device=torch.device("cpu") if cpu else None,
            ranks=ranks,
            max_in_flight_bytes=max_in_flight_bytes,
            dtype=wanted_dtype,
        )
        with progress_bar("exporting", len(specs), show_progress) as advance:
            for name, weight in items:
                yield HFWeightTuple(name, weight)
                del weight
                advance(1)

    def save_hf_pretrained(
        self,
        model: Model,
        path: str | Path,
        show_progress: bool = True,
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        write_extras: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a whole HF folder: weights, configuration, tokenizer and generation settings. Every rank must call it.

        The folder appears only when it is complete; an older export of the name is replaced. Files hold at most
        `shard_bytes`. `write_extras` may add to the folder or change what is no weight in it, before it appears; it is
        called on one rank. Raises `ConfigError` when the folder holds anything that no export wrote, `StorageError`
        when the disk refuses a write (`BridgeError` on ranks that were spared).
        """
        self._save_plan(self._plan_on_all(model), path, show_progress, shard_bytes, self._companions_and(write_extras))

    def save_hf_weights(
        self, model: Model, path: str | Path, show_progress: bool = True, *, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        """Write the weights alone (safetensors and their index). Otherwise as `save_hf_pretrained`."""
        self._save_plan(self._plan_on_all(model), path, show_progress, shard_bytes, None)

    def write_companions(self, folder: Path) -> None:
        """Put the configuration and, from the bridge's own folder, the tokenizer and its like into `folder`."""
        write_companions(self.hf_config, self._source, folder)

    def hf_specs(self, hf_path: str | Path | None = None) -> tuple[TensorSpec, ...]:
        """The tensors of the checkpoint, or of the configuration where there is no checkpoint."""
        if hf_path is not None:
            return self.at(hf_path).hf_specs()
        if self._source is not None:
            folder = self._source.folder()
            if has_weights(folder):
                return agree(self._open(folder).specs, self._stored_config, self.hf_config)
        return self.specs_of_config()

    def specs_of_config(self) -> tuple[TensorSpec, ...]:
        """The tensors of a checkpoint of the configuration, those of layers for multi-token prediction included."""
        specs = specs_of_config(self.hf_config)
        if not self.family.prediction_layers:
            return specs
        return agree(specs, with_prediction_layers(self.hf_config, 0), self.hf_config)

    def _open(self, folder: Path) -> CheckpointFiles:
        """The checkpoint's weights; those stored as FP8 codes are decoded to the configuration's dtype."""
        return decode_checkpoint(open_checkpoint(folder), model_dtype(self.hf_config))

    def _companions_and(self, write_extras: Callable[[Path], None] | None) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.write_companions(folder)
            if write_extras is not None:
                write_extras(folder)

        return write

    def _save_plan(
        self,
        plan: Plan,
        path: str | Path,
        show_progress: bool,
        shard_bytes: int,
        write_extras: Callable[[Path], None] | None,
    ) -> None:
        with progress_bar("saving", len(plan.specs), show_progress) as advance:
            save_weights(
                plan, Path(path).absolute(), write_extras=write_extras, progress=advance, shard_bytes=shard_bytes
            )

    def _plan_on_all(self, model: Model) -> Plan:
        """`plan`; every rank must call it, and all raise when the plan of one cannot be made."""
        with agreement("planning the export"):
            plan = self.plan(model)
        return plan

    def _find_source(self, hf_path: str | Path | None) -> HFSource:
        if hf_path is not None:
            return HFSource.make(hf_path, **(self._source.hub_options if self._source is not None else {}))
        if self._source is None:
            raise ConfigError("a bridge made by from_hf_config has no weights of its own; pass hf_path")
        return self._source


def stored_config(config: PretrainedConfig, family: ModelBridge, source: HFSource | None) -> PretrainedConfig:
    """`config` without layers for multi-token prediction where `source` has weights, and none of theirs."""
    if source is None or not family.prediction_layers or num_prediction_layers(config) == 0:
        return config
    names = source.tensor_names()
    stored = config if names is None else as_stored(config, names)
    if stored is not config:
        logger.info("%s has no layers for multi-token prediction; the model is built without them", source.name)
    return stored
