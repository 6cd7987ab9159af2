"""What leaves a model with adapters: versions for engines and folders, merged or the adapter alone.

Merged weights are made as they are read (`weightcast.bridges.peft.merged_views`): the model keeps its frozen weights
and its adapters, and no second copy of them is held.

    source, prepare = make_source(cfg, bridge, model)
    export_folders(cfg, bridge, model)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightcast.bridges import AutoBridge
from weightcast.bridges.exchange import get_rank
from weightcast.bridges.source import PlanSource
from weightcast.sync import WeightSource
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.sft.chat_files import write_chat_files
from weightcast.trainer.data.sft.store import read_template
from weightcast.trainer.peft.schemes import method_of

Prepare = Callable[[], None]
"""What every rank calls before a version is packed."""


def make_source(config: ConfigContainer, bridge: AutoBridge, model: list[Any]) -> tuple[WeightSource, Prepare | None]:
    """This rank's part of what is published, and what to call before each version, if anything. No collective."""
    method = method_of(config, model)
    if method is None:
        return bridge.weight_source(model), None
    if config.publish.peft == "adapter":
        _tell_engines(config, bridge, model)
        return PlanSource(bridge.adapter_plan(model)), None
    source = bridge.merged_source(model, merges=method.merges(model))
    return source, source.prepare


def _tell_engines(config: ConfigContainer, bridge: AutoBridge, model: list[Any]) -> None:
    """Write what an engine must know of the adapter besides its tensors, on the first rank."""
    told = bridge.adapter_config(model)
    if config.publish.engine_config is not None and get_rank() == 0:
        Path(config.publish.engine_config).write_text(told, encoding="utf-8")


def export_folders(config: ConfigContainer, bridge: AutoBridge, model: list[Any]) -> None:
    """Write `checkpoint.export_hf` (merged) and `peft.export_adapter`, where they are set. Every rank calls it."""
    method = method_of(config, model)
    folder = config.checkpoint.export_hf
    if folder is not None and method is None:
        bridge.save_hf_pretrained(model, folder, write_extras=chat_files(config))
    elif folder is not None and method is not None:
        bridge.save_merged_hf(model, folder, merges=method.merges(model), write_extras=chat_files(config))
    if config.peft.export_adapter is not None:
        bridge.save_hf_adapter(model, config.peft.export_adapter)


def chat_files(config: ConfigContainer) -> Callable[[Path], None] | None:
    """Puts the run's own chat template into an exported folder; None where it was fine-tuned without one."""
    template = read_template(config.tokenizer.chat_template)
    if config.dataset.kind != "sft" or template is None:
        return None
    # The folder has the tokenizer by then.
    return lambda folder: write_chat_files(folder, template)
