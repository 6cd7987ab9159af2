"""What every engine adapter must do, as checks that its author runs against the real engine.

An author wraps the engine in `EngineUnderTest` (offer a set of tensors as a version, generate, read the label) and
runs `run_conformance`; the tests of both engines that weightcast ships do exactly this. A check that fails raises
`AssertionError` with what was seen.

    first, second = ...                      # two state dicts of one architecture; the engine was started on `first`
    run_conformance(engine, first, second, fresh_tokens=tokens_of_an_engine_started_on_second, prompt=(1, 2, 3))
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weightcast.sync.errors import WeightcastError

Tensors = Mapping[str, torch.Tensor]


class EngineUnderTest(Protocol):
    """A running engine, reached in whatever way it is reached in earnest."""

    def offer(self, tensors: Tensors) -> None:
        """Publish `tensors` as the next version and return when the engine serves it.

        Raises a `WeightcastError` with the engine's own reason when it does not.
        """
        ...

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Greedy tokens."""
        ...

    def weight_version(self) -> str:
        """The label of the weights that the engine serves."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to spoil a set of tensors: the name of the tensor that a refusal must mention, and the spoiled set."""

    title: str
    tensor: str
    tensors: dict[str, torch.Tensor]


def make_faults(tensors: Tensors) -> list[Fault]:
    """A missing, an extra, a mis-shaped and a mistyped tensor, and half of a fused pair. Pure.

    The half of a fused pair (`gate_proj` without `up_proj`) matters: engines that fuse them may take it silently.
    """
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and ".layers." in name)
    tensor = tensors[name]
    other = torch.float16 if tensor.dtype != torch.float16 else torch.bfloat16
    half = next((key for key in tensors if re.search(r"gate_proj\.weight$", key)), name)
    return [
        Fault("a missing tensor", name, _without(tensors, name)),
        Fault("half of a fused pair", half, _without(tensors, half)),
        Fault("an extra tensor", "model.unknown.weight", {**tensors, "model.unknown.weight": torch.ones(2, 2)}),
        Fault("a mis-shaped tensor", name, {**tensors, name: tensor[:-1].clone()}),
        Fault("a transposed tensor", half, {**tensors, half: tensors[half].t().contiguous()}),
        Fault("a mistyped tensor", name, {**tensors, name: tensor.to(other)}),
    ]


def _without(tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def check_refuses(engine: EngineUnderTest, fault: Fault, prompt: Sequence[int], max_tokens: int) -> None:
    """A spoiled set is refused with an error that names the tensor; tokens and label stay as they were."""
    tokens, label = engine.generate(prompt, max_tokens), engine.weight_version()
    try:
        engine.offer(fault.tensors)
    except WeightcastError as error:
        assert fault.tensor in str(error), f"{fault.title}: the refusal does not name {fault.tensor}: {error}"
    else:
        raise AssertionError(f"{fault.title} ({fault.tensor}) was taken; it must be refused")
    after = engine.generate(prompt, max_tokens)
    assert after == tokens, f"{fault.title}: tokens changed from {tokens} to {after} although it was refused"
    now = engine.weight_version()
    assert now == label, f"{fault.title}: the label went from {label} to {now} although it was refused"


def check_takes(
    engine: EngineUnderTest, tensors: Tensors, expected: Sequence[int], prompt: Sequence[int], max_tokens: int
) -> None:
    """A whole set is served: tokens equal those of a fresh engine, and the label is a new one."""
    label = engine.weight_version()
    engine.offer(tensors)
    tokens = engine.generate(prompt, max_tokens)
    assert tokens == tuple(expected), f"after an update tokens are {tokens}, a fresh engine has {tuple(expected)}"
    assert engine.weight_version() != label, f"the label is still {label} after a whole update"


def run_conformance(
    engine: EngineUnderTest,
    first: Tensors,
    second: Tensors,
    *,
    fresh_tokens: Sequence[int],
    prompt: Sequence[int],
    report: Callable[[str], None] = print,
) -> None:
    """Every check, on an engine that was started on `first`.

    `fresh_tokens` are the greedy tokens after `prompt` of an engine started on `second`; they must differ from
    those of `first`, or the checks would prove nothing.
    """
    num = len(fresh_tokens)
    first_tokens = engine.generate(prompt, num)
    assert first_tokens != tuple(fresh_tokens), "both checkpoints give the same tokens; choose others"
    for fault in make_faults(second):
        check_refuses(engine, fault, prompt, num)
        report(f"refuses {fault.title}")
    check_takes(engine, second, fresh_tokens, prompt, num)
    report("takes a whole version after refusals, with the tokens of a fresh engine")
    for fault in make_faults(first)[:2]:
        check_refuses(engine, fault, prompt, num)
        report(f"refuses {fault.title} after an update")
    check_takes(engine, first, first_tokens, prompt, num)
    report("takes the first weights again, with the tokens it had")
