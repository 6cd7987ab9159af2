"""gpt-oss: logits, losses and gradients of transformers in every layout, and the bits of its checkpoints.

Four gloo processes compute the whole matrix of `parity_models`; fp32, random small models.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_gpt_oss import GPT_OSS_MODELS, write_gpt_oss_model
from tests.ranks import run_ranks
from transformers.models.gpt_oss import modeling_gpt_oss

from weightcast.bridges.layers.explicit_attention import explicit_attention

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
MODEL, SQUARE = GPT_OSS_MODELS
LAYOUTS = ("tp1", "tp2-sequence-parallel-etp1", "ep4", "ep2-pp2", "ep2-tp2-etp1", "ep2-tp2-etp2")
GRADIENT_LAYOUTS = ("ep2-pp2", "ep2-tp2-etp1", "ep2-tp2-etp2")
SQUARE_LAYOUTS = ("tp2-sequence-parallel-etp1", "ep2-tp2-etp2")
CASES = [(MODEL, layout) for layout in LAYOUTS] + [(SQUARE, layout) for layout in SQUARE_LAYOUTS]
GRADIENT_CASES = [(model, layout) for model, layout in CASES if layout in GRADIENT_LAYOUTS]
# A change of the provider under which parity must fail, or the test sees nothing.
SABOTAGE: dict[str, dict[str, Any]] = {
    "no-clamp": {"activation_func_clamp_value": None},
    "no-offset": {"glu_linear_offset": 0.0},
    "window-one-longer": {"window_size": (6, 0)},
    "plain-rope": {"rope_extension": None},
}


def compute_differences(out: str) -> dict[str, float]:
    """The largest differences by case, the same on every rank."""
    from tests.bridges import parity_job
    from tests.bridges.parity_models import MOE_GRADIENT_LAYOUTS, MOE_LAYOUTS

    from weightcast.bridges.process_groups import destroy_model_parallel

    if dist.get_rank() == 0:
        for name in GPT_OSS_MODELS:
            Path(out, name).mkdir()
            write_gpt_oss_model(name, Path(out, name))
    dist.barrier()
    assert (tuple(MOE_LAYOUTS), MOE_GRADIENT_LAYOUTS) == (LAYOUTS, GRADIENT_LAYOUTS)
    found: dict[str, float] = {}
    for model, names in ((MODEL, LAYOUTS), (SQUARE, SQUARE_LAYOUTS)):
        layouts = {name: MOE_LAYOUTS[name] for name in names}
        by_layout = parity_job.compare_all(Path(out), [model], layouts, GRADIENT_LAYOUTS)
        found |= {f"{layout} {model}": by_model[model] for layout, by_model in by_layout.items()}
    for name, settings in SABOTAGE.items():
        found[name] = parity_job.largest_difference(Path(out, MODEL), settings)
    destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = str(tmp_path_factory.mktemp("gpt-oss"))
    result: dict[str, float] = run_ranks(compute_differences, 4, folder, timeout_s=400)[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"{layout} {model}"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), GRADIENT_CASES)
def test_loss_and_gradients_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"gradients-{layout} {model}"] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("change", SABOTAGE)
def test_a_wrong_setting_shows(differences: dict[str, float], change: str) -> None:
    assert differences[change] > 100 * TOLERANCE


def test_a_sink_takes_its_part_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = torch.randn(4, generator=generator), 2  # type: ignore[assignment]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(6, 6).masked_fill(~mask, float("-inf"))
    wanted, _ = modeling_gpt_oss.eager_attention_forward(module, query, key, value, added, scaling=0.4)
    found = explicit_attention(query, key, value, mask, 0.4, sinks=module.sinks)
    assert torch.allclose(found.transpose(1, 2), wanted, atol=1e-6)
    without = explicit_attention(query, key, value, mask, 0.4)
    assert (found - without).abs().max() > 0.1
