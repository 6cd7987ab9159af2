"""Qwen2.5-VL: the bits of its checkpoints, vision tower included, in every layout and every kind of file."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.bridges.tiny_qwen25_vl import COMPANIONS, VL_MODELS, write_vl_model
from tests.ranks import run_ranks
from transformers import Qwen2_5_VLForConditionalGeneration

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run import plan_layout
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.bridges.standalone_import import import_checkpoint
from weightcast.bridges.standalone_verify import compare_checkpoints
from weightcast.sync.checkpoint_files import open_checkpoint

UNTIED, TIED = VL_MODELS
LAYOUTS: dict[str, dict[str, int]] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2×PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
MOVED = [(UNTIED, layout) for layout in LAYOUTS] + [(TIED, "VPP2")]
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each model, in bf16."""
    root = tmp_path_factory.mktemp("vl-bits")
    for name in VL_MODELS:
        (root / name).mkdir()
        write_vl_model(name, root / name, dtype=torch.bfloat16)
    return root


def move_bits(models: str, out: str) -> list[str]:
    """Import without a collective, export, save; the file's bits and names in every layout. Returns what was done."""
    from tests.bridges.no_collectives import no_collectives
    from tests.bridges.test_bits import build, check_export, check_regions, check_same_files, import_one

    from weightcast.bridges.process_groups import destroy_model_parallel

    done = []
    for name, layout in MOVED:
        folder = Path(models, name, "model")
        bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
        model = build(bridge, LAYOUTS[layout])
        with no_collectives():
            import_one(bridge, model, checkpoint)
            source = bridge.weight_source(model)
            check_regions(list(source.held()), checkpoint)
        assert list(source.specs()) == list(checkpoint.specs)
        check_export(bridge, model, checkpoint)
        saved = Path(out, f"{name}-{layout}")
        bridge.save_hf_pretrained(model, saved, show_progress=False, shard_bytes=50_000)
        check_same_files(saved, checkpoint)
        done.append(f"{name} in {layout}")
        destroy_model_parallel()
    return done


def test_checkpoints_keep_their_bits_and_names_in_every_layout(models: Path, tmp_path: Path) -> None:
    done = run_ranks(move_bits, 4, str(models), str(tmp_path), timeout_s=300)
    assert done == [[f"{name} in {layout}" for name, layout in MOVED]] * 4
    for name, layout in (MOVED[-2], MOVED[-1]):
        folder = tmp_path / f"{name}-{layout}"
        for companion in ("config.json", *COMPANIONS):
            assert (folder / companion).read_bytes() == (models / name / "model" / companion).read_bytes()
        ours, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(models / name / "model").state_dict()
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.state_dict().items())


def save_here_load_there(models: str, out: str) -> None:
    """A Megatron checkpoint from TP=2 into PP=2 with virtual stages."""
    from tests.bridges.test_bits import check_regions

    from weightcast.bridges.process_groups import destroy_model_parallel

    folder = Path(models, TIED, "model")
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = 2
    provider.finalize()
    bridge.save_megatron_model(provider.provide_distributed_model(wrap_with_ddp=False), out)
    destroy_model_parallel()
    settings: dict[str, Any] = dict(LAYOUTS["VPP2"])
    model = bridge.load_megatron_model(out, **settings)
    check_regions(list(bridge.weight_source(model).held()), open_checkpoint(folder))
    destroy_model_parallel()


def test_megatron_checkpoints_go_from_layout_to_layout_and_back_to_hf(models: Path, tmp_path: Path) -> None:
    run_ranks(save_here_load_there, 2, str(models), str(tmp_path / "saved"))
    bridge = AutoBridge.from_hf_pretrained(models / TIED / "model")
    export_checkpoint(bridge, tmp_path / "saved", tmp_path / "hf", show_progress=False)
    assert not compare_checkpoints(models / TIED / "model", tmp_path / "hf", show_progress=False).differences


@pytest.mark.parametrize("name", VL_MODELS)
def test_standalone_conversion_keeps_bits_and_companions(name: str, models: Path, tmp_path: Path) -> None:
    source = models / name / "model"
    bridge = AutoBridge.from_hf_pretrained(source)
    import_checkpoint(bridge, tmp_path / "megatron", show_progress=False)
    export_checkpoint(bridge, tmp_path / "megatron", tmp_path / "hf", show_progress=False)
    for converted in (tmp_path / "megatron", tmp_path / "hf"):
        assert not compare_checkpoints(source, converted, show_progress=False).differences
    assert open_checkpoint(tmp_path / "hf").specs == open_checkpoint(source).specs
    assert all((tmp_path / "hf" / companion).is_file() for companion in COMPANIONS)


def test_a_dry_run_puts_the_vision_tower_on_the_first_stage(models: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(models / UNTIED / "model")
    for layout in (Layout(tensor=2, pipeline=2, world_size=8), Layout(pipeline=2)):
        run = plan_layout(bridge, layout)
        assert not run.faults
        assert sum(plan.served_bytes for plan in run.ranks) == run.num_bytes
    first, last = (plan.held_bytes for plan in run.ranks)
    vision_bytes = sum(spec.num_bytes for spec in bridge.hf_specs() if spec.name.startswith("visual."))
    # The stages are alike but for the tower and the final norm; embedding and output layer have the same size.
    assert first - last == vision_bytes - 64 * torch.bfloat16.itemsize


def respelled(source: Path, folder: Path) -> Path:
    """`source` under the names that the model has in memory, as some versions of transformers wrote it."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        begin, rest = name.split(".", 1)
        tensors[{"visual": f"model.visual.{rest}", "model": f"model.language_model.{rest}"}.get(begin, name)] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder)
    return folder


def import_and_save(source: str, out: str) -> None:
    from tests.bridges.test_bits import build, check_export, check_same_files

    from weightcast.bridges.process_groups import destroy_model_parallel

    bridge, checkpoint = AutoBridge.from_hf_pretrained(source), open_checkpoint(Path(source))
    model = build(bridge, LAYOUTS["PP2"])
    bridge.load_hf_weights(model)
    check_export(bridge, model, checkpoint)
    bridge.save_hf_pretrained(model, out, show_progress=False)
    check_same_files(Path(out), checkpoint)
    destroy_model_parallel()


@pytest.mark.parametrize("name", VL_MODELS)
def test_a_folder_under_other_names_keeps_them(name: str, models: Path, tmp_path: Path) -> None:
    plain = models / name / "model"
    source = respelled(plain, tmp_path / "source")
    if name == UNTIED:
        run_ranks(import_and_save, 2, str(source), str(tmp_path / "saved"))
    bridge = AutoBridge.from_hf_pretrained(source)
    assert not plan_layout(bridge, Layout(pipeline=2)).faults
    import_checkpoint(bridge, tmp_path / "megatron", show_progress=False)
    export_checkpoint(bridge, tmp_path / "megatron", tmp_path / "hf", show_progress=False)
    assert open_checkpoint(tmp_path / "hf").specs == open_checkpoint(source).specs
    assert not compare_checkpoints(source, tmp_path / "hf", show_progress=False).differences
    # Another bridge writes the same values under its own folder's names.
    export_checkpoint(AutoBridge.from_hf_pretrained(plain), tmp_path / "megatron", tmp_path / "plain")
    assert not compare_checkpoints(plain, tmp_path / "plain", show_progress=False).differences
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained(source).state_dict()
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(plain).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
