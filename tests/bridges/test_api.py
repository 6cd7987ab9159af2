"""AutoBridge against the documents that it follows: every method and argument, by name, and every shape of a call.

`test_auto.py` runs the documents' programs as they stand; this is their table, argument by argument.
"""

import ast
import errno
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.tiny_mla import MLA_MODELS
from tests.ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from weightcast.bridges import AutoBridge
from weightcast.sync.errors import ConfigError

# The API reference of the documents, `self` left out as there.
METHODS = """
from_hf_pretrained(path: str | Path, **kwargs) -> AutoBridge
from_hf_config(config: PretrainedConfig) -> AutoBridge
can_handle(path: str | Path, trust_remote_code: bool = False) -> bool
list_supported_models() -> list[str]
supports(config: Any) -> bool
import_ckpt(hf_model_id: str | Path, megatron_path: str | Path, **kwargs) -> None
to_megatron_provider(load_weights: bool = True, hf_path: str | Path | None = None) -> GPTModelProvider
to_megatron_model(load_weights: bool = True, hf_path: str | Path | None = None, **kwargs) -> list[MegatronModule]
load_hf_weights(model: list[MegatronModule], hf_path: str | Path | None = None) -> None
export_hf_weights(model: list[MegatronModule], cpu: bool = False, show_progress: bool = True, \
conversion_tasks: list[WeightConversionTask] | None = None) -> Iterable[HFWeightTuple]
save_hf_pretrained(model: list[MegatronModule], path: str | Path, show_progress: bool = True) -> None
save_hf_weights(model: list[MegatronModule], path: str | Path, show_progress: bool = True) -> None
save_megatron_model(model: list[MegatronModule], path: str | Path) -> None
load_megatron_model(path: str | Path, **kwargs) -> list[MegatronModule]
export_ckpt(megatron_path: str | Path, hf_path: str | Path, show_progress: bool = True) -> None
get_conversion_tasks(megatron_model: MegatronModule | list[MegatronModule], hf_path: str | Path | None = None) \
-> list[WeightConversionTask]
"""
ON_THE_CLASS = (
    "from_hf_pretrained",
    "from_hf_config",
    "can_handle",
    "list_supported_models",
    "supports",
    "import_ckpt",
)
PROPERTIES = ("transformer_config", "mla_transformer_config")
LINES = [line for line in METHODS.splitlines() if line]
NUM_TENSORS = 38  # of the tiny Llama 3.2, whose embedding is tied


