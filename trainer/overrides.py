"""From YAML files and `section.key=value` words to a `ConfigContainer`, and back to a file.

OmegaConf does the typing; this file turns its complaints into one `ConfigError` each, with the nearest known
key. Later sources win: defaults, then the file, then the words, in order. `override_words.py` has their forms.
A section that has a short form (`mixed_precision: bf16_mixed`) is spelled out as its record where a field of it is set.

    cfg = load_config(["train.train_iters=5", "dataset.files=[a.txt, b.txt]"], config_file="run.yaml")
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import SHORT_FORMS, ConfigContainer
from weightcast.trainer.override_words import OverrideWord, read_word


def load_config(
    overrides: Sequence[str] = (), *, config_file: str | None = None, base: ConfigContainer | None = None
) -> ConfigContainer:
    """The configuration that `base` (default: all defaults), a YAML file and overrides give together.

    Raises `ConfigError` for a file that cannot be read, a word that is not `section.key=value`, an unknown key
    (with the nearest known one) and a value of the wrong type.
    """
    merged = OmegaConf.structured(base if base is not None else ConfigContainer())
    if config_file is not None:
        merged = _merge(merged, _read_yaml(config_file), config_file)
    for word in map(read_word, overrides):
        merged = _apply(merged, word)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ConfigContainer)
    return config


def save_config(config: ConfigContainer, path: str | Path) -> None:
    """Write `config` as YAML that `load_config(config_file=path)` reads back. `config.model` must be a ModelConfig."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def known_keys(config: object | None = None) -> Iterator[str]:
    """Every `section.key` that an override may name."""
    record = config if config is not None else ConfigContainer()
    assert is_dataclass(record)
    for item in fields(record):
        value = getattr(record, item.name)
        if item.name in SHORT_FORMS and isinstance(record, ConfigContainer):
            yield item.name
            yield from (f"{item.name}.{key.name}" for key in fields(SHORT_FORMS[item.name](None)))
        elif is_dataclass(value):
            yield from (f"{item.name}.{key}" for key in known_keys(value))
        else:
            yield item.name


def _read_yaml(path: str) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path!r} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"the configuration file {path!r} is not a mapping of sections such as `train:`")
    _check_keys(loaded, path)
    return loaded


def _apply(merged: Any, word: OverrideWord) -> Any:
    where = repr(word.text)
    if word.action == "delete":
        return _take_out(merged, word)
    _check_keys(word.given, where)
    _fit_short_forms(merged, word.given)
    holder, _, entry = word.key.rpartition(".")
    present = OmegaConf.select(merged, word.key)
    if word.action == "add" and present is not None:
        raise ConfigError(f"{where}: {word.key} is there already ({present!r}): leave the + out")
    record = OmegaConf.select(merged, holder) if holder.count(".") else None
    if word.action == "set" and isinstance(record, DictConfig) and not OmegaConf.is_struct(record):
        known = [str(name) for name in record]
        if entry not in known:
            raise ConfigError(f"{where}: {holder} has no entry {entry!r}; {_nearest(entry, known)}to add it, write +")
    return _merge(merged, word.given, where)


def _take_out(merged: Any, word: OverrideWord) -> Any:
    """`~key`: an entry of free fields goes; a setting or a section has its default again."""
    _check_known(word.key, repr(word.text), sections_too=True)
    section, dot, _ = word.key.partition(".")
    if dot and section in SHORT_FORMS:
        _spell_out(merged, section)
    present = OmegaConf.select(merged, word.key)
    if word.has_value and present != word.value:
        raise ConfigError(f"{word.text!r}: {word.key} is {present!r}: write ~{word.key} to take that out")
    holder, _, entry = word.key.rpartition(".")
    record = OmegaConf.select(merged, holder) if holder.count(".") else None
    if record is None:
        defaults = OmegaConf.structured(ConfigContainer())
        if holder in SHORT_FORMS:
            _spell_out(defaults, holder)
        OmegaConf.update(merged, word.key, OmegaConf.select(defaults, word.key), merge=False)
    elif entry not in record:
        near = _nearest(entry, [str(name) for name in record])
        raise ConfigError(f"{word.text!r}: {holder} has no entry {entry!r}; {near}nothing to take out")
    else:
        record.pop(entry)
    return merged


def _check_keys(given: DictConfig, where: str) -> None:
    for key in _leaf_keys(given):
        _check_known(key, where)


def _check_known(key: str, where: str, *, sections_too: bool = False) -> None:
    known = list(known_keys())
    # Below a setting are the entries of a record of free fields.
    setting = ".".join(key.split(".")[:2])
    if setting not in known and not (sections_too and key in _sections()):
        raise ConfigError(f"{where}: there is no setting {key!r}; {_hint(key, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def _hint(key: str, known: Sequence[str]) -> str:
    sections = _sections()
    if key in sections:
        return f"it is a section, with the settings {', '.join(k for k in known if k.startswith(key + '.'))}"
    same_last_part = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if near := same_last_part or difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return f"the sections are {', '.join(sections)}"


def _leaf_keys(given: DictConfig) -> Iterator[str]:
    sections = _sections()
    for name in given:
        value = given._get_node(name)
        if str(name) in sections and isinstance(value, DictConfig) and not value._is_none():
            yield from (f"{name}.{key}" for key in value)
        else:
            yield str(name)


def _sections() -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in known_keys() if "." in key))


def _fit_short_forms(merged: Any, given: DictConfig) -> None:
    """Make room for what `given` says of sections with a short form: a field wants the record, a name wants none."""
    for name in (name for name in SHORT_FORMS if name in given):
        if _is_record(given, name):
            _spell_out(merged, name)
        elif _is_record(merged, name):
            merged[name] = None


def _spell_out(config: Any, name: str) -> None:
    """Put the record in place of the section's short form."""
    if not _is_record(config, name):
        config[name] = OmegaConf.structured(SHORT_FORMS[name](config[name]))


def _is_record(config: DictConfig, name: str) -> bool:
    node = config._get_node(name)
    return isinstance(node, DictConfig) and not node._is_none()


def _merge(base: Any, given: DictConfig, where: str) -> Any:
    _fit_short_forms(base, given)
    try:
        return OmegaConf.merge(base, given)
    except OmegaConfBaseException as error:
        key, reason = error.full_key or "configuration", str(error).splitlines()[0]
        if "is not a ListConfig" in reason:
            reason = f"it is a list, and is written in brackets, such as {key}=[first,second]"
        raise ConfigError(f"{where}: {key}: {reason}") from error
