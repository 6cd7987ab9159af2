"""What a PEFT folder holds, for people: its kind, and rank, alpha and number of the modules that it adapts.

The kind is that of the recipe which `load_hf_adapter` would choose: canonical LoRA where linears that are one in
Megatron have A's of their own. Headers are read, and the A's of such linears.

    described = describe_adapter(read_adapter(Path("my-lora")))
    described.kind, described.targets[0].name
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from weightcast.bridges.peft.folder import AdapterFolder
from weightcast.bridges.peft.names import LORA_A, peft_name
from weightcast.bridges.peft.settings import UpdateSettings
from weightcast.sync.checkpoint_files import RegionReader

# Modules of HF models that are one linear in Megatron, by their last names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True, slots=True)
class AdaptedModules:
    """The adapted modules of one last name, each with the same rank and alpha."""

    name: str
    num_modules: int
    settings: UpdateSettings


@dataclass(frozen=True, slots=True)
class AdapterDescription:
    """What there is to say of a PEFT folder."""

    kind: str
    """"LoRA", "canonical LoRA" or "DoRA"."""
    rank: int
    alpha: float
    use_rslora: bool
    dropout: float
    base_model: str | None
    targets: tuple[AdaptedModules, ...]

    def in_words(self) -> str:
        """One line."""
        scaling = "sqrt(rank)" if self.use_rslora else "rank"
        words = [f"rank {self.rank}", f"alpha {self.alpha:g} over {scaling}"]
        if any((own.settings.rank, own.settings.alpha) != (self.rank, self.alpha) for own in self.targets):
            words.append("other ranks or alphas by module")
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        return f"{', '.join(words)}; of the base model {self.base_model or 'that it does not name'}"


def describe_adapter(folder: AdapterFolder) -> AdapterDescription:
    """See the module. Reads the A's of linears that are fused in Megatron."""
    config = folder.config
    with folder.files.reader() as reader:
        apart = any(not _is_one(group, folder.settings, reader) for group in _fused_groups(folder.settings))
    counts: dict[tuple[str, UpdateSettings], int] = {}
    for weight, settings in folder.settings.items():
        key = (weight.removesuffix(".weight").rpartition(".")[2], settings)
        counts[key] = counts.get(key, 0) + 1
    return AdapterDescription(
        kind="DoRA" if config.use_dora else "canonical LoRA" if apart else "LoRA",
        rank=config.r,
        alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        dropout=config.lora_dropout,
        base_model=config.base_model,
        targets=tuple(AdaptedModules(name, number, settings) for (name, settings), number in counts.items()),
    )


def _fused_groups(settings: Mapping[str, UpdateSettings]) -> Iterator[list[str]]:
    """The weights, adapted or not, of each linear of Megatron's of which one at least is adapted."""
    seen: set[tuple[str, int]] = set()
    for weight in settings:
        parent, _, name = weight.removesuffix(".weight").rpartition(".")
        for number, group in enumerate(FUSED):
            if name in group and (parent, number) not in seen:
                seen.add((parent, number))
                yield [f"{parent}.{part}.weight" for part in group]


def _is_one(weights: Sequence[str], settings: Mapping[str, UpdateSettings], reader: RegionReader) -> bool:
    """Whether all the weights are adapted, alike, and with one and the same A."""
    if not all(weight in settings for weight in weights) or len({settings[weight] for weight in weights}) > 1:
        return False
    first, *others = (reader.read_whole(peft_name(weight, LORA_A)) for weight in weights)
    return all(torch.equal(first, other) for other in others)
