"""A run by its words: which recipe, whether as a proxy, and what else is set.

cfg = load_run(["recipe=llama32_1b.pretrain", "proxy=true", "train.train_iters=3"], world_size=2)

The recipe comes first, then the file, then `proxy=true` cuts down what they say, then the other words in order. A
fine-tuning recipe trains on mock data until the file or the words name records (`dataset.files`,
`dataset.dataset_name`, `dataset.kind=sft`); then on those, packed where the run can.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.overrides import load_config
from weightcast.trainer.recipes.defaults import can_pack
from weightcast.trainer.recipes.proxy import shrink
from weightcast.trainer.recipes.registry import is_fine_tuning, load_recipe

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
    given = sort_words(words)
    if given.recipe is None:
        return _apply_words(None, given, config_file, world_size)
    base = load_recipe(given.recipe)
    config = _apply_words(base, given, config_file, world_size)
    if is_fine_tuning(given.recipe) and _names_records(config):
        base.dataset.kind, base.dataset.packed_sequence = "sft", can_pack(config)
        config = _apply_words(base, given, config_file, world_size)
    return config


def _apply_words(
    base: ConfigContainer | None, given: RunWords, config_file: str | None, world_size: int
) -> ConfigContainer:
    config = load_config(config_file=config_file, base=base)
    if given.proxy:
        config = shrink(config, world_size)
    return load_config(given.overrides, base=config)


def _names_records(config: ConfigContainer) -> bool:
    dataset = config.dataset
    return dataset.kind == "sft" or (dataset.kind == "mock" and bool(dataset.files or dataset.dataset_name))
