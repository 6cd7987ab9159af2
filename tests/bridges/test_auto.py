"""AutoBridge: the quickstarts run as they stand, on a folder, in a lone process, without a hub."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import run_ranks
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

# Python code that opens a network connection or resolves a name ends the run.
NO_NETWORK = """
import socket, sys

def refuse(event, arguments):
    local = event == "socket.connect" and arguments[0].family == socket.AF_UNIX  # multiprocessing's own
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname") and not local:
        raise SystemExit(f"network: {event} {arguments}")

sys.addaudithook(refuse)
"""

BASIC_USAGE = """
from weightcast.bridges import AutoBridge

# Load a supported model automatically
bridge = AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")

# Create a provider, configure before instantiation, then build the model
provider = bridge.to_megatron_provider()
provider.tensor_model_parallel_size = 1
provider.pipeline_model_parallel_size = 1
provider.finalize()
megatron_model = provider.provide_distributed_model(wrap_with_ddp=False)
"""

CONVERTING_BACK = """
# Save the complete model (config, tokenizer, weights)
bridge.save_hf_pretrained(megatron_model, "./my-fine-tuned-llama")

# The saved model can be loaded with Hugging Face
from transformers import AutoModelForCausalLM
hf_model = AutoModelForCausalLM.from_pretrained("./my-fine-tuned-llama")

# Save just the model weights (faster, smaller)
bridge.save_hf_weights(megatron_model, "./model_weights")

# Save without progress bar (useful in scripts)
bridge.save_hf_weights(megatron_model, "./weights", show_progress=False)

# Stream weights during conversion (memory efficient)
for name, weight in bridge.export_hf_weights(megatron_model):
    print(f"Exporting {name}: {weight.shape}")

for name, weight in bridge.export_hf_weights(megatron_model, cpu=True):
    print(f"Exported {name}: {tuple(weight.shape)}")
"""

ADVANCED_LOADING = """
import torch
from weightcast.bridges import AutoBridge

# Load with specific settings
bridge = AutoBridge.from_hf_pretrained(
    "meta-llama/Llama-2-7b-hf",
    torch_dtype=torch.float16,
    device_map="auto",
    trust_remote_code=True,
)

# Get a model provider (lazy loading)
provider = bridge.to_megatron_provider()

# Configure parallelism (multi-GPU requires torchrun or srun)
provider.tensor_model_parallel_size = 2
provider.pipeline_model_parallel_size = 2

# Configure fusions
provider.bias_activation_fusion = True
provider.bias_dropout_fusion = True

# Finalize the provider to run validation checks and complete initialization
provider.finalize()
print(provider.params_dtype)
"""

CHECK_SUPPORTED = """
from weightcast.bridges import AutoBridge

# Get a list of all supported model architectures
supported_models = AutoBridge.list_supported_models()

print(f"Found {len(supported_models)} supported models:")
for i, model in enumerate(supported_models, 1):
    print(f"  {i:2d}. {model}")

if AutoBridge.can_handle("meta-llama/Llama-3.2-1B"):
    print("Model is supported!")
    bridge = AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")
else:
    print("Model requires a custom bridge implementation")
"""

STREAMING = """
from transformers import AutoConfig
from weightcast.bridges import AutoBridge

bridge = AutoBridge.from_hf_pretrained("meta-llama/Llama-3.2-1B")
model = bridge.to_megatron_model()  # Uses default settings
kept = {}
def process_weight(name, weight):
    kept[name] = weight

# Use streaming for large models
for name, weight in bridge.export_hf_weights(model, cpu=True):
    process_weight(name, weight)
print(len(kept), "kept")

