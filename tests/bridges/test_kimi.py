"""Kimi K2 and Moonlight: DeepSeek V3's architecture, published with code of their own that nothing here runs.

Kimi K2's config.json also names a model type that transformers does not have.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.test_mla import write_in_fp8
from tests.bridges.test_mla_config import KIMI_K2, MOONLIGHT
from tests.bridges.tiny_mla import make_mla_model
from tests.ranks import run_ranks
from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run import plan_layout
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.hf_config import SAME_FIELDS, read_config
from weightcast.bridges.standalone_inputs import open_bridge
from weightcast.sync.errors import ConfigError

# What the published folders add to V3's fields.
AUTO_MAP = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
PUBLISHED: dict[str, dict[str, Any]] = {
    "kimi-k2": KIMI_K2 | {"model_type": "kimi_k2", "auto_map": AUTO_MAP, "quantization_config": FP8},
    "moonlight": MOONLIGHT | {"model_type": "deepseek_v3", "auto_map": AUTO_MAP},
}
# Code that must never run, and a tokenizer that comes with code.
FILES = {
    "configuration_deepseek.py": "raise AssertionError('remote code ran')\n",
    "modeling_deepseek.py": "raise AssertionError('remote code ran')\n",
    "tokenization_kimi.py": "raise AssertionError('remote code ran')\n",
    "tiktoken.model": "IQ== 0\n",
    "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", null]}}',
    "generation_config.json": '{"eos_token_id": 163586}',
}


def write_folder(folder: Path, fields: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_folder_needs_no_code_of_its_own(model: str, trust_remote_code: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / model, PUBLISHED[model])
    bridge = AutoBridge.from_hf_pretrained(folder, trust_remote_code=trust_remote_code)
    assert AutoBridge.can_handle(folder, trust_remote_code) and AutoBridge.explain(bridge.hf_config) is None
    assert type(bridge.hf_config) is DeepseekV3Config and bridge.family.family == "deepseek-v3"
    assert bridge.hf_config.architectures[0] in AutoBridge.list_supported_models()
    provider = bridge.to_megatron_provider(load_weights=False)
    assert provider.num_moe_experts == PUBLISHED[model]["n_routed_experts"] and provider.mtp_num_layers is None


class RemoteConfig(PretrainedConfig):  # type: ignore[misc]
    """What a repository's own code makes of Kimi K2's config.json."""

    model_type = "kimi_k2"
    max_position_embeddings: int = 4096
    rope_parameters: Any = None


def test_a_configuration_of_remote_code_is_read_by_its_fields() -> None:
    bridge = AutoBridge.from_hf_config(RemoteConfig(**PUBLISHED["kimi-k2"]))
    assert type(bridge.hf_config) is DeepseekV3Config and len(bridge.hf_specs()) > 60 * 384 * 3
    assert AutoBridge.explain(RemoteConfig(**PUBLISHED["kimi-k2"] | {"topk_method": "greedy"})) is not None
    own = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert AutoBridge.from_hf_config(own).hf_config is own


def test_other_types_with_code_of_their_own_are_refused_unless_trusted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "other", PUBLISHED["kimi-k2"] | {"model_type": "of_my_own"})
    assert not AutoBridge.can_handle(folder)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        AutoBridge.from_hf_pretrained(folder)
    with pytest.raises(AssertionError, match="remote code ran"):
        read_config(folder, trust_remote_code=True)


def test_same_fields_means_no_more_than_needed() -> None:
    """A type that transformers comes to know is read by its own class then."""
    from transformers import CONFIG_MAPPING

    assert all(alias not in CONFIG_MAPPING and kind in CONFIG_MAPPING for alias, kind in SAME_FIELDS.items())


def test_a_dry_run_takes_the_config_json_alone(tmp_path: Path) -> None:
    fields = PUBLISHED["kimi-k2"] | {"num_hidden_layers": 4}
    config = write_folder(tmp_path / "k2", fields) / "config.json"
    run = plan_layout(open_bridge(config), Layout(pipeline=2, expert=2))
    assert not run.faults and len(run.ranks) == 4
    # A dense layer and three with 384 experts, of which no rank has more than half.
    assert run.num_tensors == 3 + (4 * 9) + 3 + 3 * (384 * 3 + 2 + 3)
    assert max(plan.held_bytes for plan in run.ranks) < run.num_bytes * 0.45


def convert(folder: str, plain: str, out: str) -> list[float]:
    """Import the coded folder and export it; the largest difference of logits from those of the plain weights."""
    from tests.bridges import parity_job
    from transformers import AutoModelForCausalLM

    bridge = AutoBridge.from_hf_pretrained(folder, torch_dtype="float32")
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    bridge.save_hf_pretrained(model, out, show_progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = parity_job.run_schedule(
            parity_job.logits_step, [chunk.eval() for chunk in model], forward_only=True, collect_non_loss_data=True
        )
        wanted = theirs(parity_job.tokens()[:, :-1]).logits
    return [(torch.cat(outputs)[..., : wanted.shape[-1]] - wanted).abs().max().item()]


@pytest.mark.slow
def test_an_export_is_the_folder_as_published_with_weights_in_the_models_dtype(tmp_path: Path) -> None:
    model = make_mla_model("kimi-k2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    coded = write_in_fp8(tmp_path / "plain", tmp_path / "coded")
    fields = json.loads((coded / "config.json").read_text())
    fields |= {"model_type": "kimi_k2", "auto_map": AUTO_MAP, "quantization_config": FP8, "unknown_to_all": [1, None]}
    write_folder(coded, fields)

    weights = AutoBridge.from_hf_pretrained(coded).hf_checkpoint()
    plain = save_decoded(weights, tmp_path / "plain", tmp_path / "decoded")
    ((difference,),) = run_ranks(convert, 1, str(coded), str(plain), str(tmp_path / "out"))
    assert difference <= 2e-5
    del fields["quantization_config"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == fields
    assert {name: (tmp_path / "out" / name).read_text() for name in FILES} == FILES


def save_decoded(weights: Any, plain: Path, out: Path) -> Path:
    """`plain` with the weights that the codes stand for, under a type that transformers knows."""
    from safetensors.torch import save_file

    out.mkdir()
    with weights.reader() as reader:
        tensors = {spec.name: reader.read(spec.whole()) for spec in weights.specs}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((plain / "config.json").read_text())
    return out
