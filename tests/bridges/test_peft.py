"""LoRA and DoRA on Megatron compute what the `peft` library computes, in every layout, and its folders come back whole.

Two gloo processes go through every adapter and layout; their figures are read case by case.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import run_ranks

from weightcast.bridges.peft.merge_files import merge_folder

# After weightcast, which holds back Megatron's import-time notices.
from tests.bridges.adapter_job import build_adapted, gradient_difference, logits_difference, merged_difference  # isort: skip
from tests.bridges.tiny_adapters import CASES, adapter_settings, adapter_tensors, peft_logits, ulps, write_adapter  # isort: skip

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}

NORM_ULPS = 4
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")

Differences = dict[str, dict[str, list[float]]]


def compare_all(out: str) -> Differences:
    """Largest differences of logits and gradients by layout and case; each is saved again from each layout."""
    from weightcast.bridges.process_groups import destroy_model_parallel

    differences: Differences = {}
    for layout, sizes in LAYOUTS.items():
        differences[layout] = {}
        for name in CASES:
            folder = Path(out, name)
            bridge, provider, model = build_adapted(folder, sizes)
            bridge.save_hf_adapter(model, folder / layout)
            logits = logits_difference(provider, model, load_file(folder / "expected.safetensors")["logits"])
            merged = merged_difference(bridge, provider, model, folder, layout)
            differences[layout][name] = [logits, merged, gradient_difference(bridge, provider, model, folder)]
        destroy_model_parallel()
    return differences


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters")
    for name in CASES:
        write_adapter(name, out / name)
    return out


@pytest.fixture(scope="module")
def differences(adapters: Path) -> Differences:
    first, second = run_ranks(compare_all, 2, str(adapters), env={"CUDA_VISIBLE_DEVICES": ""})
    assert first == second
    result: Differences = first
    return result


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_peft(differences: Differences, case: str, layout: str) -> None:
    logits, merged, gradients = differences[layout][case]
    assert logits <= TOLERANCE
    assert merged <= TOLERANCE
    assert gradients <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.usefixtures("differences")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_folder_comes_back_bit_for_bit(adapters: Path, case: str, layout: str) -> None:
    ours, theirs = adapter_tensors(adapters / case / layout), adapter_tensors(adapters / case / "adapter")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    saved, wanted = adapter_settings(adapters / case / layout), adapter_settings(adapters / case / "adapter")
    for name, value in saved.items():
        assert sorted(value) == sorted(wanted[name]) if name == "target_modules" else value == wanted[name], name


@pytest.mark.slow
@pytest.mark.usefixtures("differences")
@pytest.mark.parametrize("case", ["lora-fused-rslora", "lora-behind-norms", "dora"])
def test_peft_loads_what_is_saved(adapters: Path, case: str) -> None:
    expected = load_file(adapters / case / "expected.safetensors")["logits"]
    assert torch.equal(peft_logits(adapters / case / "model", adapters / case / "tp2"), expected)


def merged_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


@pytest.mark.slow
@pytest.mark.usefixtures("differences")
@pytest.mark.parametrize("layout", [*LAYOUTS, "files"])
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(adapters: Path, case: str, layout: str) -> None:
    folder = adapters / case
    if layout == "files":
        merge_folder(folder / "model", folder / "adapter", folder / "merged-files", show_progress=False)
    ours, theirs = merged_tensors(folder / f"merged-{layout}"), merged_tensors(folder / "merged")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Where ranks share a row they sum its norm in another order than one process does.
        shared = case.startswith("dora") and layout.startswith("tp2") and name.endswith(ROW_PARALLEL)
        assert ulps(ours[name], tensor) <= (NORM_ULPS if shared else 0), name