# Use config-only loading for architecture exploration
config = AutoConfig.from_pretrained("meta-llama/Llama-3-8B")
bridge = AutoBridge.from_hf_config(config)
transformer_config = bridge.transformer_config
print(f"Hidden size: {transformer_config.hidden_size}")
"""

IMPORT_CKPT = """
from weightcast.bridges import AutoBridge; AutoBridge.import_ckpt('meta-llama/Llama-3.2-1B','./megatron_checkpoints/llama32_1b')
"""  # noqa: E501
EXPORT_CKPT = """
from weightcast.bridges import AutoBridge; from transformers import AutoConfig; cfg=AutoConfig.from_pretrained('meta-llama/Llama-3.2-1B'); b=AutoBridge.from_hf_config(cfg); b.export_ckpt('./megatron_checkpoints/llama32_1b','./hf_exports/llama32_1b')
"""  # noqa: E501


@pytest.fixture
def run_snippet(tiny_models: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a snippet with its hub names replaced by folders; warnings of ours are errors. Returns what it printed."""

    def run(*parts: str) -> str:
        program = NO_NETWORK + "".join(parts)
        for name in ("Llama-3.2-1B", "Llama-3-8B", "Llama-2-7b-hf"):
            program = program.replace(f"meta-llama/{name}", str(tiny_models / "llama3.2"))
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    return run


def test_the_basic_quickstart_converts_back(run_snippet: Callable[..., str], tiny_models: Path, tmp_path: Path) -> None:
    printed = run_snippet(BASIC_USAGE, CONVERTING_BACK)
    assert printed.count("Exporting model.") == printed.count("Exported model.") == 38
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "my-fine-tuned-llama").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_models / "llama3.2").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["model.safetensors"]


def test_the_other_quickstarts_run(run_snippet: Callable[..., str]) -> None:
    printed = run_snippet(ADVANCED_LOADING, CHECK_SUPPORTED, STREAMING)
    for line in ("torch.float16", "LlamaForCausalLM", "Model is supported!", "38 kept", "Hidden size: 32"):
        assert line in printed


