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
from tests.sync.reports import make_report
from tests.sync.trace_format import check_trace

from weightcast.adapters.timeline import EventLog
from weightcast.bridges.codecs import decode_checkpoint
from weightcast.cli import main
from weightcast.sync import ReportLog, Version
from weightcast.sync.checkpoint_files import open_checkpoint

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


def test_quantize_to_fp8(models: Path, tmp_path: Path) -> None:
    done = weightcast("quantize", models / "qwen3", "fp8", "--keep", "layers.0.mlp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base, coded = load_file(models / "qwen3" / "model.safetensors"), load_file(tmp_path / "fp8" / "model.safetensors")
    scales = {name for name in coded if name.endswith("_scale_inv")}
    assert coded.keys() - scales == base.keys()
    assert {tensor.dtype for name, tensor in coded.items() if f"{name}_scale_inv" in scales} == {torch.float8_e4m3fn}
    assert f"{len(coded)} tensors" in done.stdout and f"{len(scales)} of them as FP8" in done.stdout
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert "model.layers.0.mlp.up_proj" in config["quantization_config"]["modules_to_not_convert"]
    assert (tmp_path / "fp8" / "tokenizer.json").is_file()
    # The bridge reads it as the weights that it stands for.
    checkpoint = decode_checkpoint(open_checkpoint(tmp_path / "fp8"), torch.float32)
    with checkpoint.reader() as reader:
        for spec in checkpoint.specs:
            read = reader.read(spec.whole()).float()
            assert torch.allclose(read, base[spec.name].float(), rtol=2**-4, atol=1e-3), spec.name


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


def test_trace_of_a_folder_of_events(tmp_path: Path) -> None:
    log = EventLog("engine", tmp_path / "events.jsonl")
    with log.phase("load", Version(1, 7)):
        pass
    ReportLog(tmp_path / "reports.jsonl").append(make_report(7))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"process": "trainer-0", "event": "step", "loss": 2.5}\n{"process": "eng')
    done = weightcast("trace", ".", "--out", "drawn.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown, figures, unfinished = done.stdout.splitlines()
    assert shown.startswith("drawn.json: 9 phases of 6 processes, 1 versions, 1 reports; open it in https://ui.perf")
    assert figures == "without a time, left out: 1 lines of figures"
    assert unfinished == "still being written, left out: the last line of 1 files"
    check_trace(json.loads((tmp_path / "drawn.json").read_text()))
    refused = weightcast("trace", "events.jsonl", "--out", "absent/trace.json", cwd=tmp_path)
    assert refused.returncode == 1 and "name another file with --out" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trace", "absent"), "cannot read absent"),
        (("trace", "empty.yaml"), "empty.yaml, line 1: Expecting value"),
        (("trace", "qwen3"), "qwen3 has no files with .jsonl in their names"),
        (("plan", "absent/x/y"), "absent/x/y is no folder; give a Hugging Face folder"),
        (("plan", "qwen3/tokenizer.json"), "as a configuration"),
        (("plan", "qwen3", "--tp", "3", "--world-size", "8"), "does not divide the world size 8"),
        (("plan", "qwen3", "--pp", "2", "--stages", "Et*3|L"), "has 3 layers (t), the model 4"),
        (("plan", "qwen3", "--rank", "1"), "rank 1 is none of the layout's 1"),
        (("plan", "empty.yaml"), "empty.yaml names no model; set model.hf_path"),
        (("import", "qwen3", "qwen3"), "qwen3 is not empty; give a new folder"),
        (("export", "qwen3", "out", "--config", "qwen3"), "qwen3 is no torch_dist checkpoint"),
        (("merge", "qwen3", "qwen3", "out"), "qwen3 has no adapter_config.json"),
        (("quantize", "qwen3", "out", "--kind", "fp4"), "kind='fp4' is not one of: fp8_block, fp8_tensor"),
        (("quantize", "qwen3", "out", "--keep", "mpl"), "keep: 'mpl' is part of no tensor's name"),
        (("quantize", "absent", "out"), "absent has no config.json"),
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
