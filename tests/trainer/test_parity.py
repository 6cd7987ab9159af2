"""Twenty steps in fp32: every layout of ranks has the curve of transformers' own model trained by plain PyTorch.

The router's auxiliary loss is off: it is not linear in a micro-batch, so no two layouts have the same one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.bridges.tiny_models import write_tiny_model
from tests.ranks import run_ranks
from tests.trainer.plain_torch import train_plain
from tests.trainer.runs import train_all, words_for

STEPS = 20
TP2, PP2, CP2 = (f"model.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context"))
EP2, SP = "model.expert_model_parallel_size=2", "model.sequence_parallel=true"
MICRO2, MICRO4 = "train.micro_batch_size=2", "train.micro_batch_size=4"
MODELS = ("llama3.2", "qwen3", "qwen3-moe")
LAYOUTS: dict[str, list[str]] = {
    "TP2": [TP2, MICRO4],
    "TP2 SP": [TP2, SP, MICRO4],
    "PP2": [PP2, MICRO2],
    "DP2": [MICRO2],
    "CP2": [CP2, MICRO4],
    "EP2": [EP2, MICRO4],
    "TP2 EP2 ETP1": [TP2, SP, EP2, "model.expert_tensor_parallel_size=1", MICRO4],
}
LAYOUTS_OF_FOUR: dict[str, list[str]] = {
    "TP2 PP2": [TP2, PP2, SP, MICRO2],
    "TP2 CP2": [TP2, CP2, SP, MICRO4],
    "PP2 CP2": [PP2, CP2, MICRO2],
    "DP2 CP2": [CP2, MICRO2],
    "CP4": ["model.context_parallel_size=4", MICRO4],
    "PP2 EP2": [PP2, EP2, MICRO2],
    "CP2 EP4": [CP2, "model.expert_model_parallel_size=4", MICRO2],
}
# What `make test` runs; the others are in the long matrix.
QUICK = (("llama3.2", "PP2"), ("qwen3", "CP2"), ("qwen3-moe", "TP2 SP"), ("qwen3-moe", "EP2"))


def _cases(layouts: dict[str, list[str]]) -> list[tuple[str, str]]:
    """(model, layout) that go together: expert parallelism with experts, and matrices cut with SP alone there."""
    return [
        (model, name)
        for model in MODELS
        for name, words in layouts.items()
        if (EP2 not in words and "EP" not in name if model != "qwen3-moe" else name != "TP2")
    ]


LONG = [case for case in _cases(LAYOUTS) if case not in QUICK]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the three models, by name."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: write_tiny_model(name, root / name) for name in MODELS}
    config = folders["qwen3-moe"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"router_aux_loss_coef": 0.0}))
    return folders


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tokens of all runs are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def plain(models: dict[str, Path], texts: list[Path], cache: Path) -> dict[str, dict[str, list[float]]]:
    """The curves of plain PyTorch, by model."""
    return {name: train_plain(folder, texts, cache, steps=STEPS, decay=STEPS) for name, folder in models.items()}


def _train(
    cases: list[tuple[str, str]], models: dict[str, Path], texts: list[Path], cache: Path, num_ranks: int
) -> dict[str, Any]:
    layouts = LAYOUTS | LAYOUTS_OF_FOUR
    more = [f"train.train_iters={STEPS}", f"scheduler.lr_decay_iters={STEPS}"]
    runs = {
        f"{model} {name}": [*words_for(models[model], texts, cache), *more, *layouts[name]] for model, name in cases
    }
    results = run_ranks(train_all, num_ranks, runs, timeout_s=600)
    assert all(result == results[0] for result in results)
    found: dict[str, Any] = results[0]
    return found


@pytest.fixture(scope="module")
def quick(models: dict[str, Path], texts: list[Path], cache: Path) -> dict[str, Any]:
    """The runs of `QUICK`, on two ranks."""
    return _train(list(QUICK), models, texts, cache, 2)


@pytest.fixture(scope="module")
def long(models: dict[str, Path], texts: list[Path], cache: Path) -> dict[str, Any]:
    """All other runs, on two ranks and on four."""
    on_two = _train(LONG, models, texts, cache, 2)
    return on_two | _train(_cases(LAYOUTS_OF_FOUR), models, texts, cache, 4)


def _check(found: dict[str, Any], expected: dict[str, list[float]]) -> None:
    assert "error" not in found, found
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=2e-4)
    assert found["losses"][-1] < found["losses"][0] - 0.1


@pytest.mark.parametrize(("model", "layout"), QUICK)
def test_a_layout_has_the_curve_of_plain_torch(
    model: str, layout: str, quick: dict[str, Any], plain: dict[str, dict[str, list[float]]]
) -> None:
    _check(quick[f"{model} {layout}"], plain[model])


@pytest.mark.long
@pytest.mark.parametrize(("model", "layout"), [*LONG, *_cases(LAYOUTS_OF_FOUR)])
def test_every_layout_has_the_curve_of_plain_torch(
    model: str, layout: str, long: dict[str, Any], plain: dict[str, dict[str, list[float]]]
) -> None:
    _check(long[f"{model} {layout}"], plain[model])
