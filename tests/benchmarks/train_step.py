"""The case of a training step on CPU: ours on Megatron-Core, against transformers' own model with plain PyTorch.

The same weights, batches, optimizer and clipping in one process, in turns. Losses are compared in every round, so that
both have done the same work.
"""

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import take_turns
from records import CaseError, Reading, Settings

from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.packing import StreamRecord, TokenStream
from weightcast.trainer.data.samples import Batch, Batches
from weightcast.trainer.data.text_samples import text_splits

SEQ_LENGTH, BATCH = 256, 4
LR = 1e-4
STEPS_A_ROUND = 2
TOLERANCE = 1e-3


def measure_train_step(settings: Settings) -> Reading:
    """Seconds of a step, ours and plain PyTorch's."""
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = _write_model(Path(folder), quick=settings.quick)
        ours, theirs = Ours(_config(Path(folder)), _batches()), _Plain(Path(folder))
        times = take_turns({"ours": ours.take_steps, "plain": theirs.take_steps}, settings.rounds)
        worst = compare_losses(ours.losses, theirs.losses, TOLERANCE)
        details = {f"{name}_s": seconds for name, seconds in ours.phases_s.items()}
        ours.close()
    note = (
        f"Qwen3 of {num_parameters / 1e6:.1f} M parameters, fp32, {BATCH} x {SEQ_LENGTH} tokens, AdamW, clipping, "
        f"{torch.get_num_threads()} thread(s); losses differ by {worst:.1g} at most"
    )
    return Reading(times["ours"], times["plain"], "s", note, details)


def _write_model(folder: Path, *, quick: bool) -> int:
    from transformers import AutoModelForCausalLM, Qwen3Config

    size = 64 if quick else 512
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model.num_parameters()  # type: ignore[no-any-return]


def _config(folder: Path) -> ConfigContainer:
    config = ConfigContainer()
    config.model.hf_path, config.dataset.seq_length = str(folder), SEQ_LENGTH
    config.train.micro_batch_size = config.train.global_batch_size = BATCH
    config.train.train_iters, config.scheduler.lr_decay_style = 1_000_000, "constant"
    config.optimizer.lr = config.optimizer.min_lr = LR
    return config


def _batches() -> Batches:
    tokens = np.random.default_rng(0).integers(0, 8192, 64 * SEQ_LENGTH + 1, dtype=np.int32)
    return batches_of(tokens, seq_length=SEQ_LENGTH, micro_batch=BATCH, global_batch=BATCH)


def batches_of(tokens: np.ndarray, *, seq_length: int, micro_batch: int, global_batch: int) -> Batches:
    """Samples of one document of int32 tokens, in an order that is always the same."""
    record = StreamRecord(1, "", "", None, None, int(tokens.max()), len(tokens), [])
    stream = TokenStream(tokens, np.zeros(1, dtype=np.int64), record)
    samples, *_ = text_splits(stream, seq_length=seq_length, seed=1, split=None)
    return Batches(samples, micro_batch_size=micro_batch, global_batch_size=global_batch)


def compare_losses(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> float:
    """The largest difference of two contestants' losses. Raises `CaseError` where they have not done the same."""
    if len(ours) != len(theirs):
        raise CaseError("the two have not taken as many steps")
    differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    worst = max(differences)
    if not all(difference <= tolerance for difference in differences):  # NaN is not
        raise CaseError(f"losses differ by {worst:.2g}, allowed are {tolerance:.2g}: the two have not done the same")
    return worst


class Contestant(ABC):
    """Takes steps and remembers their losses."""

    def __init__(self, batches: Batches, steps_a_round: int = STEPS_A_ROUND) -> None:
        self.losses: list[float] = []
        self._batches, self._steps_a_round = batches, steps_a_round

    def take_steps(self) -> float:
        """Seconds a step."""
        start_s = time.perf_counter()
        for _ in range(self._steps_a_round):
            self.losses.append(self._step())
        return (time.perf_counter() - start_s) / self._steps_a_round

    @abstractmethod
    def _step(self) -> float:
        """Take a step; its loss."""


class _Plain(Contestant):
    def __init__(self, folder: Path) -> None:
        super().__init__(_batches())
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._optimizer = make_adam(self._model)

    def _step(self) -> float:
        (batch,) = self._batches.of_step(
            consumed_samples=BATCH * len(self.losses), data_parallel_rank=0, data_parallel_size=1
        )
        self._optimizer.zero_grad()
        loss = _masked_mean(self._model(batch.tokens).logits, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return loss.item()


def make_adam(model: torch.nn.Module, **options: bool) -> torch.optim.AdamW:
    """The optimizer of `Ours` for a model that plain PyTorch trains."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, **options)


def _masked_mean(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()


class Ours(Contestant):
    """Our trainer's own step. `config` is not checked; the model is random where it names no folder."""

    def __init__(self, config: ConfigContainer, batches: Batches, steps_a_round: int = STEPS_A_ROUND) -> None:
        super().__init__(batches, steps_a_round)
        from weightcast.trainer.events import EventLog
        from weightcast.trainer.gpt_step import forward_step
        from weightcast.trainer.loop import train_step
        from weightcast.trainer.state import build_state, make_provider

        provider, self.bridge = make_provider(config, None)
        self.state, events = build_state(config, provider), EventLog(None, rank=0)
        self._train_step: Callable[[], Any] = lambda: train_step(self.state, forward_step, self._batches, events)
        self.phases_s: dict[str, float] = {}

    def _step(self) -> float:
        report = self._train_step()
        self.phases_s = dict(report.phases_s)
        return float(report.loss)

    def close(self) -> None:
        """Give up the process group, so that another case may make its own."""
        from weightcast.bridges.process_groups import destroy_distributed

        destroy_distributed()
