"""FP8 made on the source against vLLM 0.32's own functions, and through its own loaders of FP8 checkpoints.

vLLM for CPU needs AMX for blocks and has no operator for one scale a tensor, so no engine serves either here: its
layers are built and loaded, and the kernels that would multiply with them are left out.
"""

import json
from pathlib import Path

import pytest
import torch
from tests.adapters.models import VLLM_ENVIRONMENT, save_checkpoint
from tests.ranks import run_ranks
from tests.sync.parts import TensorSource, bits
from transformers import Qwen3Config, Qwen3ForCausalLM

from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.quantize import BLOCK, DIVIDE_ON_CPU, block_amax, quantize, scales_of, tensor_scales_of
from weightcast.sync.quantize_rules import FORMATS, KINDS, MIN_FUSED_AMAX, Fp8Scheme, plan_fp8
from weightcast.sync.quantized_source import QuantizedSource


def compare_functions() -> int:
    """The functions that run on a CPU, bit for bit."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped, weight_amax
    from vllm.model_executor.layers.quantization.utils.w8a8_utils import per_tensor_dequantize
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    generator, compared = torch.Generator().manual_seed(0), 0
    for rows, columns in ((128, 128), (1, 1), (200, 300), (129, 1000), (640, 127)):
        for spread in (1e-6, 1e-3, 0.05, 3.0, 1e30):
            weights = (torch.randn(rows, columns, generator=generator) * spread).bfloat16()
            codes, scales = per_block_cast_to_fp8(weights, list(BLOCK), False)
            own = scales_of(block_amax(weights, (0, 0), BLOCK), DIVIDE_ON_CPU)
            assert torch.equal(own, scales)
            assert torch.equal(bits(quantize(weights, own, (0, 0), BLOCK)), bits(codes))
            assert torch.equal(block_amax(weights, (0, 0), (rows, columns)).flatten()[0], weight_amax(weights).float())
            compared += 1
    # `requantize_with_max_scale` of fused matrices that have one scale: through fp16 and back (its operator
    # `static_scaled_fp8_quant` is not on a CPU; this is its arithmetic).
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[torch.isfinite(every.float())]
    for amax, survives in ((MIN_FUSED_AMAX, True), (0.3, True), (100.0, True), (0.013, False), (1e-4, False)):
        scale = tensor_scales_of(torch.tensor(amax))
        again = (per_tensor_dequantize(every, scale).float() * (1.0 / scale)).clamp(-448, 448).to(every.dtype)
        assert torch.equal(again.float(), every.float()) is survives, amax
    assert is_layer_skipped("model.layers.0.mlp.gate", ["model.layers.0.mlp.gate"])
    return compared


def load_both(folder: str, published: dict[str, str]) -> list[str]:
    """vLLM's layers loaded from what we publish, against what its own functions make of its layers in bf16."""
    from tests.adapters.vllm_models import build, join_groups, load, make_config
    from vllm.model_executor.layers.quantization import fp8
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    # Only the choice of a kernel is left out: none runs on a CPU without AMX.
    fp8.init_fp8_linear_kernel = lambda **arguments: None
    checkpoint = open_checkpoint(Path(folder))
    with checkpoint.reader() as reader:
        tensors = {spec.name: reader.read(spec.whole()) for spec in checkpoint.specs}
    config = make_config(Path(folder))
    join_groups(config)
    plain = load(build(config), config, tensors)
    compared: list[str] = []
    for kind, path in published.items():
        config = make_config(Path(path))
        assert config.model_config.quantization == "fp8"
        coded = open_checkpoint(Path(path))
        with coded.reader() as reader:
            found = load(build(config), config, {spec.name: reader.read(spec.whole()) for spec in coded.specs})
        for name, weights in plain.items():
            if found[name].dtype != torch.float8_e4m3fn:
                assert torch.equal(found[name], weights), name
                continue
            if kind == "fp8_block":
                codes, scales = per_block_cast_to_fp8(weights, list(BLOCK), False)
                assert torch.equal(found[f"{name}_scale_inv"], scales), name
            else:
                # `Fp8PerTensorOnlineLinearMethod`, on the fused matrix.
                scale = weights.abs().max().float() / torch.tensor(448.0)
                codes = (weights.float() * (1.0 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert (found[f"{name}_scale"] == scale).all(), name
            assert torch.equal(bits(found[name]), bits(codes)), name
            compared.append(f"{kind} {name.removeprefix('model.layers.')}")
    return compared


def parse_configs(folder: str) -> list[str]:
    """vLLM's own readers of `quantization_config`."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    specs = open_checkpoint(Path(folder)).specs
    seen = []
    for kind in KINDS:
        told = {form: plan_fp8(specs, Fp8Scheme(kind=kind, format=form)).engine_config() for form in FORMATS}
        config = Fp8Config.from_config(told["fp8"]["quantization_config"])
        assert config.is_checkpoint_fp8_serialized and config.activation_scheme == "dynamic"
        assert config.weight_block_size == (list(BLOCK) if kind == "fp8_block" else None)
        assert config.ignored_layers == ["lm_head", "model.embed_tokens"]
        other = CompressedTensorsConfig.from_config(told["compressed-tensors"]["quantization_config"])
        scheme = other.target_scheme_map["Linear"]
        assert other._is_fp8_w8a8(scheme["weights"], scheme["input_activations"])
        seen.append(f"{kind} {scheme['weights'].strategy}")
    return seen


def write_model(folder: Path) -> Path:
    """A model whose matrices are cut at multiples of 128, which vLLM asks of fused ones in blocks."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=200,
        hidden_size=200,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return save_checkpoint(Qwen3ForCausalLM(config).to(torch.bfloat16), folder)


def publish_into(folder: Path, source: Path, kind: str) -> Path:
    """What an engine would be given, as a checkpoint."""
    from safetensors.torch import load_file, save_file

    quantized = QuantizedSource(
        TensorSource(load_file(source / "model.safetensors")), Fp8Scheme(kind=kind, division=DIVIDE_ON_CPU)
    )
    quantized.prepare()
    folder.mkdir()
    save_file({item.region.name: item.live().contiguous() for item in quantized.held()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | quantized.engine_config()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_makes_and_loads_the_same_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESH_RANKS", "1")
    source = write_model(tmp_path / "bf16")
    published = {kind: str(publish_into(tmp_path / kind, source, kind)) for kind in KINDS}
    [seen] = run_ranks(check_all, 1, str(source), published, process_group=False, env=VLLM_ENVIRONMENT, timeout_s=540)
    linears = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert seen["functions"] == 25
    assert seen["loaded"] == [f"{kind} 0.{name}.weight" for kind in KINDS for name in linears]
    assert seen["configs"] == ["fp8_block block", "fp8_tensor tensor"]


def check_all(folder: str, published: dict[str, str]) -> dict[str, object]:
    """Everything that needs vLLM, in one process: importing it takes most of the time."""
    return {
        "functions": compare_functions(),
        "configs": parse_configs(folder),
        "loaded": load_both(folder, published),
    }
