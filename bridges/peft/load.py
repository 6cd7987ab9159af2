"""Loading PEFT folders into a Megatron model: choose the recipe that holds them exactly, then read each rank's regions.

`peft` trains an A for each of q_proj, k_proj and v_proj, where Megatron has one linear. Where they differ, each part
gets a pair of its own (as of `CanonicalLoRA`); where they are the same, as in folders saved from fused adapters, the
linear has one again. Nothing is approximated.

    recipe = recipe_of_folder(folder, rules, num_layers)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from weightcast.bridges.hf_import import ImportReport, import_weights
from weightcast.bridges.peft.folder import AdapterFolder
from weightcast.bridges.peft.names import LORA_A, PARTS, linear_of_key, peft_name
from weightcast.bridges.peft.recipes import CanonicalLoRA, DoRA, LoRA
from weightcast.bridges.peft.rules import PART_FIELDS
from weightcast.bridges.peft.settings import UpdateSettings, shorten
from weightcast.bridges.plan import Plan
from weightcast.bridges.rule_table import name_some
from weightcast.bridges.rules import Rule, expand_rules
from weightcast.bridges.rules_experts import EXPERT, PerExpert
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader
from weightcast.sync.errors import CheckpointMismatch, ConfigError, UnsupportedModel

_TARGETS = {part: target for target, (_, part) in PARTS.items()}
Selection = Mapping[str, tuple[str, ...] | None]
"""Each linear of the model: None where it has no adapter, () for one adapter, or its adapted parts."""


def recipe_of_folder(folder: AdapterFolder, rules: Sequence[Rule], num_layers: int) -> LoRA:
    """The recipe whose adapters hold the folder's exactly. Reads the A's of fused linears; no collective.

    Raises `UnsupportedModel` for an adapter of something that is no linear of a layer, or of some experts only.
    """
    selection, settings = select_linears(folder, rules, num_layers)
    targets = find_targets(selection)
    config = folder.config
    kind = DoRA if config.use_dora else CanonicalLoRA if any(map(_is_part, targets)) else LoRA
    return kind(
        target_modules=targets,
        dim=config.r,
        alpha=config.lora_alpha,
        rank_pattern=shorten({name: own.rank for name, own in settings.items()}, config.r),
        alpha_pattern=shorten({name: own.alpha for name, own in settings.items()}, config.lora_alpha),
        use_rslora=config.use_rslora,
        dropout=config.lora_dropout,
    )


def select_linears(
    folder: AdapterFolder, rules: Sequence[Rule], num_layers: int
) -> tuple[Selection, dict[str, UpdateSettings]]:
    """How each linear of the model is adapted in `folder`, and the settings of each adapter by its whole target.

    Raises `UnsupportedModel`.
    """
    left = set(folder.settings)
    selection: dict[str, tuple[str, ...] | None] = {}
    settings: dict[str, UpdateSettings] = {}
    with folder.files.reader() as reader:
        for key, rule in expand_rules(rules, num_layers).items():
            linear = linear_of_key(key)
            if linear is not None:
                groups = _groups(rule)
                parts = selection[linear] = _select(rule.megatron, groups, folder.settings, reader)
                if parts is not None:
                    settings |= _by_target(linear, parts, groups[0], folder.settings)
                left -= set(rule.hf_names)
    if left:
        raise UnsupportedModel(
            f"{folder.files.folder} adapts {name_some(sorted(left))}, which is no linear inside a layer of this model; "
            "take an adapter of this model, without modules such as lm_head, embed_tokens or a router"
        )
    return selection, settings


def _select(
    megatron: str, groups: Sequence[Mapping[str, str]], settings: Mapping[str, UpdateSettings], reader: RegionReader
) -> tuple[str, ...] | None:
    adapted = [name for group in groups for name in group.values() if name in settings]
    if not adapted:
        return None
    present = {tuple((part, settings[name]) for part, name in group.items() if name in settings) for group in groups}
    if len(present) > 1:
        raise UnsupportedModel(
            f"the adapter has {name_some(adapted)}, but not the same, or not with the same rank and alpha, of all "
            f"experts of {megatron}; experts of a layer are adapted alike"
        )
    (own,) = present
    alike = len({setting for _, setting in own}) == 1
    if alike and len(own) == len(groups[0]) and all(_share_inputs(list(group.values()), reader) for group in groups):
        return ()
    return tuple(part for part, _ in own)


def _by_target(
    linear: str, parts: Sequence[str], names: Mapping[str, str], settings: Mapping[str, UpdateSettings]
) -> dict[str, UpdateSettings]:
    """The settings of one linear, or of its adapted `parts` with their HF `names`, by the targets that mean them."""
    if not parts:
        return {linear: settings[next(iter(names.values()))]}
    return {f"{linear.rpartition('.')[0]}.{_TARGETS[part]}": settings[names[part]] for part in parts}


def _groups(rule: Rule) -> list[dict[str, str]]:
    """The HF weights of a linear by part, one record an expert; a weight that is whole in HF is the part ''."""
    inner = rule.rule if isinstance(rule, PerExpert) else rule
    parts = [part for part, (kind, _) in PART_FIELDS.items() if isinstance(inner, kind)]
    names = {part: getattr(inner, PART_FIELDS[part][1]) for part in parts}
    names = names or {str(number or ""): name for number, name in enumerate(inner.hf_names)}
    if not isinstance(rule, PerExpert):
        return [names]
    return [
        {part: name.replace(EXPERT, str(expert)) for part, name in names.items()} for expert in range(rule.num_experts)
    ]


def _share_inputs(weights: Sequence[str], reader: RegionReader) -> bool:
    """Whether the adapters of these weights have one and the same A."""
    first, *others = (reader.read_whole(peft_name(name, LORA_A)) for name in weights)
    return all(torch.equal(first, other) for other in others)


def find_targets(selection: Selection) -> tuple[str, ...]:
    """Targets that select just this: last names where all linears of the name are adapted alike, else whole ones."""
    by_last_name: dict[str, dict[str, tuple[str, ...] | None]] = {}
    for linear, parts in selection.items():
        by_last_name.setdefault(linear.rpartition(".")[2], {})[linear] = parts
    targets: list[str] = []
    for last_name, linears in by_last_name.items():
        alike = len(set(linears.values())) == 1
        for linear, parts in linears.items():
            if parts is not None:
                stem = "" if alike else f"{linear.rpartition('.')[0]}."
                targets += [f"{stem}{name}" for name in ([_TARGETS[part] for part in parts] or [last_name])]
    return tuple(dict.fromkeys(targets))


def _is_part(target: str) -> bool:
    return target.rpartition(".")[2] in PARTS


def load_adapter(
    plan: Plan, folder: AdapterFolder, recipe: LoRA, settings: Mapping[str, UpdateSettings]
) -> ImportReport:
    """Fill this rank's adapters, of which `plan` is the plan and `recipe` the recipe, from `folder`. No collective.

    `settings` are the recipe's, of each weight (`rules.weight_settings`). All is checked before the first parameter is
    written. Raises `CheckpointMismatch` when the folder is of another recipe or another base model, or has several A's
    where the model has one.
    """
    _check_settings(folder, recipe, settings)
    _check_tensors(plan, folder.files)
    _check_shared_inputs(plan, folder.files)
    return import_weights(plan, folder.files)


def _check_shared_inputs(plan: Plan, files: CheckpointFiles) -> None:
    with files.reader() as reader:
        for task in plan.tasks:
            first: dict[object, str] = {}
            for held in (held for held in task.held if held.region.name.endswith(LORA_A)):
                other = first.setdefault(held.live, held.region.name)
                if other != held.region.name and not torch.equal(
                    reader.read(held.region), reader.read(replace(held.region, name=other))
                ):
                    raise CheckpointMismatch(
                        f"{held.region.name} in {files.folder} differs from {other}, but the model has one A for both; "
                        "apply CanonicalLoRA (or DoRA on linear_q, linear_k and linear_v) instead, or load the folder "
                        "into a model without adapters, which chooses by itself"
                    )


def _check_settings(folder: AdapterFolder, recipe: LoRA, settings: Mapping[str, UpdateSettings]) -> None:
    pairs: list[tuple[str, object, object]] = [("use_dora", folder.config.use_dora, recipe.use_dora)]
    for weight in (weight for weight in folder.settings if weight in settings):
        got, want = folder.settings[weight], settings[weight]
        pairs += [(f"rank of {weight}", got.rank, want.rank), (f"scaling of {weight}", got.scaling, want.scaling)]
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"{folder.files.folder} has {theirs} as {what}, the model's adapters have {ours}; apply a recipe of "
                "the same settings, or load the folder into a model without adapters"
            )


def _check_tensors(plan: Plan, files: CheckpointFiles) -> None:
    found = {spec.name: spec.shape for spec in files.specs}
    wanted = {spec.name: spec.shape for spec in plan.specs}
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointMismatch(
                f"{name} is not in {files.folder}, although the model has this adapter; apply a recipe with the "
                "folder's targets, or load the folder into a model without adapters"
            )
        if found[name] != shape:
            raise CheckpointMismatch(
                f"{name} has shape {found[name]} in {files.folder}, this model wants {shape}; the adapter was trained "
                "on another base model"
            )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointMismatch(
            f"{files.folder} has {name_some(extra)}, for which the model has no adapter; apply a recipe with the "
            "folder's targets, or load the folder into a model without adapters"
        )
