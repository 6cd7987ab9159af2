"""The words of a command line, as Hydra users type them, before they meet a configuration. Pure.

section.key=value     sets a setting that is there
+section.key=value    adds an entry to a record of free fields such as model.hf_config; ++ also changes one
~section.key          takes an entry out, or a setting back to its default; ~section.key=value only from that value

word = read_word("train.train_iters=5")
"""

import shlex
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from weightcast.sync.errors import ConfigError

Action = Literal["set", "add", "force", "delete"]
_PREFIXES: tuple[tuple[str, Action], ...] = (("++", "force"), ("+", "add"), ("~", "delete"))


@dataclass(frozen=True, slots=True)
class OverrideWord:
    """One word, read."""

    text: str
    """As it was typed."""
    action: Action
    key: str
    """`section.key`, or deeper."""
    given: DictConfig
    """The value under its key, as a configuration; empty for `~key`."""

    @property
    def value(self) -> Any:
        """What stands behind `=`, as OmegaConf has it."""
        return OmegaConf.select(self.given, self.key)

    @property
    def has_value(self) -> bool:
        """Whether there is an `=`."""
        return bool(self.given)


def read_word(text: str) -> OverrideWord:
    """Raises `ConfigError` for what is no override."""
    action: Action = "set"
    rest = text
    for prefix, meaning in _PREFIXES:
        if text.startswith(prefix):
            action, rest = meaning, text[len(prefix) :]
            break
    key, equals, _ = rest.partition("=")
    if not key.strip() or not (equals or action == "delete"):
        raise ConfigError(f"cannot read the override {text!r}: write section.key=value, such as train.train_iters=5")
    if not equals:
        return OverrideWord(text, action, key, OmegaConf.create())
    try:
        return OverrideWord(text, action, key, OmegaConf.from_dotlist([rest]))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"cannot read the override {text!r} as YAML: {error}; quote it, such as {shlex.quote(text)}"
        ) from error
