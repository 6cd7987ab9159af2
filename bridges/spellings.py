"""Spellings: checkpoints of one model under other HF names, and rules that follow the checkpoint at hand.

Some versions of transformers wrote models that see under the names that they have in memory. A family lists, for each
such spelling, what the beginnings of its rules' HF names become. The rules follow the checkpoint, so that an export has
the names of the folder that was imported.

    spelling = find_spelling(family.spellings, checkpoint.specs)
    rules = [respell_rule(rule, spelling) for rule in family.rules(hf_config)]
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from weightcast.bridges.rules import Rule
from weightcast.sync.regions import TensorSpec

Spelling = Mapping[str, str]
"""By the beginning of a name in the rules: the beginning in the checkpoint. Empty for the names of the rules."""


def find_spelling(spellings: Sequence[Spelling], specs: Iterable[TensorSpec]) -> Spelling:
    """The first of `spellings` of which a checkpoint has every beginning, or else that of the rules themselves."""
    names = [spec.name for spec in specs] if spellings else []
    for spelling in spellings:
        if all(any(name.startswith(beginning) for name in names) for beginning in spelling.values()):
            return spelling
    return {}


def respell(name: str, spelling: Spelling) -> str:
    """An HF name of the rules as the checkpoint has it."""
    for ours, theirs in spelling.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def respell_rule(rule: Rule, spelling: Spelling) -> Rule:
    """The rule with its HF names respelled; for rules whose fields are names, as of `TemplateRule`."""
    if not spelling:
        return rule
    names = [field.name for field in fields(rule) if field.name != "megatron"]  # type: ignore[arg-type]
    texts = {name: text for name in names if isinstance(text := getattr(rule, name), str)}
    return replace(rule, **{name: respell(text, spelling) for name, text in texts.items()})  # type: ignore[type-var]
