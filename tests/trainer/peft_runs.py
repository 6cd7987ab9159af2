"""What the tests of adapters run on each rank: trainings in one process group, first gradients, first adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tests.trainer.runs import SEQ_LENGTH

from weightcast.bridges import AutoBridge
from weightcast.bridges.peft.merge import merged_adapters
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import WeightcastError
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.data.packing import load_or_pack
from weightcast.trainer.data.samples import Batches
from weightcast.trainer.data.text_samples import text_splits
from weightcast.trainer.events import EventLog
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.loop import train_step
from weightcast.trainer.overrides import load_config
from weightcast.trainer.peft.schemes import make_method
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.state import TrainState, build_state, make_provider


def write_adapter(words: list[str], folder: str) -> None:
    """A random adapter of a run's settings, as a PEFT folder; a fresh one changes nothing."""
    config = load_config(words)
    method = make_method(config.peft)
    assert method is not None
    bridge = AutoBridge.from_hf_pretrained(config.model.hf_path)
    provider = bridge.to_megatron_provider()
    model = provider.provide_distributed_model(wrap_with_ddp=False, pre_wrap_hook=method.apply)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (parameter for parameter in model[0].parameters() if parameter.requires_grad):
            if parameter.ndim == 1:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    bridge.save_hf_adapter(model, folder)
    destroy_model_parallel()


def train_adapters(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each run's losses and norms, or its error. A run has `words` and, for settings without one, `sizes`."""
    results: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            config = load_config(run["words"])
            bridge = _provide(config, run["sizes"]) if "sizes" in run else None
            reports = pretrain(config, forward_step, bridge=bridge)
            results[name] = {
                "losses": [report.loss for report in reports],
                "grad_norms": [report.grad_norm for report in reports],
            }
        except WeightcastError as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        destroy_model_parallel()
    return results


def _provide(config: ConfigContainer, sizes: dict[str, Any]) -> AutoBridge:
    bridge = AutoBridge.from_hf_pretrained(config.model.hf_path)
    provider = bridge.to_megatron_provider()
    provider.calculate_per_token_loss = True
    for name, value in sizes.items():
        setattr(provider, name, value)
    provider.finalize()
    config.model = provider
    return bridge


def train_alone(words: list[str], texts: list[str], folder: str) -> dict[str, Any]:
    """In `folder`: a first `adapter`, its `gradients` in the first step; then a whole run, which may write more."""
    write_adapter(words, f"{folder}/adapter")
    words = [*words, f"peft.load_adapter={folder}/adapter"]
    config = load_config(words)
    config.optimizer.clip_grad = 0.0
    state, bridge = one_step(config, texts, f"{folder}/cache")
    held = holdings(state)
    for parameter in trained_parameters(state):
        parameter.data.copy_(parameter.main_grad)
    bridge.save_hf_adapter(state.model, f"{folder}/gradients")
    destroy_model_parallel()
    exports = [f"peft.export_adapter={folder}/trained", f"checkpoint.export_hf={folder}/merged"]
    return {"held": held, **train_adapters({"run": {"words": [*words, *exports]}})["run"]}


def one_step(config: ConfigContainer, texts: Sequence[str], cache: str) -> tuple[TrainState, AutoBridge]:
    """A run's state after its first step."""
    provider, bridge = make_provider(config, None)
    assert bridge is not None
    state = build_state(config, provider, bridge)
    stream = load_or_pack([Path(text) for text in texts], config.model.hf_path, Path(cache))
    sizes = {"micro_batch_size": config.train.micro_batch_size, "global_batch_size": config.train.global_batch_size}
    samples, *_ = text_splits(stream, seq_length=SEQ_LENGTH, seed=1234, split=None)
    train_step(state, forward_step, Batches(samples, **sizes), EventLog(None, rank=0))
    return state, bridge


def trained_parameters(state: TrainState) -> list[Any]:
    """Of all chunks."""
    return [parameter for chunk in state.model for parameter in chunk.parameters() if parameter.requires_grad]


def holdings(state: TrainState) -> dict[str, Any]:
    """Numbers of elements: of what trains, in DDP's buffers, of the optimizer's moments; and stray gradients."""
    buffers = [buffer for chunk in state.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    frozen = [parameter for chunk in state.model for parameter in chunk.parameters() if not parameter.requires_grad]
    adams = [part.optimizer for part in state.optimizer.chained_optimizers]
    return {
        "trained": sum(parameter.numel() for parameter in trained_parameters(state)),
        "buffered": sum(parameter.numel() for buffer in buffers for parameter in buffer.params),
        "moments": sum(entry["exp_avg"].numel() for adam in adams for entry in adam.state.values()),
        "frozen_with_gradient": sum(
            parameter.grad is not None or hasattr(parameter, "main_grad") for parameter in frozen
        ),
    }


def save_both_ways(words: list[str], texts: list[str], folder: str) -> bool:
    """A step, then the merged model by views and by merging in place; whether the model is as before."""
    state, bridge = one_step(load_config(words), texts, f"{folder}/cache")
    before = [parameter.detach().clone() for chunk in state.model for parameter in chunk.parameters()]
    bridge.save_merged_hf(state.model, f"{folder}/views", show_progress=False)
    after = [parameter for chunk in state.model for parameter in chunk.parameters()]
    same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    with merged_adapters(state.model):
        bridge.save_hf_pretrained(state.model, f"{folder}/merged", show_progress=False)
    destroy_model_parallel()
    return same


def same_files(one: Path, other: Path) -> bool:
    """Whether two HF folders hold the same bits under the same names."""
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
