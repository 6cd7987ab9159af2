"""Checks of the trainer: steps, versions and checkpoints with the model on the device."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tests.bridges.tiny_models import VOCAB_SIZE, write_tiny_model
from tests.gpu.engine import Engine, following, hash_tensor, hash_tensors
from tests.gpu.table import Scale, require
from tests.trainer.runs import words_for

from weightcast.bridges import AutoBridge
from weightcast.bridges.process_groups import destroy_distributed
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.checks import check_config
from weightcast.trainer.figures import StepReport
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.overrides import load_config
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.starting import start_from
from weightcast.trainer.state import TrainState, build_state, make_provider

STEPS = 3
TRANSPORTS = ("zmq", "shared_memory")
MODELS = ("qwen3-tied", "qwen3-moe")


def check_training(scale: Scale) -> dict[str, Any]:
    """Three steps of each model, and every tensor of each version at each engine."""
    figures: dict[str, Any] = {}
    for name in MODELS[: scale.pick(1, len(MODELS))]:
        figures[name] = _train_and_publish(scale, name)
    destroy_distributed()
    return figures


def _train_and_publish(scale: Scale, name: str) -> dict[str, Any]:
    address = f"ipc://{scale.folder}/{name}.socket"
    words = [*words_of(scale, name), f"train.train_iters={STEPS}", f"publish.to={address}", "publish.timeout_s=60"]
    config = load_config([*words, f"publish.wait_for={len(TRANSPORTS)}", "publish.wait_timeout_s=60"])
    settings = [
        {"address": address, "engine": transport, "transport": transport, "versions": STEPS} for transport in TRANSPORTS
    ]
    with following(*settings) as engines:
        look = _Look(scale.device, AutoBridge.from_hf_pretrained(config.model.hf_path))
        reports = pretrain(config, forward_step, callbacks=[look])
        published = look.versions
        for number, wanted in enumerate(published, 1):
            for engine in engines:
                _compare(engine, number, wanted)
    require(published[0] != published[-1], "the steps changed nothing")
    return {"losses": [report.loss for report in reports], "steps_s": [report.step_s for report in reports]}


def _compare(engine: Engine, number: int, wanted: dict[str, str]) -> None:
    said = engine.hear()
    require(said["version"] == number, f"engine {engine.name} has version {said['version']} after {number}")
    require(said["transport"] == engine.name, f"engine {engine.name} received by {said['transport']}")
    wrong = sorted(name for name in wanted if said["hashes"].get(name) != wanted[name])
    require(not wrong and len(said["hashes"]) == len(wanted), f"version {number} at {engine.name}: not equal {wrong}")


def words_of(scale: Scale, name: str) -> list[str]:
    """The settings of a run of a tiny model in bf16, made in the check's folder; the same in every process."""
    model, text = scale.folder / name, scale.folder / "text.txt"
    if not model.exists():
        write_tiny_model(name, model, dtype=torch.bfloat16)
        draw = random.Random(0)
        text.write_text(" ".join(f"w{3 + int(draw.betavariate(1, 6) * (VOCAB_SIZE - 3))}" for _ in range(3000)))
    return words_for(model, [text], scale.folder / "cache")


class _Look(Callback):
    """Hashes the weights after each step, as an export gives them."""

    def __init__(self, device: str, bridge: AutoBridge) -> None:
        self.versions: list[dict[str, str]] = []
        self._device = device
        self._bridge = bridge

    def on_train_start(self, state: TrainState) -> None:
        parameters = [parameter for chunk in state.model for parameter in chunk.parameters()]
        places, dtypes = {item.device.type for item in parameters}, {str(item.dtype) for item in parameters}
        require(places == {self._device}, f"the trainer's parameters are on {places}")
        require(dtypes == {"torch.bfloat16"}, f"the trainer's parameters are {dtypes}")

    def on_step_end(self, state: TrainState, report: StepReport) -> None:
        self.versions.append(hash_tensors(_export(self._bridge, state)))


def _export(bridge: AutoBridge, state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
    yield from bridge.export_hf_weights(state.model, cpu=True, show_progress=False)


def check_checkpoint(scale: Scale) -> dict[str, Any]:
    """Four steps at once; two, saved; another process loads what was saved and makes the other two."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    words, saved = words_of(scale, "qwen3-tied"), scale.folder / "saved"
    whole = pretrain(
        load_config([*words, "train.train_iters=4", f"checkpoint.export_hf={scale.folder / 'whole'}"]), forward_step
    )
    destroy_distributed()
    pretrain(load_config([*words, "train.train_iters=2", f"checkpoint.save={saved}"]), forward_step)
    destroy_distributed()
    before = _load(words, saved)
    code = "import sys; from tests.gpu.training import resume; resume(*sys.argv[1:])"
    command = [sys.executable, "-c", code, scale.device, str(scale.folder)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    unequal = sorted(name for name in before if found["state"].get(name) != before[name])
    require(found["state"] == before, f"two loads of one checkpoint differ in {unequal}")
    wanted = [report.loss for report in whole]
    require(found["losses"] == wanted[2:], f"losses after the resume are {found['losses']}, without it {wanted[2:]}")
    files = ("whole", "resumed")
    exports = [sorted((scale.folder / name).glob("*.safetensors")) for name in files]
    hashes = [
        [hash_tensor(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)) for path in paths]
        for paths in exports
    ]
    require(bool(hashes[0]) and hashes[0] == hashes[1], "the weights at the end differ by whether there was a resume")
    return {"losses": wanted, "tensors_of_state": len(before)}


def _load(words: list[str], saved: Path) -> dict[str, str]:
    """Hashes of all that training changes, as it is after a load into a fresh state."""
    config = load_config([*words, "train.train_iters=2", f"checkpoint.load={saved}"])
    check_config(config, world_size=1)
    provider, _ = make_provider(config, None)
    state = build_state(config, provider)
    start_from(state, config.checkpoint)
    require(state.step == 2, f"loaded is step {state.step}")
    found = hash_tensors(_tensors_of(state))
    destroy_distributed()
    return found


def _tensors_of(state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, fp32 masters, both moments, steps."""
    for number, chunk in enumerate(state.model):
        for name, parameter in chunk.named_parameters():
            yield f"model{number}.{name}", parameter
    for number, part in enumerate(state.optimizer.chained_optimizers):
        masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        for index, master in enumerate(masters):
            yield f"optimizer{number}.{index}", master
            for key, value in part.optimizer.state[master].items():
                yield f"optimizer{number}.{index}.{key}", torch.as_tensor(value)


def resume(device: str, folder: str) -> None:
    """The other process of `check_checkpoint`: prints the loaded state's hashes and the losses of what follows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    scale = Scale(device, True, Path(folder))
    words, saved = words_of(scale, "qwen3-tied"), scale.folder / "saved"
    state = _load(words, saved)
    export = f"checkpoint.export_hf={scale.folder / 'resumed'}"
    reports = pretrain(load_config([*words, "train.train_iters=4", f"checkpoint.load={saved}", export]), forward_step)
    destroy_distributed()
    print(json.dumps({"state": state, "losses": [report.loss for report in reports]}), flush=True)
