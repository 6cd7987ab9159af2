"""gpt-oss on disk: bits in every layout, published MXFP4 folders read as transformers reads them, dry runs at size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_gpt_oss import GPT_OSS_MODELS, QUANTIZATION, write_gpt_oss_model, write_in_mxfp4
from tests.ranks import find_free_port, run_ranks
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run import plan_layout
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.models.registry import find_bridge
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.bridges.standalone_import import import_checkpoint
from weightcast.bridges.standalone_verify import compare_checkpoints
from weightcast.sync.errors import UnsupportedModel

LAYOUTS: dict[str, dict[str, int]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "EP2": {"expert_model_parallel_size": 2},
    "EP2×TP2": {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
    "EP2×TP2, ETP1": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
}
NAMES = tuple(GPT_OSS_MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME/model`, a bf16 checkpoint of each model, and `NAME/coded`, the same in MXFP4."""
    root = tmp_path_factory.mktemp("gpt-oss")
    for name in NAMES:
        (root / name).mkdir()
        write_gpt_oss_model(name, root / name, torch.bfloat16)
        write_in_mxfp4(root / name / "model", root / name / "coded")
    return root


def move_bits(root: str, out: str) -> list[str]:
    """Import without a collective, export, save; in every layout the file's bits. Returns what was done."""
    from tests.bridges.no_collectives import no_collectives
    from tests.bridges.test_bits import build, check_export, check_regions, check_same_files, import_one

    from weightcast.bridges.process_groups import destroy_model_parallel
    from weightcast.sync.checkpoint_files import open_checkpoint

    done = []
    for layout, sizes in LAYOUTS.items():
        for name in NAMES if layout == "EP2×TP2" else NAMES[:1]:
            folder = Path(root, name, "model")
            bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
            model = build(bridge, sizes)
            with no_collectives():
                import_one(bridge, model, checkpoint)
                check_regions(list(bridge.weight_source(model).held()), checkpoint)
            check_export(bridge, model, checkpoint)
            saved = Path(out, f"{name}-{layout}")
            bridge.save_hf_pretrained(model, saved, show_progress=False)
            check_same_files(saved, checkpoint)
            done.append(f"{name} in {layout}")
        destroy_model_parallel()
    return done


@pytest.mark.slow
def test_checkpoints_keep_their_bits_in_every_layout(folders: Path, tmp_path: Path) -> None:
    done = run_ranks(move_bits, 4, str(folders), str(tmp_path), timeout_s=300)
    wanted = [f"{name} in {layout}" for layout in LAYOUTS for name in (NAMES if layout == "EP2×TP2" else NAMES[:1])]
    assert done == [wanted] * 4


