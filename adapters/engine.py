"""What weightcast needs of an inference engine: six methods, in the order in which an update calls them.

`prepare` may refuse while the engine serves on, `pause` empties the engine, `load` copies from local memory, and
`resume` lets requests in again. An engine that cannot be driven in process (a vLLM server) implements the same
protocol over its own routes.

    engine = TransformersEngine("path/to/hf")
    engine.prepare(version, update.specs)
    engine.pause("wait", timeout_s=30)
    engine.load(version, iter(update))
    engine.resume()
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from weightcast.sync.errors import ConfigError, ModelMismatch
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import Version, find_model_differences

PauseMode = Literal["abort", "wait", "keep"]
"""What happens to running requests, in vLLM's words: stopped with what they have, finished first, or frozen."""

INITIAL_LABEL = "default"
"""The label of the weights that an engine was started on; vLLM uses the same word."""

_NAMED_TENSORS = 12  # how many tensors one refusal lists before it only counts


@dataclass(frozen=True, slots=True)
class Completion:
    """Generated tokens and the label of the one version that they were generated with."""

    token_ids: tuple[int, ...]
    weight_version: str
    finish_reason: Literal["stop", "length", "abort"]


class Engine(Protocol):
    """An engine that takes versions. Calls come from one thread, in the order prepare, pause, load, resume."""

    @property
    def name(self) -> str:
        """The name under which the fleet knows this engine."""
        ...

    def prepare(self, version: Version, specs: Sequence[TensorSpec]) -> None:
        """Check that `version`, made of `specs`, can be loaded. The engine goes on serving.

        Raises `EngineError` when the engine's weights are undefined already, any other `WeightcastError` to refuse
        this version; nothing of the engine's memory may be touched here.
        """
        ...

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Let no request run until `resume`. Raises `DeadlineExceeded` and serves on when that takes longer."""
        ...

    def load(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace every weight by `tensors` (CPU, HF names) and take on the label of `version`.

        Called while paused. Raises `ModelMismatch` when it refuses with its memory untouched. Any other
        exception means that its weights are undefined: it must not serve again.
        """
        ...

    def resume(self) -> None:
        """Let requests run again, unless somebody else paused the engine before the update did."""
        ...

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Completion:
        """Greedy tokens after a prompt, for checks."""
        ...


def check_pause_mode(mode: str) -> PauseMode:
    """`mode` if it is one. Raises `ConfigError`."""
    for allowed in get_args(PauseMode):
        if mode == allowed:
            return allowed  # type: ignore[no-any-return]
    raise ConfigError(f"pause mode {mode!r} is unknown; choose one of {', '.join(get_args(PauseMode))}")


def version_label(version: Version) -> str:
    """The label that engines put into their answers: `"<epoch>.<number>"`."""
    return f"{version.epoch}.{version.number}"


def parse_label(label: str) -> Version | None:
    """The version of a label; `None` for labels that weightcast did not make, such as `"default"`."""
    epoch, dot, number = label.partition(".")
    return Version(int(epoch), int(number)) if dot and epoch.isdecimal() and number.isdecimal() else None


def specs_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TensorSpec, ...]:
    """What named tensors are, in their order."""
    return tuple(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors)


def check_offer(
    expected: Sequence[TensorSpec], offered: Sequence[TensorSpec], aliases: Mapping[str, str] | None = None
) -> None:
    """Raise `ModelMismatch` unless `offered` is exactly the set that an engine expects. Pure.

    `aliases` maps the name of a tied tensor to the tensor that it is tied to: some checkpoints list both, some
    only one, so an alias may be there or not on either side.
    """
    tied = aliases or {}
    counts = Counter(spec.name for spec in offered)
    doubles = [f"{name}: offered {count} times" for name, count in counts.items() if count > 1]
    faults = doubles + find_model_differences(_without(expected, tied), _without(offered, tied))
    if faults:
        more = f"; and {len(faults) - _NAMED_TENSORS} more" if len(faults) > _NAMED_TENSORS else ""
        raise ModelMismatch(
            f"the update does not fit the engine's model, {len(faults)} tensors differ: "
            f"{'; '.join(faults[:_NAMED_TENSORS])}{more}. The engine keeps its weights; publish every tensor of the "
            "checkpoint that the engine was started on, with its name, shape and dtype"
        )


def _without(specs: Sequence[TensorSpec], names: Mapping[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if spec.name not in names)


def check_ties(tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
    """Raise `ModelMismatch` when a tied tensor was sent with other values than the tensor that it is tied to."""
    for alias, name in aliases.items():
        if alias in tensors and name in tensors and not torch.equal(tensors[alias], tensors[name]):
            raise ModelMismatch(
                f"{alias} and {name} are one tensor in the engine, yet the update has different values for them; "
                "publish a model whose configuration ties them, or start the engine on one that does not"
            )
