"""Attaching: find the linears that a recipe wants, freeze the model, and give each of them its factors."""

import difflib
import math
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from torch import nn

from weightcast.bridges.exchange import communication_device
from weightcast.bridges.layers.linears import with_frozen_weight
from weightcast.bridges.layers.mtp import INNER_LAYER, INNER_MODULE
from weightcast.bridges.peft.factors import LowRank, PartRows, SplitLowRank
from weightcast.bridges.peft.grouped import adapted_grouped_class, is_grouped, weight_of
from weightcast.bridges.peft.layers import Adaptation, adapted_class, adapted_weights
from weightcast.bridges.peft.names import GATE_UP_PARTS, PARTS, QKV_PARTS, applies, fused_target, matches
from weightcast.bridges.peft.placement import Placement, read_placement
from weightcast.bridges.peft.state import AdapterState
from weightcast.bridges.rules import FusedQkv, GatedMlp, ModelDimensions
from weightcast.bridges.shards import Model, unwrap_chunks
from weightcast.sync.errors import ConfigError

if TYPE_CHECKING:
    from weightcast.bridges.peft.recipes import LoRA


def attach_adapters(recipe: "LoRA", model: Model) -> list[MegatronModule]:
    """See `LoRA.apply`."""
    given = [model] if isinstance(model, nn.Module) else list(model)
    chunks = unwrap_chunks(model)
    if any(isinstance(chunk, DistributedDataParallel) for chunk in given):
        raise ConfigError(
            "the model is already wrapped for data parallelism, whose buffers would not know the adapters; register "
            "the recipe with provider.register_pre_wrap_hook, or provide the model with wrap_with_ddp=False"
        )
    if any(getattr(chunk.config, "use_transformer_engine_op_fuser", False) for chunk in chunks):
        raise ConfigError(
            "use_transformer_engine_op_fuser computes MLPs out of their linears' weights alone, past the adapters: set "
            "it to False on the provider"
        )
    if next(adapted_weights(chunks), None) is not None:
        raise ConfigError("the model has adapters already; apply one recipe to a model")
    found = [(name, linear) for chunk in chunks for name, linear in _named_linears(chunk)]
    _check_targets(recipe, [name for name, _ in found])
    state = AdapterState(recipe)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.adapter_state = state
        for module in chunk.modules():
            if isinstance(module, RowParallelLinear):
                module.__class__ = with_frozen_weight(type(module))
    for name, linear in found:
        parts = recipe.parts_of(_without_expert(name))
        if parts is not None:
            _adapt(recipe, name, linear, parts)
    return given


def find_state(model: Model) -> AdapterState | None:
    """What the model's adapters are; the same on every rank, also where nothing was adapted. None without any."""
    state: AdapterState | None = getattr(unwrap_chunks(model)[0], "adapter_state", None)
    return state


def _named_linears(chunk: MegatronModule) -> Iterator[tuple[str, Any]]:
    """The chunk's linears by their names in the whole model, with its numbers of layers and experts."""
    for path, module in chunk.named_modules():
        if path.rpartition(".")[2].startswith("linear_"):
            yield whole_name(chunk, path), module


def whole_name(chunk: nn.Module, path: str) -> str:
    """The name in the whole model of the module at `path` in a bare chunk: with its numbers of layers and experts."""
    words: list[str] = []
    module: Any = chunk
    before: Any = chunk
    for word in path.split("."):
        before, module = module, getattr(module, word)
        if word.isdigit() and hasattr(module, "layer_number"):
            word = str(module.layer_number - 1)
        elif word.isdigit() and words[-1] == "local_experts":
            word = str(parallel_state.get_expert_model_parallel_rank() * len(before) + int(word))
        elif word == INNER_MODULE:
            word = INNER_LAYER
        words.append(word)
    return ".".join(words)


def _without_expert(name: str) -> str:
    """All experts of a layer are adapted alike, and targets name them once."""
    front, is_expert, back = name.partition(".local_experts.")
    return f"{front}.{back.partition('.')[2]}" if is_expert else name