def documented(line: str) -> list[tuple[str, str, Any]]:
    """Name, kind and default of each documented parameter."""
    (function,) = ast.parse(f"def {line}: ...").body
    assert isinstance(function, ast.FunctionDef)
    named = function.args.args
    defaults = [inspect.Parameter.empty] * (len(named) - len(function.args.defaults))
    defaults += [ast.literal_eval(node) for node in function.args.defaults]
    parameters = [
        (argument.arg, "POSITIONAL_OR_KEYWORD", value) for argument, value in zip(named, defaults, strict=True)
    ]
    if function.args.kwarg is not None:
        parameters.append((function.args.kwarg.arg, "VAR_KEYWORD", inspect.Parameter.empty))
    return parameters


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition("(")[0])
def test_a_method_takes_what_is_documented(line: str) -> None:
    name = line.partition("(")[0]
    ours = list(inspect.signature(getattr(AutoBridge, name)).parameters.values())
    on_the_class = isinstance(inspect.getattr_static(AutoBridge, name), classmethod)
    assert on_the_class == (name in ON_THE_CLASS)
    if not on_the_class:
        assert ours.pop(0).name == "self"
    more = [parameter.name for parameter in ours if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.kind.name, p.default) for p in ours if p.name not in more] == documented(line)
    assert all(parameter.default is not inspect.Parameter.empty for parameter in ours if parameter.name in more)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_configuration_is_a_property(name: str) -> None:
    assert isinstance(inspect.getattr_static(AutoBridge, name), property)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def provide(models: str, out: str) -> dict[str, Any]:
    """Providers and models, with the settings of the documents."""
    from megatron.core.transformer.module import MegatronModule

    from weightcast.bridges import AutoBridge, GPTModelProvider

    folder = Path(models, "llama3.2")
    bridge = AutoBridge.from_hf_pretrained(
        str(folder), torch_dtype=torch.float16, device_map="auto", trust_remote_code=True
    )
    provider = bridge.to_megatron_provider()
    assert isinstance(provider, GPTModelProvider)
    provider.tensor_model_parallel_size = 1
    provider.pipeline_model_parallel_size = 1
    provider.bias_activation_fusion = True
    provider.bias_dropout_fusion = True
    provider.finalize()
    half = provider.provide_distributed_model(wrap_with_ddp=False)
    tokens = torch.arange(7)[None]
    positions = tokens.clone()
    logits = half[0](tokens, positions, attention_mask=None)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)(tokens).logits

    other = {name: tensor + 1 for name, tensor in stored(folder).items()}
    shifted = write_copy(folder, Path(out, "shifted"), other)
    from_path = AutoBridge.from_hf_pretrained(folder)
    model = from_path.to_megatron_model(load_weights=True, hf_path=shifted, wrap_with_ddp=False)
    hook = from_path.to_megatron_provider(True, str(shifted)).provide_distributed_model(wrap_with_ddp=False)
    empty = AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder))
    random = empty.to_megatron_model(load_weights=False, wrap_with_ddp=False)
    before = dict(from_path.export_hf_weights(random))
    from_path.load_hf_weights(random)
    own = dict(from_path.export_hf_weights(random))
    empty.load_hf_weights(model=random, hf_path=str(shifted))
    return {
        "fp16": {str(parameter.dtype) for chunk in half for parameter in chunk.parameters()} == {"torch.float16"},
        "logits": (logits[..., :131] - theirs).abs().max().item(),
        "modules": all(isinstance(chunk, MegatronModule) for chunk in (*half, *model, *hook, *random)),
        "hf_path": [equal(dict(from_path.export_hf_weights(built)), other) for built in (model, hook, random)],
        "own": equal(own, stored(folder)),
        "random": equal(before, stored(folder)),
        "sizes": [provider.seq_length, provider.vocab_size],
    }


