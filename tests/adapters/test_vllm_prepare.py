"""Versions prepared beside the one that serves, in vLLM's own models: the same bits as in a fresh engine's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.conftest import free_port
from tests.adapters.models import VLLM_ENVIRONMENT, save_checkpoint
from tests.adapters.test_vllm_slices import MODELS
from tests.adapters.trainer_side import TensorSource
from tests.ranks import run_ranks
from tests.sync.parts import wait_until
from transformers import AutoModelForCausalLM

from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import EngineError, ModelMismatch

Tensors = dict[str, torch.Tensor]

EPOCH = 7


def read(folder: str) -> Tensors:
    """A checkpoint's tensors."""
    checkpoint = open_checkpoint(Path(folder))
    with checkpoint.reader() as reader:
        return {spec.name: reader.read(spec.whole()) for spec in checkpoint.specs}


def turned(tensors: Tensors) -> Tensors:
    """Another version: every weight with its sign turned, and a little larger."""
    return {name: -1.5 * tensor for name, tensor in tensors.items()}


def fresh(config: Any, tensors: Tensors) -> torch.nn.Module:
    """What a new engine would serve."""
    from tests.adapters.vllm_models import build
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = build(config)
    with set_current_vllm_config(config), torch.no_grad():
        model.load_weights(iter(tensors.items()))  # type: ignore[operator]
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return model


