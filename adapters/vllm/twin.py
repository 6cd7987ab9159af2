"""A worker's model once more, on the meta device: its loader tells which slices the worker needs.

The twin has the layout of the worker that makes it (its process groups, its configuration) and no memory; the model
that serves is not touched. Called in a worker, since vLLM asks its groups which part is whose.

    wanted = wanted_of_worker(vllm_config, specs, cache=Path("wanted"))   # whole tensors where a loader refuses
"""

import copy
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from weightcast.adapters.vllm.recording import LoadRecord, record_load
from weightcast.sync.errors import EngineError, ModelMismatch
from weightcast.sync.regions import Region, TensorSpec, dtype_name
from weightcast.sync.wanted import WantedRegions, check_wanted, share_of, whole

logger = logging.getLogger(__name__)


def wanted_of_worker(
    vllm_config: VllmConfig, specs: Sequence[TensorSpec], *, cache: Path | None = None
) -> WantedRegions:
    """The boxes of `specs` that this worker's loader reads; whole tensors, with a warning, where it cannot be watched.

    `cache` is a folder in which the answer for this model and place is kept and looked for.
    """
    file = None if cache is None else cache / f"{place_key(vllm_config, specs)}.json"
    if file is not None and (kept := read_wanted(file, specs)) is not None:
        return kept
    try:
        wanted = record_twin(vllm_config, specs).wanted
        check_wanted(wanted, specs)
    except (EngineError, ModelMismatch) as error:
        logger.warning("this worker asks for whole tensors: %s", error)
        return whole(specs)
    logger.info("this worker needs %.0f %% of the model's bytes", 100 * share_of(wanted, specs))
    if file is not None:
        write_wanted(file, wanted)
    return wanted


def record_twin(vllm_config: VllmConfig, specs: Sequence[TensorSpec]) -> LoadRecord:
    """Build the twin and watch it load. Raises `EngineError`."""
    twin_config = without_layers(vllm_config)
    model = build_twin(twin_config, "meta")
    with set_current_vllm_config(twin_config):
        return record_load(model, specs)


def build_twin(twin_config: VllmConfig, device: str) -> torch.nn.Module:
    """The model of a configuration `without_layers`, before a load, on `device`. Raises `EngineError`.

    In the worker's own thread, between steps: torch's default dtype and vLLM's configuration are the process's.
    """
    model_config = twin_config.model_config
    try:
        with (
            torch.random.fork_rng(devices=[]),
            set_current_vllm_config(twin_config),
            set_default_torch_dtype(model_config.dtype),
            torch.device(device),
        ):
            model: torch.nn.Module = initialize_model(twin_config, model_config=model_config)
    except Exception as error:
        raise EngineError(
            f"{model_config.model} cannot be built on the device {device!r}: {type(error).__name__}: {error}"
        ) from error
    return model


def without_layers(vllm_config: VllmConfig) -> VllmConfig:
    """A copy that has not registered the serving model's layers, whose names must be unique in a configuration."""
    twin = copy.copy(vllm_config)
    twin.compilation_config = copy.copy(vllm_config.compilation_config)
    twin.compilation_config.static_forward_context = {}
    twin.compilation_config.static_all_moe_layers = []
    return twin


def place_key(vllm_config: VllmConfig, specs: Sequence[TensorSpec]) -> str:
    """A name for what decides which slices are read: vLLM, the model, its tensors, and this worker's place in it."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    place = {
        "vllm": vllm.__version__,
        "model": model.model,
        "config": model.hf_config.to_json_string(),
        "dtype": dtype_name(model.dtype),
        "quantization": str(model.quantization),
        "specs": [[spec.name, dtype_name(spec.dtype), list(spec.shape)] for spec in specs],
        "tensor": [get_tp_group().rank_in_group, get_tp_group().world_size],
        "pipeline": [get_pp_group().rank_in_group, get_pp_group().world_size],
        "data": [parallel.data_parallel_index, parallel.data_parallel_size],
        "experts": [parallel.enable_expert_parallel, str(asdict(parallel.eplb_config)), parallel.enable_eplb],
    }
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:32]


def write_wanted(file: Path, wanted: WantedRegions) -> None:
    """Keep an answer. A reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: [[list(box.offset), list(box.shape)] for box in boxes] for name, boxes in wanted.items()}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".draft", delete=False) as draft:
        json.dump(rows, draft)
    Path(draft.name).replace(file)


def read_wanted(file: Path, specs: Sequence[TensorSpec]) -> WantedRegions | None:
    """A kept answer; None where there is none, or none that fits `specs`."""
    try:
        rows = json.loads(file.read_text())
        wanted = {
            name: tuple(Region(name, tuple(offset), tuple(shape)) for offset, shape in boxes)
            for name, boxes in rows.items()
        }
        check_wanted(wanted, specs)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is no answer for this model (%s); the loader is watched again", file, error)
        return None
    return wanted
