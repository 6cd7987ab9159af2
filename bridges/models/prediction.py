"""Layers for multi-token prediction as HF stores them: numbered on behind the model's own, one tensor each.

DeepSeek V3 and GLM-4.5 name their number in `num_nextn_predict_layers`. transformers computes without them and leaves
them out of what it writes, so whether a checkpoint has them is read off its names: `as_stored`. Each may repeat the
embedding and the output layer, which it shares with the model; those copies are compared on import and written again on
export.

    rules = MAIN_MODEL + prediction_layers(hf, rows_of_the_last_layer)
"""

import copy
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from weightcast.bridges.layers.mtp import INNER_LAYER
from weightcast.bridges.models.tables import MEGATRON_LAYER
from weightcast.bridges.rules import Rename, Rule, TemplateRule, Tied
from weightcast.bridges.rules_experts import PerExpert, StackedExperts, Transposed
from weightcast.sync.regions import TensorSpec

FIELD = "num_nextn_predict_layers"
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MEGATRON_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")


def num_prediction_layers(hf: PretrainedConfig) -> int:
    """Prediction layers behind the model's own."""
    return getattr(hf, FIELD, None) or 0


def with_prediction_layers(hf: PretrainedConfig, count: int) -> PretrainedConfig:
    """`hf` with `count` prediction layers; itself where it has as many."""
    if num_prediction_layers(hf) == count:
        return hf
    hf = copy.deepcopy(hf)
    setattr(hf, FIELD, count)
    return hf


def as_stored(hf: PretrainedConfig, names: Collection[str]) -> PretrainedConfig:
    """`hf` without prediction layers where a checkpoint's `names` are all of the main model."""
    stored = any(_is_prediction(hf, name) for name in names)
    return hf if stored else with_prediction_layers(hf, 0)


def count_megatron_layers(keys: Iterable[str]) -> int:
    """How many prediction layers the global keys of a Megatron checkpoint are of."""
    return len({match[1] for key in keys if (match := _MEGATRON_LAYER.match(key))})


def _is_prediction(hf: PretrainedConfig, name: str) -> bool:
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= hf.num_hidden_layers


def prediction_layers(hf: PretrainedConfig, last_layer: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rows of all prediction layers; `last_layer` are those of the model's last layer, which each is like inside.

    The two rows of what is shared match no Megatron tensor. They name the copies.
    """
    last_layer = tuple(last_layer)
    rules: list[Rule] = []
    for number in range(num_prediction_layers(hf)):
        layer = hf.num_hidden_layers + number
        ours, theirs = f"mtp.layers.{number}.", f"model.layers.{layer}."
        output = _EMBEDDING if hf.tie_word_embeddings else _OUTPUT
        rules += [
            Tied(f"{ours}embedding", _EMBEDDING, copy=f"{theirs}embed_tokens.weight"),
            Rename(f"{ours}enorm.weight", f"{theirs}enorm.weight"),
            Rename(f"{ours}hnorm.weight", f"{theirs}hnorm.weight"),
            Rename(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight"),
            *(_moved(rule, f"{ours}{INNER_LAYER}.").at_layer(layer) for rule in last_layer),
            Rename(f"{ours}final_layernorm.weight", f"{theirs}shared_head.norm.weight"),
            Tied(f"{ours}output_layer", output, copy=f"{theirs}shared_head.head.weight"),
        ]
    return tuple(rules)


def _moved(rule: Any, prefix: str) -> Any:
    """`rule` of the model's layers for the layer whose Megatron keys start with `prefix`."""
    if isinstance(rule, PerExpert | StackedExperts | Transposed):
        return replace(rule, rule=_moved(rule.rule, prefix))
    assert isinstance(rule, TemplateRule), rule
    return replace(rule, megatron=rule.megatron.replace(MEGATRON_LAYER, prefix))


def agree(specs: Sequence[TensorSpec], stored: PretrainedConfig, wanted: PretrainedConfig) -> tuple[TensorSpec, ...]:
    """`specs`, which have the prediction layers of `stored`, with those of `wanted`: the last left out, or more added.

    Added tensors are like those of the model's last layer, and come with the copies of what is shared.
    """
    count, wanted_count = num_prediction_layers(stored), num_prediction_layers(wanted)
    if count == wanted_count:
        return tuple(specs)
    end, wanted_end = stored.num_hidden_layers + count, wanted.num_hidden_layers + wanted_count
    left_out = {str(layer) for layer in range(wanted_end, end)}
    kept = [spec for spec in specs if (match := _LAYER.match(spec.name)) is None or match[1] not in left_out]
    added = [spec for layer in range(end, wanted_end) for spec in _specs_of_layer(wanted, specs, layer)]
    return (*kept, *added)


def _specs_of_layer(hf: PretrainedConfig, specs: Sequence[TensorSpec], layer: int) -> list[TensorSpec]:
    last, theirs = f"model.layers.{hf.num_hidden_layers - 1}.", f"model.layers.{layer}."
    known = {spec.name: spec for spec in specs}
    embedding, norm = known[_EMBEDDING], known[f"{last}input_layernorm.weight"]
    return [
        replace(embedding, name=f"{theirs}embed_tokens.weight"),
        replace(norm, name=f"{theirs}enorm.weight"),
        replace(norm, name=f"{theirs}hnorm.weight"),
        replace(norm, name=f"{theirs}eh_proj.weight", shape=(hf.hidden_size, 2 * hf.hidden_size)),
        *(replace(spec, name=spec.name.replace(last, theirs)) for spec in specs if spec.name.startswith(last)),
        replace(norm, name=f"{theirs}shared_head.norm.weight"),
        replace(known.get(_OUTPUT, embedding), name=f"{theirs}shared_head.head.weight"),
    ]
