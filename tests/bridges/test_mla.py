"""Multi-head latent attention: logits, losses and gradients of transformers, and the bits of its checkpoints.

Two gloo processes compute the whole matrix; fp32, random small DeepSeek models of each kind. What must show is made to
show: a group of experts scored in another way, the epsilon of the wrong norm, YaRN without its numbers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_mla import MLA_MODELS, write_mla_model
from tests.ranks import run_ranks

TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest gradient
DENSE = "deepseek-v2-dense"
# The bias for the choice of experts moves after each step, which is not a gradient.
STILL = {"moe_router_bias_update_rate": 0.0}

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sequence-parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2-ep2-etp1": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}
# A change of the provider under which parity must fail, or the test sees nothing: model and setting.
SABOTAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "groups-scored-by-sums": ("deepseek-v2", {"moe_router_group_score_experts": None}),
    "one-epsilon-for-all-norms": ("deepseek-v2-lite", {"latent_layernorm_epsilon": 1e-3}),
    "yarn-without-mscale": ("deepseek-v2-lite", {"mscale": 1.0, "mscale_all_dim": 0.0}),
    "plain-rope": ("deepseek-v3", {"rope_type": "rope"}),
    "unscaled-experts": ("moonlight", {"moe_router_topk_scaling_factor": None}),
}
CASES = [(model, layout) for layout in LAYOUTS for model in MLA_MODELS if "ep2" not in layout or model != DENSE]
# With tensor parallelism Megatron trains experts under sequence parallelism only.
GRADIENT_CASES = [(model, layout) for model, layout in CASES if layout != "tp2" or model == DENSE]


def compute_differences(out: str) -> dict[str, float]:
    """The largest differences by case, the same on every rank."""
    from tests.bridges import parity_job

    from weightcast.bridges.process_groups import destroy_model_parallel

    if dist.get_rank() == 0:
        for name in MLA_MODELS:
            Path(out, name).mkdir()
            write_mla_model(name, Path(out, name), parity_job.tokens())
    dist.barrier()
    differences = {}
    for layout, sizes in LAYOUTS.items():
        for model, _ in [case for case in CASES if case[1] == layout]:
            differences[f"{model} {layout}"] = parity_job.largest_difference(Path(out, model), sizes)
        for model, _ in [case for case in GRADIENT_CASES if case[1] == layout]:
            worst = parity_job.largest_gradient_difference(Path(out, model), sizes | STILL)
            differences[f"gradients {model} {layout}"] = worst
        destroy_model_parallel()
    for name, (model, settings) in SABOTAGE.items():
        differences[name] = parity_job.largest_difference(Path(out, model), settings)
    destroy_model_parallel()
    return differences


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    result: dict[str, float] = run_ranks(compute_differences, 2, str(tmp_path_factory.mktemp("mla")), timeout_s=300)[0]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"{model} {layout}"] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), GRADIENT_CASES)
def test_loss_and_gradients_are_those_of_transformers(differences: dict[str, float], model: str, layout: str) -> None:
    assert differences[f"gradients {model} {layout}"] <= GRADIENT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("change", SABOTAGE)
def test_a_wrong_setting_shows(differences: dict[str, float], change: str) -> None:
    assert differences[change] > 100 * TOLERANCE


BIT_LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
}


def move_bits(out: str) -> list[str]:
    """Import without a collective, export, save; in every layout the file's bits. Returns what was done."""
    from tests.bridges.no_collectives import no_collectives
    from tests.bridges.parity_job import tokens
    from tests.bridges.test_bits import build, check_export, check_same_files

    from weightcast.bridges import AutoBridge
    from weightcast.bridges.process_groups import destroy_model_parallel
    from weightcast.sync.checkpoint_files import open_checkpoint

    names = ("deepseek-v2", "moonlight")
    if dist.get_rank() == 0:
        for name in names:
            Path(out, name).mkdir()
            write_mla_model(name, Path(out, name), tokens(), dtype=torch.bfloat16)
    dist.barrier()
    done = []
    for layout, sizes in BIT_LAYOUTS.items():
        for name in names:
            folder = Path(out, name, "model")
            bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
            model = build(bridge, sizes)
            with no_collectives():
                bridge.load_hf_weights(model)
            check_export(bridge, model, checkpoint)
            saved = Path(out, f"{name}-{layout}")
            bridge.save_hf_pretrained(model, saved, show_progress=False)
            check_same_files(saved, checkpoint)
            done.append(f"{name} in {layout}")
        destroy_model_parallel()
    return done


@pytest.mark.slow
def test_checkpoints_keep_their_bits_in_every_layout(tmp_path: Path) -> None:
    done = run_ranks(move_bits, 2, str(tmp_path), timeout_s=300)
    assert done == [[f"{name} in {layout}" for layout in BIT_LAYOUTS for name in ("deepseek-v2", "moonlight")]] * 2


def write_in_fp8(plain: Path, coded: Path) -> Path:
    """`plain` in FP8 codes as DeepSeek publishes them: every matrix of a layer but the router's. Returns `coded`."""
    import json

    from safetensors.torch import load_file, save_file

    from weightcast.bridges.codecs_fp8 import encode

    tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight") or ".kv_a_proj_with_mqa." in name:
            tensors[name], tensors[f"{name}_scale_inv"] = encode(tensor)
        else:
            tensors[name] = tensor
    coded.mkdir()
    save_file(tensors, coded / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (coded / "config.json").write_text(json.dumps(config))
    return coded


def import_codes(folder: str, out: str) -> int:
    """Import an FP8 checkpoint under TP=2 and export it; how many tensors were in FP8."""
    import json

    from weightcast.bridges import AutoBridge
    from weightcast.bridges.codecs_fp8 import decode
    from weightcast.sync.checkpoint_files import open_checkpoint

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    bridge.save_hf_pretrained(provider.provide_distributed_model(wrap_with_ddp=False), out, show_progress=False)
    assert "quantization_config" not in json.loads(Path(out, "config.json").read_text())

    stored, exported = open_checkpoint(Path(folder)), open_checkpoint(Path(out))
    factors = [spec.name for spec in stored.specs if spec.name.endswith("_scale_inv")]
    with stored.reader() as codes, exported.reader() as weights:
        for spec in exported.specs:
            wanted = codes.read(spec.whole())
            if f"{spec.name}_scale_inv" in factors:
                scale = next(other for other in stored.specs if other.name == f"{spec.name}_scale_inv")
                wanted = decode(wanted, codes.read(scale.whole()), (0, 0), torch.bfloat16)
            assert torch.equal(weights.read(spec.whole()), wanted), spec.name
    return len(factors)


@pytest.mark.slow
def test_fp8_checkpoints_are_read_as_the_weights_they_stand_for(tmp_path: Path) -> None:
    write_mla_model("deepseek-v3", tmp_path, torch.zeros(1, 2, dtype=torch.long), dtype=torch.bfloat16)
    coded = write_in_fp8(tmp_path / "model", tmp_path / "coded")
    assert run_ranks(import_codes, 2, str(coded), str(tmp_path / "exported")) == [104, 104]