def bits_of(model: torch.nn.Module) -> dict[str, bytes]:
    """All that came of the weights: every tensor wherever it hangs, and what is packed by what it makes of an input."""
    from weightcast.adapters.vllm.object_graph import describe, walk

    found = {}
    for path, node in walk(model):
        # A handler is an address, a rotary table is none of the weights and belongs to all models together.
        if isinstance(node, torch.Tensor) and not describe(path).endswith("handler_tensor"):
            found[describe(path)] = bytes(node.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if callable(linear := getattr(module, "cpu_linear", None)):
            sizes = (getattr(module, key, None) for key in ("input_size_per_partition", "input_size", "embedding_dim"))
            width = next(size for size in sizes if size)
            for rows in (1, 9):
                given = torch.randn(rows, width, generator=generator).bfloat16()
                made = linear(given, getattr(module, "weight", None), None)
                found[f"{name} of {rows}"] = bytes(made.reshape(-1).view(torch.uint8).numpy())
    return found


def prepare_each(folders: dict[str, str]) -> dict[str, int]:
    """For each kind of model, how many tensors of it were swapped; its bits are compared at every step."""
    from tests.adapters.vllm_models import join_groups, make_config

    from weightcast.adapters.vllm.spare import SpareModel

    join_groups(make_config(Path(folders["qwen3-moe"])))
    swapped = {}
    for name, folder in folders.items():
        config = make_config(Path(folder))
        first = read(folder)
        second = turned(first)
        serving = fresh(config, first)
        wanted = [bits_of(fresh(config, tensors)) for tensors in (first, second)]
        assert bits_of(serving) == wanted[0] != wanted[1]
        spare = SpareModel(config, serving)
        for before, after in ((0, 1), (1, 0), (0, 1)):
            prepared = spare.load((first, second)[after])
            assert bits_of(serving) == wanted[before], "what serves is untouched before the swap"
            prepared.swap()
            assert bits_of(serving) == wanted[after], f"{name}: as fresh"
            spare.clear()
            assert bits_of(serving) == wanted[after], "what serves is untouched by the clearing"
        swapped[name] = len(prepared.pairs)
        check_refusals(spare, serving, first, wanted[1])
    check_backend(folders["qwen3-tied"])
    return swapped


def check_refusals(spare: Any, serving: torch.nn.Module, tensors: Tensors, served: dict[str, bytes]) -> None:
    """Whatever goes wrong leaves what serves as it is, and the spare as it was."""
    from weightcast.adapters.vllm.spare import CannotPrepareError, CannotSwapError, Pair, Prepared

    some = dict(list(tensors.items())[: len(tensors) // 2])
    with pytest.raises(EngineError, match="vLLM filled nothing into"):
        spare.load(some)
    spare.clear()
    prepared = spare.load(tensors)
    wrong = Pair(prepared.pairs[0].path, torch.empty(1), [torch.nn.Parameter(torch.empty(1)), 7])  # type: ignore[list-item]
    with pytest.raises(CannotSwapError, match="cannot be swapped in"):
        Prepared((*prepared.pairs, wrong)).swap()
    assert bits_of(serving) == served, "what was swapped already was swapped back"
    spare.clear()
    norm = next(
        module for name, module in serving.named_modules() if name.endswith("model.norm") or name == "model.norm"
    )
    norm.weight.data = norm.weight.data.float()
    with pytest.raises(CannotPrepareError, match=r"model\.norm\.weight is .* anew, and .*float32.* in what serves"):
        spare.load(tensors)
    norm.weight.data = norm.weight.data.bfloat16()
    norm.extra = torch.ones(3)
    with pytest.raises(CannotPrepareError, match=r"model\.norm\.extra is a tensor of what serves alone"):
        spare.load(tensors)
    del norm.extra
    spare.clear()
    spare.load(tensors).swap()
    spare.clear()


# The backend itself, on a model that no scheduler drives.


def check_backend(folder: str) -> None:
    """Prepared, reloaded in the pause, and refused: each mode, in one life of a model."""
    from tests.adapters.vllm_models import make_config

    config = make_config(Path(folder))
    first = read(folder)
    second = turned(first)
    wanted = [bits_of(fresh(config, tensors)) for tensors in (first, second)]
    model = fresh(config, first)
    with worker(config, model, "auto") as publish:
        assert publish(second) == "prepare swap"
        assert bits_of(model) == wanted[1]
        with broken_loader(model):
            with pytest.raises(EngineError, match=r"preparing version .* failed: RuntimeError: torn"):
                publish(first)
            assert bits_of(model) == wanted[1], "refused before anything was touched"
        assert publish(first) == "prepare swap"
        assert bits_of(model) == wanted[0]
    with worker(config, model, "off") as publish:
        assert publish(second) == "reload"
        assert bits_of(model) == wanted[1], "after a swap vLLM's own reload works as ever"
    model.extra = torch.ones(1)
    with worker(config, model, "auto") as publish:
        assert publish(first) == "reload", "a model that cannot be prepared is loaded in the pause"
        assert bits_of(model) | {"extra": b""} == wanted[0] | {"extra": b""}
    with worker(config, model, "on") as publish:
        with pytest.raises(EngineError, match="extra is a tensor of what serves alone"):
            publish(second)
        del model.extra
        assert publish(second) == "prepare swap"
        assert bits_of(model) == wanted[1]


@contextmanager
def broken_loader(model: torch.nn.Module) -> Iterator[None]:
    """vLLM's loader ends in the middle."""
    kind = type(model)
    load = kind.load_weights  # type: ignore[attr-defined]

    def broken(self: torch.nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        load(self, [next(weights) for _ in range(3)])
        raise RuntimeError("torn")

    kind.load_weights = broken  # type: ignore[attr-defined]
    try:
        yield
    finally:
        kind.load_weights = load  # type: ignore[attr-defined]


@contextmanager
def worker(config: Any, model: torch.nn.Module, mode: str) -> Iterator[Callable[[Tensors], str]]:
    """The backend with a publisher; publishing gives the phases of the worker."""
    from vllm.config import set_current_vllm_config

    from weightcast.adapters.engine import version_label
    from weightcast.adapters.vllm.backend import WeightcastTransferEngine
    from weightcast.sync import Version, WeightPublisher

    config.additional_config = {"weightcast": {"prepare": mode}}
    engine = WeightcastTransferEngine(config.weight_transfer_config, config, torch.device("cpu"), model)
    address = f"tcp://127.0.0.1:{free_port()}"
    numbers = iter(range(1, 100))
    source: Tensors = read(config.model_config.model)

    def publish(tensors: Tensors) -> str:
        for name, tensor in source.items():
            tensor.copy_(tensors[name])
        number = next(numbers)
        publication = publisher.begin(number, timeout_s=120)
        version = Version(EPOCH, number)
        # Preparing takes as long as the machine's other work lets it; then the engine has it, or never will.
        wait_until(lambda: any(version in (one.staged, one.refused) for one in publisher.fleet()), 120)
        with set_current_vllm_config(config), suppress(ModelMismatch):
            engine.start_weight_update()
            engine.update_weights({"version": version_label(version)})
            engine.finish_weight_update()
        report = publication.wait()
        phases = [span.phase for one in report.engines for span in one.spans]
        return " ".join(phase for phase in phases if phase not in ("stage", "check"))

    with WeightPublisher(TensorSource(source), address, epoch=EPOCH) as publisher:
        engine.init_transfer_engine(engine.parse_init_info({"publisher": address, "timeout_s": 2}))
        publisher.wait_for_subscribers(1, 20)
        try:
            yield publish
        finally:
            engine.shutdown()


@pytest.mark.vllm
@pytest.mark.slow
def test_what_is_prepared_and_swapped_in_is_what_a_fresh_engine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRESH_RANKS", "1")
    folders: dict[str, str] = {}
    for name, config in MODELS.items():
        torch.manual_seed(len(folders))
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        folders[name] = str(save_checkpoint(model, tmp_path / name))
    [swapped] = run_ranks(prepare_each, 1, folders, process_group=False, env=VLLM_ENVIRONMENT, timeout_s=300)
    assert all(num > 20 for num in swapped.values()), swapped
