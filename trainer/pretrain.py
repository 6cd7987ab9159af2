"""Train a model from a Hugging Face checkpoint, publish its weights while it trains, export it at the end.

From a script, with a configuration made in Python:

    if __name__ == "__main__":  # saving a checkpoint starts a helper process, which imports the script again
        pretrain(cfg, forward_step)

or from the shell, on any number of ranks:

    torchrun --nproc-per-node 2 -m weightcast.trainer.pretrain model.hf_path=path/to/hf \\
        model.tensor_model_parallel_size=2 dataset.files=[a.txt] train.train_iters=5 \\
        publish.to=tcp://127.0.0.1:5600 checkpoint.export_hf=out
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch.distributed as dist

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_source import HFSource
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.sync.errors import ConfigError, WeightcastError
from weightcast.trainer.callbacks import Callback, Callbacks
from weightcast.trainer.checks import check_config
from weightcast.trainer.checks.data import check_samples_fill_a_batch
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.data.datasets import Splits, open_splits
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport
from weightcast.trainer.gpt_step import ForwardStep, forward_step
from weightcast.trainer.loop import TrainResult, train
from weightcast.trainer.peft.leaving import export_folders, make_source
from weightcast.trainer.plain_log import FORMAT, TIME_FORMAT
from weightcast.trainer.publishing import StepPublisher
from weightcast.trainer.quantizing import quantize_source
from weightcast.trainer.reporters import open_reporters
from weightcast.trainer.run_config import write_run_config
from weightcast.trainer.run_words import load_run
from weightcast.trainer.starting import start_from
from weightcast.trainer.state import TrainState, build_state, make_provider
from weightcast.trainer.store_publishing import anchor_folder

logger = logging.getLogger(__name__)

# Starts of messages, seen on torch 2.13 and megatron-core 0.16.1; none asks the user for anything.
EXPECTED_WARNINGS = (
    r"`torch.distributed.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"When using async grad allreduce it is recommended",
    r"full scope is deprecated",
)


def pretrain(
    cfg: ConfigContainer,
    forward_step_func: ForwardStep,
    *,
    bridge: AutoBridge | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[StepReport]:
    """Train as `cfg` says; returns what each step came to. Every rank calls it.

    `cfg.model` is a `ModelConfig` or a provider. `bridge` is needed with a provider, and only to publish or to export.
    Raises `ConfigError` before any process group is made where settings contradict each other, the model or the
    text; `DivergedError` for a NaN that stops the run; `StorageError` for a disk that refuses a checkpoint.
    """
    return run_training(cfg, forward_step_func, bridge=bridge, callbacks=callbacks).reports


def run_training(
    cfg: ConfigContainer,
    forward_step_func: ForwardStep,
    *,
    bridge: AutoBridge | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """As `pretrain`; also says why the run ended."""
    rank, world_size = _rank_and_world_size()
    check_config(cfg, world_size=world_size)
    provider, bridge = make_provider(cfg, bridge)
    _check_bridge(cfg, bridge)
    # What is cached of the data is made by one rank of each machine, before it meets the others.
    splits = _open_splits(cfg, bridge, provider.vocab_size) if _is_first_on_its_machine() else None
    with ExitStack() as stack:
        events = stack.enter_context(EventLog(cfg.logger.events, rank=rank))
        state = build_state(cfg, provider, bridge)
        stack.callback(state.release)
        if rank == 0:
            write_run_config(cfg)
            _say_if_made_up(cfg)
        if splits is None:
            splits = _open_splits(cfg, bridge, provider.vocab_size)
        start_from(state, cfg.checkpoint)
        members = open_reporters(cfg, stack)
        if cfg.publish.to is not None:
            assert bridge is not None
            source, prepare = make_source(cfg, bridge, state.model)
            source = quantize_source(source, cfg.publish, bridge.hf_config)
            publisher = StepPublisher(source, cfg.publish, events, prepare, anchor_folder(cfg))
            members.append(stack.enter_context(publisher))
        result = train(
            state,
            forward_step_func,
            splits.train,
            validation=splits.validation,
            events=events,
            callbacks=Callbacks([*members, *callbacks]),
        )
        if result.stop.is_complete:
            _export(state, bridge, events)
    return result


def _export(state: TrainState, bridge: AutoBridge | None, events: EventLog) -> None:
    if state.config.checkpoint.export_hf is not None or state.config.peft.export_adapter is not None:
        assert bridge is not None
        state.gather_parameters()
        with events.phase("export", version=state.step):
            export_folders(state.config, bridge, state.model)


def _open_splits(cfg: ConfigContainer, bridge: AutoBridge | None, vocab_size: int) -> Splits:
    """The data; the first rank of each machine makes what is cached before it joins the others."""
    splits = open_splits(cfg, vocab_size=vocab_size, tokenizer_folder=lambda: _tokenizer_folder(cfg, bridge))
    if cfg.train.eval_interval is not None and splits.validation is None:
        raise ConfigError(
            f"train.eval_interval={cfg.train.eval_interval} and nothing is held out to evaluate on: set "
            "dataset.split=98,2,0 (sft: dataset.validation_files or dataset.val_proportion=0.02), or leave it out"
        )
    check_samples_fill_a_batch(cfg, splits.train.num_samples)
    return splits


def _say_if_made_up(cfg: ConfigContainer) -> None:
    """Trained weights that go on with mock data get worse, which a forgotten setting must not do in silence."""
    trained = isinstance(cfg.model, ModelConfig) and cfg.model.load_weights and cfg.model.hf_path
    if cfg.dataset.kind == "mock" and trained:
        logger.warning(
            "dataset.kind=mock: %s goes on with made-up tokens; for records set dataset.kind=sft and dataset.files or "
            "dataset.dataset_name",
            cfg.model.hf_path,
        )


def _tokenizer_folder(cfg: ConfigContainer, bridge: AutoBridge | None) -> str:
    name = cfg.tokenizer.tokenizer_model
    if name is None and isinstance(cfg.model, ModelConfig):
        name = cfg.model.hf_path
    if name is None and bridge is not None:
        name = bridge.hf_config.name_or_path
    if not name:
        raise ConfigError("no tokenizer: set tokenizer.tokenizer_model to the model's folder, or pass bridge=bridge")
    return str(HFSource.make(name).folder())


def _check_bridge(cfg: ConfigContainer, bridge: AutoBridge | None) -> None:
    wanting = (cfg.publish.to, cfg.checkpoint.export_hf, cfg.peft.load_adapter, cfg.peft.export_adapter)
    if bridge is None and any(setting is not None for setting in wanting):
        raise ConfigError(
            "publish.to, checkpoint.export_hf, peft.load_adapter and peft.export_adapter need the bridge that cfg.model"
            " came from: pretrain(cfg, forward_step, bridge=bridge), or set cfg.model.hf_path instead of a provider"
        )


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_on_its_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _quieten() -> None:
    """Hold back what torch and Megatron say to developers, in this program alone; errors still show."""
    for name in ("megatron", "torch", "httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 2 for an error, 128 + its number for a signal that ended the run early."""
    parser = argparse.ArgumentParser(
        prog="python -m weightcast.trainer.pretrain", description="Train, publish and export a model."
    )
    parser.add_argument("--config", help="YAML file with sections such as `train:`; overrides win over it")
    parser.add_argument("overrides", nargs="*", metavar="recipe=NAME | section.key=value")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt=TIME_FORMAT)
    _quieten()
    try:
        _, world_size = _rank_and_world_size()
        config = load_run(given.overrides, config_file=given.config, world_size=world_size)
        result = run_training(config, forward_step)
    except WeightcastError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        destroy_distributed()
    return result.stop.status


if __name__ == "__main__":
    sys.exit(main())
