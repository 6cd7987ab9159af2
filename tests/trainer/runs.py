"""What the trainer's tests run on each rank: one or more trainings in one process group, described in JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any

from weightcast.bridges import AutoBridge
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import WeightcastError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import StepReport
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.overrides import load_config
from weightcast.trainer.pretrain import pretrain

SEQ_LENGTH = 16


def words_for(model: Path, texts: list[Path], cache: Path) -> list[str]:
    """The overrides that all runs share."""
    return [
        f"model.hf_path={model}",
        f"dataset.files={json.dumps([str(path) for path in texts])}",
        f"dataset.cache_dir={cache}",
        f"dataset.seq_length={SEQ_LENGTH}",
        "train.global_batch_size=8",
        "train.train_iters=4",
        "optimizer.lr=2e-3",
        "optimizer.min_lr=2e-4",
        "scheduler.lr_decay_iters=6",
    ]


def train_all(runs: dict[str, list[str]]) -> dict[str, Any]:
    """Each run's losses, gradient norms, and sum of its exported weights; or the error it ended with."""
    results: dict[str, Any] = {}
    for name, words in runs.items():
        try:
            config = load_config(words)
            reports = _train_provider(config) if name == "provider" else pretrain(config, forward_step)
            results[name] = {
                "losses": [report.loss for report in reports],
                "grad_norms": [report.grad_norm for report in reports],
                "lrs": [report.lr for report in reports],
                "weights": sum_of(config.checkpoint.export_hf),
            }
        except WeightcastError as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        destroy_model_parallel()
    return results


def _train_provider(config: ConfigContainer) -> list[StepReport]:
    """As a script does that makes the provider itself."""
    bridge = AutoBridge.from_hf_pretrained(config.model.hf_path)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.calculate_per_token_loss = True
    provider.finalize()
    config.model = provider
    config.tokenizer.vocab_size = provider.vocab_size
    return pretrain(config, forward_step, bridge=bridge)


def sum_of(folder: str | None) -> str | None:
    """A hash of the weights in an exported folder."""
    if folder is None:
        return None
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