def write_copy(source: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_providers_and_models(tiny_models: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(provide, 1, str(tiny_models), str(tmp_path), process_group=False)
    assert said.pop("logits") <= 5e-3  # both in fp16; 5e-4 was seen
    assert said == {
        "fp16": True,
        "modules": True,
        "hf_path": [True] * 3,
        "own": True,
        "random": False,
        "sizes": [16384, 131],
    }


def convert(models: str, out: str) -> dict[str, Any]:
    """Exports, tasks, saved folders and checkpoints, with every documented argument."""
    from weightcast.bridges import AutoBridge, HFWeightTuple, WeightConversionTask

    folder = Path(models, "llama3.2")
    weights = stored(folder)
    bridge = AutoBridge.from_hf_pretrained(path=folder)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    items = list(bridge.export_hf_weights(model, cpu=True))
    name, weight = items[0]
    exports = [
        bridge.export_hf_weights(model),
        bridge.export_hf_weights(model, cpu=True),
        bridge.export_hf_weights(model, show_progress=False),
        bridge.export_hf_weights(model, True, False, None),
    ]
    tasks = bridge.get_conversion_tasks(model)
    chosen = [task for task in tasks if task.global_param_name.endswith("linear_qkv.weight")][:1]
    some = bridge.export_hf_weights(model, conversion_tasks=chosen)
    of_one = bridge.get_conversion_tasks(model[0], hf_path=str(folder))
    bridge.save_hf_pretrained(model, str(Path(out, "whole")), show_progress=False)
    bridge.save_hf_pretrained(model, Path(out, "whole again"))
    bridge.save_hf_weights(model, str(Path(out, "weights")), show_progress=False)
    bridge.save_hf_weights(model, Path(out, "weights again"), True)
    bridge.save_megatron_model(model, str(Path(out, "megatron")))
    loaded = [bridge.load_megatron_model(at(Path(out, "megatron")), wrap_with_ddp=False) for at in (str, Path)]
    AutoBridge.import_ckpt(hf_model_id=str(folder), megatron_path=str(Path(out, "imported")), trust_remote_code=True)
    AutoBridge.import_ckpt(folder, Path(out, "imported again"))
    bare = AutoBridge.from_hf_config(AutoConfig.from_pretrained(folder))
    bare.export_ckpt(str(Path(out, "imported")), str(Path(out, "exported")))
    bridge.export_ckpt(
        megatron_path=Path(out, "imported again"), hf_path=Path(out, "exported again"), show_progress=False
    )
    folders = [Path(out, kind + again) for kind in ("whole", "weights", "exported") for again in ("", " again")]
    return {
        "items": isinstance(items[0], HFWeightTuple) and (name, weight) == items[0],
        "exports": [equal(dict(export), weights) for export in exports],
        "some": [name.removeprefix("model.layers.0.self_attn.") for name, _ in some],
        "tasks": all(isinstance(task, WeightConversionTask) for task in tasks),
        "of one": [task.hf_names for task in tasks] == [task.hf_names for task in of_one],
        "folders": [equal(stored(saved), weights) for saved in folders],
        "files": sorted(path.name for path in Path(out, "weights").iterdir()),
        "loaded": [equal(dict(bridge.export_hf_weights(one)), weights) for one in loaded],
    }


def test_conversions(tiny_models: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(convert, 1, str(tiny_models), str(tmp_path), process_group=False)
    assert said == {
        "items": True,
        "exports": [True] * 4,
        "some": ["k_proj.weight", "q_proj.weight", "v_proj.weight"],
        "tasks": True,
        "of one": True,
        "folders": [True] * 6,
        "files": ["model.safetensors"],
        "loaded": [True] * 2,
    }
    for saved in ("whole", "whole again", "exported", "exported again"):
        assert AutoConfig.from_pretrained(tmp_path / saved).architectures == ["LlamaForCausalLM"]
    assert (tmp_path / "whole" / "tokenizer.json").is_file()


def draw(models: str) -> list[int]:
    """Export on a terminal with and without `show_progress`; how many bytes were drawn each time."""
    from weightcast.bridges import AutoBridge

    os.environ["TERM"] = "xterm"
    bridge = AutoBridge.from_hf_pretrained(Path(models, "llama3.2"))
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    counts = []
    log = os.dup(sys.stderr.fileno())
    for show_progress in (True, False):
        reader, terminal = os.openpty()
        os.dup2(terminal, sys.stderr.fileno())
        os.close(terminal)
        assert len(list(bridge.export_hf_weights(model, show_progress=show_progress))) == NUM_TENSORS
        os.dup2(log, sys.stderr.fileno())
        counts.append(len(read_all(reader)))
    return counts


def read_all(terminal: int) -> bytes:
    """What was written to a terminal that nobody writes to any more."""
    parts: list[bytes] = []
    try:
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    except OSError as error:
        if error.errno != errno.EIO:  # how Linux ends it
            raise
    return b"".join(parts)


def test_progress_is_drawn_where_it_is_asked_for(tiny_models: Path) -> None:
    ((shown, hidden),) = run_ranks(draw, 1, str(tiny_models), process_group=False)
    assert shown > 0 and hidden == 0


def test_capabilities_and_configurations(tiny_models: Path) -> None:
    folder = tiny_models / "qwen3"
    names = AutoBridge.list_supported_models()
    assert names == sorted(names) and {type(name) for name in names} == {str}
    assert AutoBridge.can_handle(str(folder)) and AutoBridge.can_handle(path=folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder)
    assert AutoBridge.supports(config) and AutoBridge.supports(config=config)
    assert not AutoBridge.supports(None) and not AutoBridge.supports({"architectures": config.architectures})
    bridge = AutoBridge.from_hf_config(config)
    assert bridge.transformer_config.hidden_size == config.hidden_size
    with pytest.raises(ConfigError, match="use transformer_config, which is for every model"):
        _ = bridge.mla_transformer_config


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_the_configuration_of_latent_attention(name: str) -> None:
    from megatron.core.transformer import MLATransformerConfig

    config = MLA_MODELS[name]()
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    found = AutoBridge.from_hf_config(config).mla_transformer_config
    assert isinstance(found, MLATransformerConfig)
    assert (found.kv_lora_rank, found.qk_head_dim) == (config.kv_lora_rank, config.qk_nope_head_dim)
