"""A `transformers` model as an engine: greedy or sampled generation, and weights that are replaced in place.

An update is checked whole (names, shapes, dtypes, ties) before the first byte of the model changes, then copied
into the live parameters while no request runs. A request that was frozen across an update starts again from its
prompt, so every answer comes from one version.

    engine = TransformersEngine(Path("path/to/hf"))
    engine.generate([2, 651, 6037], max_tokens=8)
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from weightcast.adapters.engine import (
    INITIAL_LABEL,
    Completion,
    PauseMode,
    check_offer,
    check_ties,
    specs_of,
    version_label,
)
from weightcast.adapters.transformers.gate import Gate
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import EngineError, ModelMismatch
from weightcast.sync.regions import TensorSpec, dtype_name
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

_UPDATE = "an update"  # this owner's name at the gate


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, otherwise drawn, repeatably with a seed."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False


class TransformersEngine:
    """An `Engine` around one causal language model. Generation may be called from many threads.

    `folder` is an HF folder with safetensors files; `dtype` is the element type in memory (default: the
    checkpoint's), `device` a torch device. Raises `CheckpointMismatch` without weights in the folder and
    `EngineError` for a model whose parameters do not carry the names of its files.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "transformers",
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        admission_timeout_s: float = 600.0,
    ) -> None:
        self._name = name
        self.gate = Gate()
        self.label = INITIAL_LABEL
        self._admission_timeout_s = admission_timeout_s
        self._specs = open_checkpoint(folder).specs
        self._model = _load_model(folder, dtype).to(device).eval()
        self._targets, self.aliases = _find_targets(self._model, self._specs, folder)
        self._eos = _eos_token_ids(self._model)

    @property
    def name(self) -> str:
        """The name under which the fleet knows this engine."""
        return self._name

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    def expected_specs(self) -> tuple[TensorSpec, ...]:
        """What an update must consist of: the tensors of the checkpoint."""
        return self._specs

    def prepare(self, version: Version, specs: Sequence[TensorSpec]) -> None:
        """Raise `ModelMismatch` unless `specs` is the set that the model expects."""
        check_offer(self._specs, specs, self.aliases)

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Close the gate for an update. Raises `DeadlineExceeded`."""
        self.gate.close(_UPDATE, mode, timeout_s)

    def resume(self) -> None:
        """Open the gate, unless an operator closed it, too."""
        self.gate.open(_UPDATE)

    def load(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy `tensors` into the live model and take the label of `version`; only while paused.

        Raises `ModelMismatch` with the model untouched, `EngineError` when it was already touched: the gate is
        then broken and every request fails until the process is started anew.
        """
        offered = list(tensors)
        check_offer(self._specs, specs_of(offered), self.aliases)
        held = dict(offered)
        check_ties(held, self.aliases)
        if not self.gate.is_paused:
            raise ModelMismatch(f"{self._name}: pause before a load; requests would see two versions")
        try:
            self._copy(held)
        except Exception as error:
            reason = f"its weights are undefined since loading version {version} broke off ({error})"
            self.gate.break_down(reason)
            raise EngineError(f"{self._name}: {reason}; restart the engine") from error
        self.label = version_label(version)

    def own_tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors that the checkpoint's names stand for, to be written while paused."""
        return {spec.name: self._targets[spec.name] for spec in self._specs}

    def landed(self, version: Version) -> None:
        """The live tensors were written and have the bits of `version`: take its label; only while paused."""
        assert self.gate.is_paused, "pause before versions land; requests would see two"
        self.label = version_label(version)

    @torch.no_grad()
    def _copy(self, held: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            if name not in self.aliases:
                self._targets[name].copy_(tensor)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Completion:
        """Greedy tokens after a prompt."""
        return self.sample(prompt_token_ids, Sampling(max_tokens))

    def sample(self, prompt_token_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Tokens after a prompt of at least one id, all from one version.

        Raises `DeadlineExceeded` when the engine stays paused too long and `EngineError` when it cannot serve.
        """
        with self.gate.admitted(self._admission_timeout_s):
            while True:
                label = self.label
                completion = self._run(prompt_token_ids, sampling, label)
                if completion is not None:
                    return completion

    @torch.no_grad()
    def _run(self, prompt: Sequence[int], sampling: Sampling, label: str) -> Completion | None:
        """One attempt under `label`; `None` when the weights changed while the request was frozen."""
        generator = torch.Generator().manual_seed(sampling.seed) if sampling.seed is not None else None
        inputs = torch.tensor([list(prompt)], device=self._model.device)
        cache = None
        tokens: list[int] = []
        while len(tokens) < sampling.max_tokens:
            going = self.gate.between_tokens()
            if self.label != label:
                return None
            if not going:
                return Completion(tuple(tokens), label, "abort")
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = _choose(output.logits[0, -1], sampling.temperature, generator)
            tokens.append(token)
            if token in self._eos and not sampling.ignore_eos:
                return Completion(tuple(tokens), label, "stop")
            inputs = torch.tensor([[token]], device=self._model.device)
        return Completion(tuple(tokens), label, "length")


def _load_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    chosen = "auto" if dtype is None else dtype
    return AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, local_files_only=True)


def _find_targets(
    model: PreTrainedModel, specs: Sequence[TensorSpec], folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The live tensor behind every name of the checkpoint, and the names that are tied to another one."""
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    aliases = {name: first[id(t)] for name, t in state.items() if first.setdefault(id(t), name) != name}
    names = {spec.name for spec in specs}
    unknown = sorted(names - state.keys())
    unfilled = sorted(state.keys() - names - aliases.keys())
    if unknown or unfilled:
        raise EngineError(
            f"{type(model).__name__} does not keep the tensors of {folder} under their own names: in the files only "
            f"{unknown[:5]}, in memory only {unfilled[:5]}. The embedded engine takes dense models whose names agree "
            "(Llama, Qwen 2 and 3, Gemma 3); use vLLM for this one"
        )
    for spec in specs:
        if tuple(state[spec.name].shape) != spec.shape:
            raise EngineError(f"{spec.name} is {list(spec.shape)} on disk and {list(state[spec.name].shape)} in memory")
    logger.info("%d tensors, dtype %s, tied: %s", len(specs), dtype_name(model.dtype), aliases or "none")
    return {name: tensor.detach() for name, tensor in state.items()}, aliases


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    eos = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    weights = torch.softmax(logits.float().cpu() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