def _check_targets(recipe: "LoRA", names: list[str]) -> None:
    """Every target is a linear of the whole model, which only all ranks together know."""
    linears = sorted({_without_expert(name) for name in names})
    patterns = (*recipe.rank_pattern, *recipe.alpha_pattern)
    found = [any(matches(fused_target(target)[0], linear) for linear in linears) for target in recipe.target_modules]
    found += [any(_is_used(recipe, target, linear) for linear in linears) for target in patterns]
    hits = torch.tensor(found, dtype=torch.int32, device=communication_device())
    if dist.is_initialized():
        dist.all_reduce(hits, dist.ReduceOp.MAX)
    used = hits.tolist()[len(recipe.target_modules) :]
    if unused := [target for target, hit in zip(patterns, used, strict=True) if not hit]:
        raise ConfigError(
            f"rank_pattern or alpha_pattern names {unused[0]!r}, which means none of the adapters that target_modules "
            f"({', '.join(recipe.target_modules)}) make; leave it out, or write it as in target_modules"
        )
    for target, hit in zip(recipe.target_modules, hits.tolist(), strict=False):
        if not hit:
            last = sorted({linear.rpartition(".")[2] for linear in linears})
            near = difflib.get_close_matches(target, [*last, *PARTS, *linears], n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ConfigError(
                f"target_modules names {target!r}, which is no linear of the model; {hint}it has {', '.join(last)} "
                f"({linears[0] if linears else 'none here'}, ...)"
            )


def _is_used(recipe: "LoRA", target: str, linear: str) -> bool:
    """Whether a pattern's target means an adapter that the recipe puts on `linear`."""
    parts = recipe.parts_of(linear)
    return parts is not None and any(applies(target, linear, part) for part in parts or ("",))


def _adapt(recipe: "LoRA", name: str, linear: Any, parts: tuple[str, ...]) -> None:
    placement = read_placement(linear, name)
    gated = name.endswith("linear_fc1") and linear.config.gated_linear_unit
    adapters, adaptations = [], []
    for own_name, weight in _weights(name, linear):
        adapter = _make_adapter(recipe, own_name, linear, weight, placement, parts)
        if recipe.use_dora:
            adapter.set_magnitude(placement.row_norms(weight.detach()).to(weight.dtype))
        for _, pair in adapter.pairs():
            _mark_parameters(pair, placement, weight)
        adapters.append(adapter)
        adaptations.append(Adaptation(placement, recipe.dropout, recipe.dropout_position, recipe.use_dora, gated))
    if is_grouped(linear):
        linear.__class__ = adapted_grouped_class(type(linear))
        linear.adapter, linear.adaptations = nn.ModuleList(adapters), adaptations
        return
    if hasattr(linear, "return_layernorm_output"):
        linear.return_layernorm_output = True  # Transformer Engine's fused norm: the adapter reads what is behind it
    linear.__class__ = adapted_class(type(linear))
    (linear.adapter,), (linear.adaptation,) = adapters, adaptations


def _weights(name: str, linear: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of a linear by their names in the whole model; of a grouped one as if each expert had its own."""
    if not is_grouped(linear):
        yield name, linear.weight
        return
    front, _, last = name.rpartition(".")
    first = parallel_state.get_expert_model_parallel_rank() * linear.num_gemms
    for index in range(linear.num_gemms):
        yield f"{front}.local_experts.{first + index}.{last}", weight_of(linear, index)


def _make_adapter(
    recipe: "LoRA", name: str, linear: Any, weight: nn.Parameter, placement: Placement, parts: tuple[str, ...]
) -> LowRank | SplitLowRank:
    if not parts:
        return _make_pair(recipe, name, "", linear.config, weight, placement, placement.num_out)
    rows = _part_rows(name, linear, placement, parts)
    pairs = {
        part: _make_pair(recipe, name, part, linear.config, weight, placement, rows.num_rows[part]) for part in parts
    }
    return SplitLowRank(pairs, rows)


def _part_rows(name: str, linear: Any, placement: Placement, parts: tuple[str, ...]) -> PartRows:
    """Which rows of the linear on this rank are whose. Raises `ConfigError` when ranks do not hold whole parts."""
    config = linear.config
    if parts[0] in QKV_PARTS:
        groups, rest = divmod(config.num_query_groups, placement.size)
        if rest or not name.endswith("linear_qkv"):
            raise ConfigError(
                f"{name}: {config.num_query_groups} query groups over {placement.size} tensor parallel ranks are cut "
                "inside a group, where query, key and value have no adapters of their own; use LoRA, or fewer ranks"
            )
        heads = config.num_attention_heads // placement.size
        dimensions = ModelDimensions(1, heads, groups, config.kv_channels, 0)
        rule = FusedQkv(name, *QKV_PARTS)
        return PartRows.make(QKV_PARTS, rule.segments((placement.num_out,), dimensions))
    if not config.gated_linear_unit:
        raise ConfigError(f"{name} has no gate, so it has no parts to adapt; target linear_fc1")
    dimensions = ModelDimensions(1, 1, 1, 1, 0)
    return PartRows.make(GATE_UP_PARTS, GatedMlp(name, *GATE_UP_PARTS).segments((placement.num_out,), dimensions))


def _make_pair(
    recipe: "LoRA", name: str, part: str, config: Any, weight: nn.Parameter, placement: Placement, num_rows: int
) -> LowRank:
    settings = recipe.settings_of(_without_expert(name), part)
    whole = torch.zeros(settings.rank, placement.all_inputs, device="cpu" if not weight.is_meta else "meta")
    if not weight.is_meta:
        words = f"{getattr(config, 'seed', 0)}:{name}" + (f".{part}" if part else "")
        _initialise(whole, recipe.lora_A_init_method, words)
    first = placement.rank * placement.num_in if placement.cut == "columns" else 0
    factor_in = whole[:, first : first + placement.num_in].to(device=weight.device, dtype=weight.dtype).contiguous()
    return LowRank(placement, factor_in, weight.new_zeros(num_rows, settings.rank), settings.scaling)


def _initialise(factor: torch.Tensor, method: str, seed: str) -> None:
    """Fill the whole A of one linear from its name, so that every layout of the model starts with the same values."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    if method == "xavier":
        nn.init.xavier_normal_(factor, generator=generator)
    elif method == "kaiming":
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)


def _mark_parameters(pair: LowRank, placement: Placement, weight: Any) -> None:
    """Tell Megatron what it must know of each parameter to sum gradients and count norms."""
    magnitude = [] if pair.weight_magnitude is None else [pair.weight_magnitude]
    output_side = [pair.linear_out.weight, *magnitude]
    cut = {"rows": output_side, "columns": [pair.linear_in.weight], "nothing": []}[placement.cut]
    parameters: list[Any] = list(pair.parameters())
    for parameter in parameters:
        parameter.allreduce = getattr(weight, "allreduce", True)
        # Norms count a whole parameter on the first rank of the dense layers' group alone (megatron-core 0.16.1),
        # which is wrong for experts: with fewer ranks to an expert, each of the group has experts of its own.
        counted_here = not parameter.allreduce and placement.rank == 0
        is_cut = any(parameter is other for other in cut)
        dim = (0 if placement.cut == "rows" else 1) if is_cut else -1
        set_tensor_model_parallel_attributes(parameter, is_cut or counted_here, dim, 1)
        if not is_cut:
            parameter.sequence_parallel = placement.sequence_parallel
