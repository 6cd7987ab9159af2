"""Adapter-only checkpoints: what of a model is saved, and with which adapters.

Beside the tensors that train a checkpoint has `peft.json`: the method and its settings. Resuming puts the base there
anew (`model.hf_path`, `checkpoint.pretrained_checkpoint`), then the adapters, the optimizer and the rest.

    sharded = keep_trained(chunk, chunk.sharded_state_dict(...))
    write_record(cfg, model, folder)
    check_record(cfg, model, folder)
"""

import json
import logging
from pathlib import Path
from typing import Any

from weightcast.bridges.shards import unwrap_chunks
from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.peft.schemes import method_of

logger = logging.getLogger(__name__)

RECORD = "peft.json"
_BASE = "base"


def keep_trained(chunk: Any, sharded: dict[str, Any]) -> dict[str, Any]:
    """Of a bare chunk's sharded state dict the parameters that train."""
    trained = {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - sharded.keys()):
        raise ConfigError(
            f"{missing[0]} trains and is not in the model's sharded_state_dict, so no checkpoint would hold it: give "
            "the module that has it a sharded_state_dict with it (weightcast.bridges.peft.layers shows how)"
        )
    return {name: entry for name, entry in sharded.items() if name in trained}


def load_trained(chunk: Any, loaded: dict[str, Any]) -> None:
    """Put what `keep_trained` kept into a bare chunk again."""
    problems = chunk.load_state_dict(loaded, strict=False)
    assert not problems.unexpected_keys, problems


def write_record(config: ConfigContainer, model: list[Any], folder: Path) -> None:
    """Write `peft.json` into a checkpoint that is being made; nothing for a run without adapters. On one rank."""
    described = _describe(config, model)
    if described is not None:
        text = json.dumps(described | {_BASE: _base_of(config)}, indent=1)
        (folder / RECORD).write_text(text, encoding="utf-8")


def find_record(folder: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint's adapters; None for a whole model. Raises `ConfigError` for a damaged record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; resume from an earlier checkpoint") from error


def check_record(config: ConfigContainer, model: list[Any], folder: Path) -> None:
    """Raise `ConfigError` unless the checkpoint holds the adapters of this run, or as this run none.

    A base of another name is told in the log: it may be the same weights in another place.
    """
    there, here = find_record(folder), _describe(config, model)
    if there is None and here is not None:
        raise ConfigError(
            f"the checkpoint {folder} is of a whole model, and this run trains adapters: start them from it with "
            "checkpoint.pretrained_checkpoint instead of checkpoint.load"
        )
    if there is not None and here is None:
        raise ConfigError(
            f"the checkpoint {folder} holds adapters alone ({there.get('scheme')}), and this run trains all weights: "
            "set peft.scheme and the other settings of peft as in the run that saved it"
        )
    if there is not None and there.get(_BASE) != _base_of(config):
        logger.warning(
            "%s was trained on the base %s and goes on with %s; they must hold the same weights",
            folder,
            there.get(_BASE),
            _base_of(config),
        )
    faults = [
        f"{name} is {(there or {}).get(name)!r} there and {value!r} here"
        for name, value in (here or {}).items()
        if (there or {}).get(name) != value
    ]
    if faults:
        raise ConfigError(
            f"the checkpoint {folder} holds other adapters: {'; '.join(faults)}. Set the section peft as in the run "
            "that saved it, or leave checkpoint.load out"
        )


def _base_of(config: ConfigContainer) -> str | None:
    """Where the frozen weights come from, as the configuration names it; None for a provider."""
    given: str | None = config.checkpoint.pretrained_checkpoint
    return given if given is not None else getattr(config.model, "hf_path", None)


def _describe(config: ConfigContainer, model: list[Any]) -> dict[str, Any] | None:
    method = method_of(config, unwrap_chunks(model))
    if method is None:
        return None
    described: dict[str, Any] = json.loads(json.dumps(method.describe()))  # tuples are lists in the file
    return described
