"""Recipes at full size, planned on no memory; the commands that list, print and start them."""

import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from rich.console import Console
from tests.trainer.recipe_runs import NAMES, QUICK, sparing
from typer.testing import CliRunner

from weightcast.cli import app
from weightcast.sync.errors import ConfigError
from weightcast.trainer.launch import torchrun_command
from weightcast.trainer.overrides import load_config
from weightcast.trainer.recipes.listing import Entry, as_json, describe, list_recipes, matching, render, spell_count
from weightcast.trainer.recipes.plan import RankMemory, RecipePlan, plan_recipe, spell_layout
from weightcast.trainer.recipes.registry import KINDS, load_recipe, recipe_modules

# The numbers of parameters on the models' pages of the hub ("Model size"), from the safetensors' own headers; of V3
# without the layer for multi-token prediction, as its report counts; of Moonlight without the buffers of its rope.
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "llama33_70b": 70_553_706_496,
    "qwen2_500m": 494_032_768,
    "qwen2_1p5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen25_500m": 494_032_768,
    "qwen25_1p5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen25_14b": 14_770_033_664,
    "qwen25_32b": 32_763_876_352,
    "qwen25_72b": 72_706_203_648,
    "qwen3_600m": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen25_vl_3b": 3_754_622_976,
    "qwen25_vl_7b": 8_292_166_656,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v2": 235_741_434_880,
    "deepseek_v3": 671_026_419_200,
    "moonlight_16b": 15_960_110_208,
    "gemma3_270m": 268_098_176,
}
TIMEOUT_S = 240
PROXY = ("recipe=qwen3_600m.pretrain", "proxy=true", "train.train_iters=2", "checkpoint.save=run")


def test_every_model_has_a_published_number() -> None:
    assert PUBLISHED.keys() == recipe_modules().keys()


@cache
def planned(name: str) -> RecipePlan:
    return plan_recipe(load_recipe(name))


# As they are, because small; the big ones of each family once.
IN_MAKE_TEST = {*QUICK, "llama31_405b.lora", "moonlight_16b.lora", "qwen25_72b.sft", "qwen3_30b_a3b.pretrain"}


@pytest.mark.parametrize("name", sparing(lambda name: name in IN_MAKE_TEST))
def test_every_recipe_is_planned_at_its_full_size(name: str) -> None:
    config, plan = load_recipe(name), planned(name)
    assert plan.num_parameters == PUBLISHED[name.partition(".")[0]]
    assert len(plan.stages) == config.model.pipeline_model_parallel_size
    # What all ranks hold is the model at least; replicas, padding and what is held twice come on top.
    held = sum(memory.weights_bytes for memory in plan.stages) // 2 * (plan.num_ranks // len(plan.stages))
    assert held >= plan.num_parameters
    assert all(memory.weights_bytes > 0 for memory in plan.stages)
    # Adapters are a small part of the model, and only they have gradients.
    frozen = config.peft.scheme is not None
    gradients_bytes = sum(memory.gradients_bytes for memory in plan.stages)
    assert gradients_bytes > 0
    assert (gradients_bytes < 0.25 * sum(memory.weights_bytes for memory in plan.stages)) == frozen


def test_of_a_frozen_base_there_are_weights_alone() -> None:
    """LoRA of rank 32 on four linears of each of 16 layers: 32 x (inputs + outputs); DoRA adds a number a row."""
    lora, dora = planned("llama32_1b.lora").largest, planned("llama32_1b.dora").largest
    hidden, query_key_value, gate_up, inner = 2048, 3072, 2 * 8192, 8192
    rows = query_key_value + hidden + gate_up + hidden
    adapters = 16 * 32 * (hidden + hidden + hidden + inner + rows)
    assert lora.gradients_bytes == 4 * adapters
    assert lora.optimizer_bytes == 12 * adapters
    assert lora.weights_bytes == 2 * (1_235_814_400 + adapters)
    assert dora.gradients_bytes == lora.gradients_bytes + 4 * 16 * rows


def test_more_ranks_share_the_optimizers_state_and_nothing_else() -> None:
    config = load_recipe("llama32_1b.pretrain")
    one, eight = planned("llama32_1b.pretrain").largest, plan_recipe(config, num_ranks=8).largest
    assert one.weights_bytes == eight.weights_bytes == 2 * 1_235_814_400
    assert one.gradients_bytes == eight.gradients_bytes == 2 * one.weights_bytes
    assert one.optimizer_bytes == 8 * eight.optimizer_bytes == 12 * 1_235_814_400
    config.mixed_precision = "fp32"
    assert plan_recipe(config).largest.total_bytes == (4 + 4 + 8) * 1_235_814_400
    config.ddp.use_distributed_optimizer = False
    assert plan_recipe(config, num_ranks=4).largest.total_bytes == (4 + 4 + 8) * 1_235_814_400


def test_experts_have_fewer_replicas_than_the_rest() -> None:
    config = load_recipe("deepseek_v2_lite.pretrain")
    config.model.mtp_num_layers = None
    plan = plan_recipe(config)
    memory = plan.largest
    # 26 layers of 64 experts of three matrices, an eighth on each of 8 ranks, none of which has a copy.
    experts = 26 * 64 * 3 * 2048 * 1408 // 8
    dense = plan.num_parameters - 8 * experts
    assert (plan.num_ranks, plan.layout) == (8, "EP8")
    assert memory.weights_bytes == 2 * (experts + dense)
    assert memory.optimizer_bytes == 12 * experts + 12 * dense // 8


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="TP4 PP4 VPP5 CP2 SP needs a multiple of 32 ranks, and 48 are given"):
        plan_recipe(load_recipe("llama3_70b.pretrain"), num_ranks=48)


