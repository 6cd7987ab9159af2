"""How the layers of a model are cut into pipeline stages, in Megatron's own settings.

Layers that divide by the stages need no word. Otherwise the stages at the ends, which hold embedding and output layer
as well, take fewer; with virtual stages Megatron takes that as a string, one part a virtual stage in the order of the
layers (`E` embedding, `t` a layer, `m` one for multi-token prediction, `L` loss), in which embedding and loss may also
stand alone. Pure, but for the settings that `set_cut` makes.

    settings = choose_cut(num_layers=61, num_mtp_layers=1, pipeline=16, virtual=2)
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.provider import GPTModelProvider
from weightcast.sync.errors import ConfigError

LAYOUT_SETTING = "pipeline_model_parallel_layout"
FIRST_SETTING = "num_layers_in_first_pipeline_stage"
LAST_SETTING = "num_layers_in_last_pipeline_stage"


def set_cut(provider: GPTModelProvider, layout: Layout) -> Mapping[str, int | str]:
    """Cut the provider's layers as `layout` says or, where neither it nor the provider does, as evenly as can be.

    Gives the settings that were chosen here, which a real run needs as well. Raises `ConfigError`.
    """
    if layout.stages is not None:
        provider.pipeline_model_parallel_layout = layout.stages
        provider.virtual_pipeline_model_parallel_size = virtual_size(layout, provider.num_layers)
        return {}
    provider.virtual_pipeline_model_parallel_size = layout.virtual
    settings = (FIRST_SETTING, LAST_SETTING, LAYOUT_SETTING)
    counted = provider.account_for_embedding_in_pipeline_split or provider.account_for_loss_in_pipeline_split
    if counted or any(getattr(provider, name) is not None for name in settings):
        return {}
    chosen = choose_cut(provider.num_layers, provider.mtp_num_layers or 0, layout.pipeline, layout.virtual)
    for name, value in chosen.items():
        setattr(provider, name, value)
    return chosen


def choose_cut(num_layers: int, num_mtp_layers: int, pipeline: int, virtual: int | None) -> dict[str, int | str]:
    """Megatron's settings for layers that do not divide by the stages.

    Empty where nothing has to be said, or where there are fewer layers than stages (Megatron then refuses).
    """
    num_stages = pipeline * (virtual if virtual is not None else 1)
    if num_layers % num_stages == 0 or num_layers < num_stages:
        return {}
    if virtual is None:
        first, last = edge_stages(num_layers, num_stages)
        return {FIRST_SETTING: first, LAST_SETTING: last}
    return {LAYOUT_SETTING: spell_stages(even_stages(num_layers, num_stages), num_mtp_layers)}


def edge_stages(num_layers: int, num_stages: int) -> tuple[int, int]:
    """Layers of the first and of the last of 2 or more stages, those between having equally many: as even as can be."""
    between = num_stages - 2
    cuts: list[tuple[int, int, int]] = []
    for middle in range(1, num_layers + 1):
        ends = num_layers - middle * between
        if ends >= 2:
            first, last = ends - ends // 2, ends // 2
            cuts.append((max(first, middle if between else 0), first, last))
    return min(cuts)[1:]


def even_stages(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each of `num_stages` stages, which differ by one at most; those at the ends are the last to get one."""
    base, more = divmod(num_layers, num_stages)
    inner_first = [*range(1, num_stages - 1), num_stages - 1, 0]
    larger = set(inner_first[:more])
    return [base + (stage in larger) for stage in range(num_stages)]


def spell_stages(sizes: Sequence[int], num_mtp_layers: int = 0) -> str:
    """Megatron's string for stages of these numbers of layers: `[2, 3, 3, 2]` is `Et*2|(t*3|)*2t*2L`."""
    parts = [f"t*{size}" for size in sizes]
    parts[0] = f"E{parts[0]}"
    parts[-1] += "m" * num_mtp_layers + "L"
    spelled = ""
    for part, equal in groupby(parts[:-1]):
        count = len(list(equal))
        spelled += f"({part}|)*{count}" if count > 1 else f"{part}|"
    return spelled + parts[-1]


def virtual_size(layout: Layout, num_layers: int) -> int | None:
    """How many virtual stages a rank the string `layout.stages` gives; `None` for one. Raises `ConfigError`."""
    assert layout.stages is not None
    example = spell_stages(even_stages(num_layers, layout.pipeline)) if num_layers >= layout.pipeline else "Et*2|t*2L"
    try:
        stages = PipelineParallelLayerLayout.parse_str_to_list(layout.stages)
    except AssertionError as error:
        raise ConfigError(
            f"the layout {layout.stages!r} is not in Megatron's letters ({error}); write stages between |, of E "
            f"(embedding), t (a layer), m (multi-token prediction), L (loss), such as {example!r}"
        ) from error
    count = sum(stage.count(LayerType.decoder) for stage in stages)
    if count != num_layers:
        raise ConfigError(
            f"the layout {layout.stages!r} has {count} layers (t), the model {num_layers}; write as many, such as "
            f"{example!r}"
        )
    size, rest = divmod(len(stages), layout.pipeline)
    if rest or (layout.virtual is not None and layout.virtual != size):
        wanted = layout.pipeline * (layout.virtual if layout.virtual is not None else 1)
        raise ConfigError(
            f"the layout {layout.stages!r} has {len(stages)} stages, for pipeline={layout.pipeline} and "
            f"virtual={layout.virtual}; write {wanted}, or choose sizes that multiply to {len(stages)}"
        )
    return size if size > 1 else None