def test_the_one_call_commands_run(run_snippet: Callable[..., str], tiny_models: Path, tmp_path: Path) -> None:
    run_snippet(IMPORT_CKPT)
    run_snippet(EXPORT_CKPT)
    exported = (tmp_path / "hf_exports/llama32_1b/model.safetensors").read_bytes()
    assert len(exported) > 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_exports/llama32_1b").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_models / "llama3.2").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refuse_misuse(models: str, out: str) -> dict[str, Any]:
    """Every refusal of AutoBridge's own, in one process."""
    from weightcast.bridges import AutoBridge, ModelBridge
    from weightcast.bridges.models.llama import LLAMA
    from weightcast.sync.errors import WeightcastError

    def message(call: Callable[[], Any]) -> str:
        try:
            call()
        except WeightcastError as error:
            return f"{type(error).__name__}: {error}"
        return "not refused"

    gpt2 = GPT2Config(architectures=["GPT2LMHeadModel"], n_embd=8, n_layer=1, n_head=1)
    gpt2.save_pretrained(Path(out, "gpt2"))
    Path(out, "empty").mkdir()
    bare = AutoBridge.from_hf_config(LlamaConfig(architectures=["LlamaForCausalLM"]))
    bridge = AutoBridge.from_hf_pretrained(Path(models, "llama2"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)

    without_norms = ModelBridge("mine", ("LlamaForCausalLM",), lambda hf: LLAMA.rules(hf)[1:], LLAMA.translate)
    mine = AutoBridge.from_hf_pretrained(Path(models, "llama2"), bridges=[without_norms])
    other = AutoBridge.from_hf_pretrained(Path(models, "qwen2"))
    with_norms = AutoBridge.from_hf_pretrained(Path(models, "qwen3"))
    with_biases = AutoBridge.from_hf_pretrained(Path(models, "llama-biases"))
    with_norms.save_megatron_model(with_norms.to_megatron_model(wrap_with_ddp=False), Path(out, "saved"))
    without = AutoBridge.from_hf_pretrained(Path(models, "llama3.1"))
    Path(out, "full").mkdir()
    Path(out, "full", "file").touch()
    Path(out, "cut").mkdir()
    Path(out, "cut", "metadata.json").write_text('{"sharded')
    return {
        "gpt2": message(lambda: AutoBridge.from_hf_pretrained(Path(out, "gpt2"))),
        "can handle": [AutoBridge.can_handle(Path(out, name)) for name in ("gpt2", "empty", "absent/x/y")],
        "supports": [AutoBridge.supports(bridge.hf_config), AutoBridge.supports(gpt2)],
        "empty folder": message(lambda: AutoBridge.from_hf_pretrained(Path(out, "empty"))),
        "no folder": message(lambda: AutoBridge.from_hf_pretrained(Path(out, "absent"))),
        "option": message(lambda: AutoBridge.from_hf_pretrained(Path(models, "llama2"), torch_type="x")),
        "dtype": message(lambda: AutoBridge.from_hf_pretrained(Path(models, "llama2"), torch_dtype="int7")),
        "no weights": message(lambda: bare.to_megatron_provider()),
        "no weights later": message(lambda: bare.load_hf_weights(model)),
        "no rule": message(lambda: mine.load_hf_weights(model)),
        "other model": message(lambda: other.plan(model)),
        "setting": message(lambda: bridge.load_megatron_model(Path(out), tensor_parallel=2)),
        "no checkpoint": message(lambda: bridge.load_megatron_model(Path(out, "gpt2"))),
        "cut checkpoint": message(lambda: bridge.load_megatron_model(Path(out, "cut"))),
        "checkpoint of another shape": message(lambda: bridge.load_megatron_model(Path(out, "saved"))),
        "checkpoint with more": message(lambda: without.load_megatron_model(Path(out, "saved"))),
        "checkpoint with less": message(lambda: with_biases.load_megatron_model(Path(out, "saved"))),
        "full folder": message(lambda: bridge.save_megatron_model(model, Path(out, "full"))),
        "plan of a config": len(bare.from_hf_config(bridge.hf_config).plan(model).specs),
    }


def test_misuse_is_refused_with_a_remedy(tiny_models: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(refuse_misuse, 1, str(tiny_models), str(tmp_path), process_group=False)
    assert said.pop("can handle") == [False] * 3
    assert said.pop("supports") == [True, False]
    assert said.pop("plan of a config") == 39
    expected = {
        "gpt2": "UnsupportedModel: no bridge for the architecture GPT2LMHeadModel; supported are ",
        "empty folder": "has no config.json; give a folder",
        "no folder": "absent is no folder; give a Hugging Face folder",
        "option": "ConfigError: from_hf_pretrained has no option 'torch_type'; it takes torch_dtype",
        "dtype": "ConfigError: dtype 'int7' is none of float32",
        "no weights": "pass load_weights=False, or hf_path",
        "no weights later": "ConfigError: a bridge made by from_hf_config has no weights of its own; pass hf_path",
        "no rule": "UnmappedTensor: no rule fills the HF tensor model.embed_tokens.weight",
        "other model": "UnmappedTensor: ",
        "setting": "ConfigError: the provider has no setting 'tensor_parallel'",
        "no checkpoint": "gpt2 is no Megatron checkpoint; give a folder that save_megatron_model wrote",
        "cut checkpoint": "CheckpointMismatch: " + str(tmp_path / "cut" / "metadata.json is damaged ("),
        "checkpoint of another shape": "linear_proj.weight has shape (32, 32) in the model and (32, 64) in ",
        "checkpoint with more": "_layernorm.weight in ",
        "checkpoint with less": "in the model and does not exist in ",
        "full folder": "full is not empty; give a new folder",
    }
    assert said.keys() == expected.keys()
    for case, text in expected.items():
        assert text in said[case], f"{case}: {said[case]}"


def test_importing_the_package_starts_nothing() -> None:
    program = """
import sys, torch
before = torch.cuda.current_device
import weightcast.bridges
assert "weightcast.bridges.auto" not in sys.modules and "transformers" not in sys.modules
assert torch.cuda.current_device is before and not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
for name in weightcast.bridges.__all__:
    assert getattr(weightcast.bridges, name).__name__ == name, name
assert set(weightcast.bridges.__all__) <= set(dir(weightcast.bridges))
assert torch.cuda.current_device is before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
