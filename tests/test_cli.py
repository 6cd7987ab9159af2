"""The commands that need no engine and no GPU, as a user calls them: what they do, and how they refuse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.bridges.tiny_models import write_tiny_model

from weightcast.cli import main

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 120


def weightcast(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightcast", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_tiny_model("qwen3", root / "qwen3")
    (root / "empty.yaml").write_text("train:\n  train_iters: 1\n")
    return root


def test_plan_of_a_folder_and_of_a_configuration_alone(models: Path, tmp_path: Path) -> None:
    sizes = ("--tp", 2, "--pp", 2, "--cp", 2, "--world-size", 16)
    done = weightcast("plan", "qwen3", *sizes, "--json", tmp_path / "plan.json", cwd=models)
    assert done.returncode == 0, done.stderr
    assert "Qwen3ForCausalLM: 47 tensors" in done.stdout and "on 16 ranks (4 distinct plans" in done.stdout
    report = json.loads((tmp_path / "plan.json").read_text())
    assert len(report["ranks"]) == 16 and not any(report["faults"].values())
    alone = weightcast("plan", "qwen3/config.json", *sizes, "--link-gbps", 400, cwd=models)
    assert alone.returncode == 0, alone.stderr
    assert "Qwen3ForCausalLM: 47 tensors" in alone.stdout and "at 400 Gbit/s a link" in alone.stdout


def test_plan_of_a_run_of_the_trainer(models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"model:\n  hf_path: {models / 'qwen3'}\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 2\n"
    )
    options = ("--rank", 3, "--json", "plan.json")
    done = weightcast("plan", recipe, "--pp", 3, "--vpp", 1, "--stages", "E|t*4|L", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    assert (report["layout"]["tensor"], report["layout"]["pipeline"], len(report["ranks"])) == (2, 3, 6)
    assert "rank 3 (pipeline 1, tensor 1, expert 0, expert_tensor 1)" in done.stdout
    assert "model.layers.3.mlp.down_proj.weight" in done.stdout
    uneven = weightcast("plan", recipe, "--vpp", 1, "--pp", 3, cwd=tmp_path)
    assert "a real run needs" in uneven.stdout, uneven.stderr


def test_import_export_verify_and_inspect(models: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        done = weightcast(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    source = models / "qwen3"
    assert "47 tensors" in run("import", source, "megatron")
    assert "47 tensors" in run("export", "megatron", "hf", "--config", source, "--shard-bytes", 60_000)
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert run("verify", "hf", "megatron").startswith("equal: 47 tensors")
    said = run("inspect", "megatron", "--names", "--json", "contents.json")
    assert "Megatron checkpoint (torch_dist)" in said and "decoder.layers.3.mlp.linear_fc2.weight" in said
    contents = json.loads((tmp_path / "contents.json").read_text())
    assert len(contents["specs"]) == 35 and contents["order"].startswith("a key a layer")
    assert "Qwen3ForCausalLM: covered by a bridge" in run("inspect", "hf")


def test_merge_of_an_adapter(models: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj"
    base = load_file(models / "qwen3" / "model.safetensors")
    factors = {"lora_A": torch.randn(2, base[f"{name}.weight"].shape[1]), "lora_B": torch.randn(32, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.{name}.{factor}.weight": tensor for factor, tensor in factors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    said = weightcast("inspect", "adapter", "--json", "adapter.json", cwd=tmp_path).stdout
    assert "PEFT folder, LoRA: 2 tensors, " in said and "rank 2, alpha 4 over rank" in said and "o_proj" in said
    assert json.loads((tmp_path / "adapter.json").read_text())["adapter"]["rank"] == 2
    done = weightcast("merge", models / "qwen3", "adapter", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "47 tensors" in done.stdout and "1 of them merged" in done.stdout
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base[f"{name}.weight"] += factors["lora_B"] @ factors["lora_A"] * 2
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[other], tensor) for other, tensor in base.items())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_verify_names_what_differs(models: Path, tmp_path: Path) -> None:
    path = shutil.copytree(models / "qwen3", tmp_path / "other") / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x40
    path.write_bytes(raw)
    done = weightcast("verify", "qwen3", tmp_path / "other", cwd=models)
    assert done.returncode == 1 and not done.stderr
    first, last = done.stdout.splitlines()
    assert ": 1 of " in first and "first at (" in first
    assert last.startswith("1 tensors differ: 47 tensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "absent/x/y"), "absent/x/y is no folder; give a Hugging Face folder"),
        (("plan", "qwen3/tokenizer.json"), "as a configuration"),
        (("plan", "qwen3", "--tp", "3", "--world-size", "8"), "does not divide the world size 8"),
        (("plan", "qwen3", "--pp", "2", "--stages", "Et*3|L"), "has 3 layers (t), the model 4"),
        (("plan", "qwen3", "--rank", "1"), "rank 1 is none of the layout's 1"),
        (("plan", "empty.yaml"), "empty.yaml names no model; set model.hf_path"),
        (("import", "qwen3", "qwen3"), "qwen3 is not empty; give a new folder"),
        (("export", "qwen3", "out", "--config", "qwen3"), "qwen3 is no torch_dist checkpoint"),
        (("merge", "qwen3", "qwen3", "out"), "qwen3 has no adapter_config.json"),
        (("verify", "qwen3", "absent"), "absent holds neither safetensors"),
        (("inspect", "absent"), "absent holds neither safetensors"),
        (("plan", "qwen3", "--tp", "8"), "choose a tensor_model_parallel_size that divides it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_refused_in_one_message(
    arguments: tuple[str, ...],
    message: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["weightcast", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and last.startswith("weightcast: ") and message in last


def test_a_shell_sees_the_message_and_the_exit_code(models: Path) -> None:
    done = weightcast("import", "qwen3", "qwen3", cwd=models)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("weightcast: qwen3 is not empty") and "Traceback" not in done.stderr
