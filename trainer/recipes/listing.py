"""Recipes as a table for people, and one of them as the YAML file that would start it.

Console().print(render(list_recipes()))
print(describe("llama32_1b.pretrain"))
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightcast.sync.errors import ConfigError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.recipes.plan import GIB, RecipePlan, plan_recipe
from weightcast.trainer.recipes.registry import KINDS, load_recipe, recipe_modules

_COLUMNS = ("recipe", "size", "layout", "GPUs", "step", "GiB", "model", "grads", "optim")
_NARROWEST_LAYOUT = 8
_COUNTED = (
    "step: samples x tokens. GiB: of a GPU of the fullest stage, on the fewest GPUs that the layout allows (or "
    "--gpus): weights, gradients, and the share of the optimizer's state, which is less on more GPUs; of a frozen "
    "base the weights alone. Activations come on top."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A recipe and its plan."""

    name: str
    config: ConfigContainer
    plan: RecipePlan


def matching(pattern: str | None) -> list[str]:
    """The names of recipes, `model.kind`, that `pattern` is a part of. Raises `ConfigError` where there is none."""
    names = [f"{model}.{kind}" for model in recipe_modules() for kind in KINDS]
    found = [name for name in names if pattern is None or pattern in name]
    if not found:
        load_recipe(str(pattern))  # says which name is nearest
        raise ConfigError(f"there is no recipe {pattern!r}; `weightcast recipes` lists all")
    return found


def list_recipes(names: Iterable[str], *, num_ranks: int | None = None) -> Iterator[Entry]:
    """Each recipe with its plan, made when it is asked for."""
    for name in names:
        config = load_recipe(name)
        yield Entry(name, config, plan_recipe(config, num_ranks=num_ranks))


def render(entries: Iterable[Entry]) -> RenderableType:
    """A row a recipe. In 80 columns nothing is cut; layouts are folded."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for name in _COLUMNS:
        table.add_column(
            name,
            no_wrap=name != "layout",
            min_width=_NARROWEST_LAYOUT if name == "layout" else None,
            justify="left" if name in ("recipe", "layout") else "right",
        )
    for entry in entries:
        memory, config = entry.plan.largest, entry.config
        sizes = (memory.total_bytes, memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes)
        table.add_row(
            entry.name,
            spell_count(entry.plan.num_parameters),
            entry.plan.layout,
            str(entry.plan.num_ranks),
            f"{config.train.global_batch_size}x{config.dataset.seq_length}",
            *map(_spell_gib, sizes),
        )
    return Group(table, Text(_COUNTED))


def _spell_gib(size_bytes: int) -> str:
    """Of four or five characters."""
    gib = size_bytes / GIB
    return f"{gib:.1f}" if gib < 1000 else f"{gib:.0f}"


def describe(name: str, *, num_ranks: int | None = None) -> str:
    """The whole configuration of one recipe as YAML, its plan above it as comments."""
    (entry,) = list_recipes([name], num_ranks=num_ranks)
    plan = entry.plan
    lines = [
        f"# {name}: {plan.architecture}, {spell_count(plan.num_parameters)} parameters, {plan.layout} on "
        f"{plan.num_ranks} GPUs",
        *(
            f"# stage {memory.stage}: {memory.total_bytes / GIB:.1f} GiB a GPU (weights "
            f"{memory.weights_bytes / GIB:.1f}, gradients {memory.gradients_bytes / GIB:.1f}, optimizer "
            f"{memory.optimizer_bytes / GIB:.1f}), and activations"
            for memory in plan.stages
        ),
    ]
    return "\n".join([*lines, OmegaConf.to_yaml(OmegaConf.structured(entry.config))])


def as_json(entries: Iterable[Entry]) -> dict[str, Any]:
    """Everything, by the recipes' names."""
    return {entry.name: asdict(entry.plan) for entry in entries}


def spell_count(count: int) -> str:
    """Parameters as models are named: 1.24B, 70.6B, 494M."""
    if count < 10**9:
        return f"{count / 10**6:.0f}M"
    return f"{count / 10**9:.3g}B" if count < 10**12 else f"{count / 10**12:.3g}T"
