"""A run by its words: which recipe, whether as a proxy, and what else is set.

cfg = load_run(["recipe=llama32_1b.pretrain", "proxy=true", "train.train_iters=3"], world_size=2)

The recipe comes first, then the file, then `proxy=true` cuts down what they say, then the other words in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.overrides import load_config
from weightcast.trainer.recipes.proxy import shrink
from weightcast.trainer.recipes.registry import load_recipe

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class RunWords:
    """The words of a command, sorted."""

    recipe: str | None
    proxy: bool
    overrides: tuple[str, ...]


def sort_words(words: Sequence[str]) -> RunWords:
    """`recipe=` and `proxy=` apart from the overrides; the last of each counts. Raises `ConfigError`."""
    given = {"recipe": "", "proxy": "false"}
    rest = []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in given:
            given[name] = value
        else:
            rest.append(word)
    if given["proxy"].lower() not in _TRUTH:
        raise ConfigError(f"proxy={given['proxy']}: write proxy=true or proxy=false")
    return RunWords(given["recipe"] or None, _TRUTH[given["proxy"].lower()], tuple(rest))


def load_run(words: Sequence[str], *, config_file: str | None = None, world_size: int = 1) -> ConfigContainer:
    """The whole configuration that the words and the file give on `world_size` ranks. Raises `ConfigError`."""
    sorted_words = sort_words(words)
    base = load_recipe(sorted_words.recipe) if sorted_words.recipe is not None else None
    config = load_config(config_file=config_file, base=base)
    if sorted_words.proxy:
        config = shrink(config, world_size)
    return load_config(sorted_words.overrides, base=config)