def import_codes(root: str, out: str) -> list[tuple[int, int]]:
    """Import MXFP4 and save it in bf16; what each import read and what this rank owns of the folder, in bytes."""
    from tests.bridges.test_bits import build

    from weightcast.bridges.hf_import import import_weights
    from weightcast.bridges.process_groups import destroy_model_parallel
    from weightcast.sync.checkpoint_files import open_checkpoint

    read: list[tuple[int, int]] = []
    for layout in ("TP2", "EP2"):
        for name in NAMES:
            folder = Path(root, name, "coded")
            bridge = AutoBridge.from_hf_pretrained(folder)
            model = build(bridge, LAYOUTS[layout])
            plan, stored = bridge.plan(model), {spec.name for spec in open_checkpoint(folder).specs}
            report = import_weights(plan, bridge.hf_checkpoint())
            plain = sum(held.region.numel * 2 for held in plan.regions if held.region.name in stored)
            coded = sum(held.region.numel for held in plan.regions if held.region.name not in stored)
            read.append((report.num_bytes, plain + coded * 17 // 32))  # 16 bytes and a scale for 32 weights
            bridge.save_hf_pretrained(model, Path(out, f"{name}-{layout}"), show_progress=False)
        destroy_model_parallel()
    return read


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers says that it decodes, in several ways
def test_published_codes_are_read_as_transformers_reads_them(folders: Path, tmp_path: Path) -> None:
    read = run_ranks(import_codes, 2, str(folders), str(tmp_path), timeout_s=300)
    assert all(num_bytes == owned for of_rank in read for num_bytes, owned in of_rank)
    for name in NAMES:
        wanted = AutoModelForCausalLM.from_pretrained(folders / name / "coded", dtype=torch.bfloat16).state_dict()
        for layout in ("TP2", "EP2"):
            saved = tmp_path / f"{name}-{layout}"
            config = json.loads((saved / "config.json").read_text())
            assert config["dtype"] == "bfloat16" and "quantization_config" not in config
            found = AutoModelForCausalLM.from_pretrained(saved).state_dict()
            assert found.keys() == wanted.keys()
            assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
            assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


@pytest.mark.parametrize("kind", ["model", "coded"])
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_conversion_without_a_model_gives_the_same_bits(kind: str, folders: Path, tmp_path: Path) -> None:
    for name in NAMES:
        source = folders / name / kind
        bridge = AutoBridge.from_hf_pretrained(source)
        checkpoint, back = tmp_path / f"{name}-megatron", tmp_path / f"{name}-back"
        import_checkpoint(bridge, checkpoint, show_progress=False, file_bytes=40_000)
        export_checkpoint(bridge, checkpoint, back, show_progress=False, shard_bytes=40_000)
        for other in (checkpoint, back):
            comparison = compare_checkpoints(source, other, config=bridge, show_progress=False)
            assert not comparison.differences and comparison.num_cast == 0
            assert comparison.num_tensors == len(bridge.hf_specs())


def publish(root: str, port: int) -> list[str]:
    """Publish from two ranks; an engine on rank 0 has the checkpoint's names and bits. Returns the names."""
    from concurrent.futures import ThreadPoolExecutor

    from safetensors.torch import load_file
    from tests.bridges.test_stream import WAIT_S, stage

    from weightcast.sync import WeightPublisher

    folder = Path(root, "gpt-oss", "model")
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    address = f"tcp://127.0.0.1:{port}"
    with (
        ThreadPoolExecutor(1) as pool,
        WeightPublisher(bridge.weight_source(model), address, timeout_s=WAIT_S) as publisher,
    ):
        engine = pool.submit(stage, address) if dist.get_rank() == 0 else None
        publisher.wait_for_subscribers(1, WAIT_S)
        publisher.publish(1)
        staged = engine.result(WAIT_S) if engine is not None else {}
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in staged.items())
    return sorted(staged)


def test_what_is_streamed_has_the_names_and_layout_of_hf(folders: Path) -> None:
    streamed, nothing = run_ranks(publish, 2, str(folders), find_free_port())
    assert streamed == [spec.name for spec in AutoBridge.from_hf_pretrained(folders / "gpt-oss/model").hf_specs()]
    assert "model.layers.0.mlp.experts.gate_up_proj" in streamed and nothing == []


# The fields of the published config.json that are not transformers' defaults, in the spelling of its time.
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "quantization_config": QUANTIZATION,
}
SIZES = {"20b": {"num_hidden_layers": 24, "num_local_experts": 32}, "120b": {}}


def published(folder: Path, size: str, **changes: Any) -> AutoBridge:
    """The bridge of a published configuration, read from its file."""
    fields = {"model_type": "gpt_oss"} | PUBLISHED | SIZES[size] | changes
    (folder / "config.json").write_text(json.dumps(fields))
    return AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder))


def test_the_published_configuration_is_translated(tmp_path: Path) -> None:
    provider = published(tmp_path, "20b").to_megatron_provider(load_weights=False)
    assert (provider.params_dtype, provider.num_moe_experts, provider.moe_router_topk) == (torch.bfloat16, 32, 4)
    assert (provider.window_size, provider.window_attn_skip_freq) == ((127, 0), [1, 0] * 12)
    assert provider.rotary_base == 150000.0 and provider.rope_extension is not None
    assert (provider.activation_func_clamp_value, provider.softmax_type, provider.moe_bias) == (7.0, "learnable", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 .* it must be 1.702"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.* only MXFP4 and FP8 e4m3"),
    ],
)
def test_what_is_not_computed_or_read_is_refused(changes: dict[str, Any], message: str) -> None:
    config = GptOssConfig(architectures=["GptOssForCausalLM"], **changes)
    with pytest.raises(UnsupportedModel, match=message):
        find_bridge(config).translate(config)


@pytest.mark.parametrize(
    ("size", "num_bytes"), [("20b", 41.8e9), pytest.param("120b", 233.7e9, marks=pytest.mark.long)]
)
def test_models_of_full_size_are_planned_expert_by_expert(size: str, num_bytes: float, tmp_path: Path) -> None:
    layout = Layout(tensor=2, pipeline=2, expert=4, world_size=16)
    run = plan_layout(published(tmp_path, size), layout)
    assert not run.faults
    assert run.num_bytes == pytest.approx(num_bytes, rel=0.01)
    layers, experts = (24, 32) if size == "20b" else (36, 128)
    # A region for each of an expert's four tensors, and 16 or fewer more in a layer.
    assert max(rank.num_regions for rank in run.ranks) < layers // 2 * (4 * experts // 4 + 50) + 10