def test_layouts_and_counts_are_spelled() -> None:
    assert spell_layout(load_recipe("deepseek_v3.pretrain").model) == "TP2 PP16 EP64 ETP1 SP"
    assert spell_layout(load_recipe("llama32_1b.pretrain").model) == "TP1"
    counts = (494_032_768, 1_235_814_400, 70_553_706_496, 405_853_388_800, 10**12)
    assert [spell_count(count) for count in counts] == ["494M", "1.24B", "70.6B", "406B", "1T"]


def test_a_printed_recipe_starts_the_same_run(tmp_path: Path) -> None:
    text = describe("qwen25_32b.sft")
    assert text.startswith("# qwen25_32b.sft: Qwen2ForCausalLM, 32.8B parameters, TP8 PP2 on 16 GPUs")
    assert "# stage 1: " in text
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(config_file=str(tmp_path / "run.yaml")) == load_recipe("qwen25_32b.sft")
    assert yaml.safe_load(text)["model"]["hf_config"]["num_hidden_layers"] == 64


def test_recipes_are_found_by_a_part_of_their_names() -> None:
    assert matching("llama32_1b.pretrain") == ["llama32_1b.pretrain"]
    assert {name.partition(".")[0] for name in matching("qwen3_")} == {
        name for name in recipe_modules() if name.startswith("qwen3_")
    }
    with pytest.raises(ConfigError, match="did you mean 'llama32_1b'"):
        matching("llama32_1bb.pretrain")
    plans: dict[str, Any] = as_json(list_recipes(["llama32_1b.pretrain"]))
    assert plans["llama32_1b.pretrain"]["num_parameters"] == PUBLISHED["llama32_1b"]


def test_nothing_is_cut_in_a_terminal_of_80_columns() -> None:
    """Names and figures of the longest kinds, whole; only a layout goes on in the next line."""
    memory = RankMemory(0, weights_bytes=2000 * 2**30, gradients_bytes=999 * 2**30, optimizer_bytes=333 * 2**30)
    layout = max((spell_layout(load_recipe(name).model) for name in NAMES), key=len)
    plan = RecipePlan("Any", 405_853_388_800, 1024, layout, (memory,))
    out = io.StringIO()
    Console(file=out, width=80).print(render(Entry(name, load_recipe(name), plan) for name in NAMES))
    lines = out.getvalue().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line and not line.startswith(" ")}
    assert rows.keys() >= set(NAMES)
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
    for name in NAMES:
        assert rows[name][0] == "406B" and rows[name][-6:-5] == ["1024"]
        assert rows[name][-5].split("x") == [
            str(load_recipe(name).train.global_batch_size),
            str(load_recipe(name).dataset.seq_length),
        ]
        assert rows[name][-4:] == ["3332", "2000", "999.0", "333.0"]
    assert {word for line in lines for word in line.split()} >= set(layout.split())


def test_torchruns_command() -> None:
    command = torchrun_command(["recipe=a", "x.y=1"], num_ranks=3, config_file=Path("run.yaml"))
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    assert command[5:] == ["-m", "weightcast.trainer.pretrain", "--config", "run.yaml", "recipe=a", "x.y=1"]


def weightcast(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightcast", *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("qwen3_600m", "qwen3_600m", ("Qwen3ForCausalLM", "on 1 rank")),
        pytest.param("qwen3_30b", "qwen3_30b_a3b", ("Qwen3MoeForCausalLM", "on 8 ranks"), marks=pytest.mark.long),
    ],
)
def test_the_commands(
    name: str, model: str, said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing and planning, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    listed = CliRunner().invoke(app, ["recipes", name, "--gpus", "16", "--json", "plans.json"])
    assert listed.exit_code == 0, listed.output
    expected = (*(f"{model}.{kind}" for kind in KINDS), spell_count(PUBLISHED[model]), "Activations come on top")
    assert all(text in listed.output for text in expected)
    assert json.loads((tmp_path / "plans.json").read_text())[f"{model}.pretrain"]["num_ranks"] == 16
    done = CliRunner().invoke(app, ["plan", f"{model}.pretrain"])
    assert done.exit_code == 0, done.output
    assert all(text in done.output for text in said)


def test_a_proxy_is_trained_by_the_command(tmp_path: Path) -> None:
    trained = weightcast("train", "--nproc", "2", *PROXY, "logger.events=events/run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert len(losses(tmp_path / "events" / "run.0")) == 2


@pytest.mark.long
def test_a_run_is_started_again_from_its_own_configuration(tmp_path: Path) -> None:
    trained = weightcast("train", "--nproc", "2", *PROXY, "logger.events=events/run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    again = weightcast(
        *("train", "--config", "run/run_config.yaml", "--nproc", "2"),
        *("logger.events=events/again", "checkpoint.save=again"),
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "events" / "run.0") == losses(tmp_path / "events" / "again.0")
    mistaken = weightcast("train", "--nproc", "2", *PROXY, "train.trainiters=3", cwd=tmp_path)
    assert mistaken.returncode == 2
    assert mistaken.stderr.count("did you mean 'train.train_iters'") == 1


def losses(events: Path) -> list[float]:
    records = [json.loads(line) for line in events.read_text().splitlines()]
    found = [record["loss"] for record in records if record.get("event") == "step"]
    assert len(found) == 2
    return found
