"""Which checkpoints have layers for multi-token prediction, and that every way in and out agrees about it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.bridges.test_mla import write_in_fp8
from tests.bridges.test_mla_config import V3, config_of
from tests.bridges.tiny_mtp import without_prediction, write_mtp_model
from tests.ranks import run_ranks
from transformers import Glm4MoeConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run import plan_layout
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.layers.mtp import INNER_LAYER
from weightcast.bridges.rules import expand_rules
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.bridges.standalone_import import import_checkpoint
from weightcast.bridges.standalone_inputs import open_bridge
from weightcast.bridges.standalone_verify import compare_checkpoints
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import CheckpointMismatch

NAMES = ("deepseek-v3-mtp", "glm4-moe-mtp")
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each name a folder as it is published, and one as transformers writes it (`-without`); a name in FP8."""
    root = tmp_path_factory.mktemp("mtp")
    for name in NAMES:
        (root / "made").mkdir()
        write_mtp_model(name, root / "made", torch.zeros(1, 5, dtype=torch.long), dtype=torch.bfloat16)
        (root / "made" / "model").rename(root / name)
        shutil.rmtree(root / "made")
        without_prediction(root / name, root / f"{name}-without")
    write_in_fp8(root / NAMES[0], root / "fp8")
    return root


def is_prediction(name: str) -> bool:
    return name.startswith("model.layers.4.")  # of four layers


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_the_layers_that_its_checkpoint_stores(name: str, folders: Path) -> None:
    full, without = (AutoBridge.from_hf_pretrained(folders / folder) for folder in (name, f"{name}-without"))
    alone = open_bridge(folders / name / "config.json")
    assert json.loads((folders / f"{name}-without" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    for bridge, path, count in [
        (full, None, 1),
        (without, None, None),
        (alone, None, 1),
        (full, folders / f"{name}-without", None),
        (without, folders / name, 1),
        (alone, folders / f"{name}-without", None),
    ]:
        provider = bridge.to_megatron_provider(load_weights=path is not None, hf_path=path)
        assert provider.mtp_num_layers == count
        assert any(is_prediction(spec.name) for spec in bridge.hf_specs(path)) == (count == 1)
    assert {spec.name for spec in alone.hf_specs()} == {spec.name for spec in full.hf_specs()}
    assert {spec.name: spec.shape for spec in alone.hf_specs()} == {s.name: s.shape for s in full.hf_specs()}


def as_hub(folder: Path, cache: Path, name: str, shards: bool) -> None:
    """`folder` as the cache of a hub repository, in one file or two with an index."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    if shards:
        tensors = load_file(snapshot / "model.safetensors")
        (snapshot / "model.safetensors").unlink()
        names = sorted(tensors)
        files = {name: f"model-{1 + (number > 20)}.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, snapshot / file)
        (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("shards", [False, True])
def test_a_hub_repository_is_asked_for_its_index_alone(shards: bool, folders: Path, tmp_path: Path) -> None:
    for folder in ("deepseek-v3-mtp", "deepseek-v3-mtp-without"):
        as_hub(folders / folder, tmp_path, f"org/{folder}", shards)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    full = AutoBridge.from_hf_pretrained("org/deepseek-v3-mtp", **options)
    without = AutoBridge.from_hf_pretrained("org/deepseek-v3-mtp-without", **options)
    counts = [bridge.to_megatron_provider(load_weights=False).mtp_num_layers for bridge in (full, without)]
    assert counts == [1, None]


@pytest.mark.parametrize("folder", ["deepseek-v3-mtp", "glm4-moe-mtp", "deepseek-v3-mtp-without", "fp8"])
def test_there_and_back_without_a_model(folder: str, folders: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders / folder)
    import_checkpoint(bridge, tmp_path / "checkpoint", show_progress=False)
    stored = DistCheckpoint.open(tmp_path / "checkpoint").specs
    attention = f"mtp.layers.0.{INNER_LAYER}.self_attention.linear_proj.weight"
    assert (attention in stored) == (not folder.endswith("without"))
    export_checkpoint(bridge, tmp_path / "checkpoint", tmp_path / "back", show_progress=False)
    assert not compare_checkpoints(folders / folder, tmp_path / "back", config=bridge, show_progress=False).differences
    assert set(open_checkpoint(tmp_path / "back").specs) == set(bridge.hf_specs())


def test_a_megatron_checkpoint_says_itself_whether_it_has_them(folders: Path, tmp_path: Path) -> None:
    full, without = (AutoBridge.from_hf_pretrained(folders / name) for name in (NAMES[0], f"{NAMES[0]}-without"))
    for number, (source, config, wanted) in enumerate(
        [(without, full, f"{NAMES[0]}-without"), (full, without, NAMES[0])]
    ):
        checkpoint, out = tmp_path / f"checkpoint-{number}", tmp_path / f"out-{number}"
        import_checkpoint(source, checkpoint, show_progress=False)
        export_checkpoint(config, checkpoint, out, show_progress=False)
        assert not compare_checkpoints(folders / wanted, out, show_progress=False).differences


@pytest.mark.parametrize("name", ["deepseek-v3-mtp", "glm4-moe-mtp", "deepseek-v3-mtp-without", "fp8"])
def test_a_dry_run_of_folders_finds_no_fault(name: str, folders: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(folders / name)
    run = plan_layout(bridge, Layout(tensor=2, pipeline=2, expert=2, expert_tensor=1))
    assert not run.faults and run.num_tensors == len(bridge.hf_specs())
    first, last = (max(p.held_bytes for p in run.ranks if p.seat.pipeline == stage) for stage in (0, 1))
    assert (last > 1.4 * first) == (not name.endswith("without"))  # a layer and the embedding more


GLM_45_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "num_hidden_layers": 46,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 128,
    "attention_bias": True,
    "use_qk_norm": False,
}


@pytest.mark.parametrize("model", ["deepseek-v3", "glm-4.5-air"])
def test_tables_fill_what_published_models_store(model: str) -> None:
    """The published lists: of each prediction layer what a layer has, four tensors around it and two copies."""
    config = config_of(V3 | {"num_nextn_predict_layers": 1}) if model == "deepseek-v3" else Glm4MoeConfig(**GLM_45_AIR)
    bridge, number = AutoBridge.from_hf_config(config), config.num_hidden_layers
    table = expand_rules(bridge.family.rules(bridge.hf_config), number)
    names = {name for rule in table.values() for name in rule.hf_names}
    specs = {spec.name: spec for spec in bridge.hf_specs()}
    copies = {f"model.layers.{number}.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    around = {f"model.layers.{number}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")}
    assert names == specs.keys() - copies and around | copies <= specs.keys()
    mine, last = f"model.layers.{number}.", f"model.layers.{number - 1}."
    like_last = {mine + name.removeprefix(last) for name in specs if name.startswith(last)}
    assert {name for name in specs if name.startswith(mine)} - like_last == around | copies
    assert specs[f"model.layers.{number}.eh_proj.weight"].shape == (config.hidden_size, 2 * config.hidden_size)


@pytest.mark.slow
def test_a_dry_run_of_deepseek_v3_puts_the_layer_on_the_last_stage() -> None:
    fields = V3 | {"num_nextn_predict_layers": 1, "num_hidden_layers": 5}
    run = plan_layout(AutoBridge.from_hf_config(config_of(fields)), Layout(tensor=2, pipeline=2, expert=8))
    assert not run.faults
    # Two prediction-layer copies, the layer's 256 experts and its other tensors among those of five layers.
    assert run.num_tensors == 3 + 6 * 9 + 3 * 3 + 3 * (256 * 3 + 5) + 6


def leave_out(folder: str, without: str, out: str) -> list[bool | str]:
    """A model without the stored layers, one with layers that are not stored, and a copy that is none."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.mtp_num_layers = None
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    source = bridge.weight_source(model)
    bridge.save_hf_pretrained(model, out, show_progress=False)
    wanted = load_file(Path(without, "model.safetensors"))
    saved = load_file(Path(out, "model.safetensors"))
    same = saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    results: list[bool | str] = [same, {spec.name for spec in source.specs()} == wanted.keys()]

    full = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
    try:
        bridge.load_hf_weights(full, without)
    except CheckpointMismatch as error:
        results.append(str(error))
    tensors = load_file(Path(folder, "model.safetensors"))
    tensors["model.layers.4.embed_tokens.weight"][7, 3] += 1
    save_file(tensors, Path(out, "model.safetensors"))
    try:
        bridge.load_hf_weights(full, out)
    except CheckpointMismatch as error:
        results.append(str(error))
    return results


def test_layers_may_be_left_out_but_not_made_up(folders: Path, tmp_path: Path) -> None:
    """A copy is compared before anything is read."""
    name = "deepseek-v3-mtp"
    folder, without = str(folders / name), str(folders / f"{name}-without")
    ((same, agree, missing, differs),) = run_ranks(leave_out, 1, folder, without, str(tmp_path / "out"))
    assert same and agree
    assert "model.layers.4.enorm.weight" in missing and "is in no safetensors file" in missing
    assert "model.layers.4.embed_tokens.weight" in differs and "differs from model.embed_tokens.weight" in differs


def test_families_that_store_no_such_layers_have_none(tiny_models: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(tiny_models / "llama2")
    assert bridge.with_prediction_layers(1) is bridge
