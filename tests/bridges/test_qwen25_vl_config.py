"""Qwen2.5-VL: its configuration and rules, the rope, and what is given to a model besides tokens."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.bridges.tiny_qwen25_vl import IMAGE, VIDEO, VL_MODELS, batches
from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, Qwen2_5_VLRotaryEmbedding

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run import plan_layout
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.hf_source import specs_of_config
from weightcast.bridges.layers.mrope import MultimodalRope, rope_index, token_kinds
from weightcast.bridges.layers.vision_inputs import VisionInputs, hidden_positions
from weightcast.sync.errors import ConfigError, UnsupportedModel

# The config.json of Qwen/Qwen2.5-VL-3B-Instruct, from before transformers gave the text a configuration of its own.
PUBLISHED_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def published() -> PretrainedConfig:
    fields = deepcopy(PUBLISHED_3B)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def tiny(name: str = "qwen2.5-vl") -> PretrainedConfig:
    config = VL_MODELS[name]()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def test_the_published_configuration_is_read() -> None:
    provider = AutoBridge.from_hf_config(published()).to_megatron_provider(load_weights=False)
    provider.finalize()
    wanted = {
        "num_layers": 36,
        "kv_channels": 128,
        "rotary_base": 1e6,
        "mrope_section": [16, 24, 24],
        "position_embedding_type": "mrope",
        "share_embeddings_and_output_weights": True,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "vocab_size": 151936,
        "window_size": None,
        "qkv_bias": True,
        "attention_output_bias": False,
        "scatter_embedding_sequence_parallel": False,
    }
    assert {name: getattr(provider, name) for name in wanted} == wanted


def test_the_published_model_can_be_planned() -> None:
    bridge = AutoBridge.from_hf_config(published())
    names = [spec.name for spec in specs_of_config(bridge.hf_config)]
    assert len(names) == 824 and "lm_head.weight" not in names
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    run = plan_layout(bridge, Layout(tensor=4, pipeline=2))
    assert not run.faults and run.num_bytes == 7_509_245_952


def refused_config(change: str) -> PretrainedConfig:
    config = tiny()
    parameters = config.text_config.rope_parameters
    if change == "sections":
        parameters["mrope_section"] = [16, 24, 24]
    elif change == "longrope":
        parameters["rope_type"] = "longrope"
    elif change == "dynamic":
        parameters["rope_type"] = "dynamic"
    elif change == "width":
        config.vision_config.out_hidden_size = 48
    elif change == "awq":
        config.quantization_config = {"quant_method": "awq", "bits": 4}
    elif change == "activation":
        config.text_config.hidden_act = "relu"
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sections", r"mrope_section=\[16, 24, 24\] .* 16 dimensions, which are 8 pairs"),
        ("longrope", "rope_type='longrope' .* default, linear, llama3, yarn"),
        ("dynamic", "rope_type='dynamic' is not supported"),
        ("width", "out_hidden_size=48 .* hidden size is 64"),
        ("awq", "quantization_config"),
        ("activation", "hidden_act='relu'"),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(change: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"Qwen2_5_VLForConditionalGeneration: .*{message}"):
        AutoBridge.from_hf_config(refused_config(change)).to_megatron_provider(load_weights=False)
    assert AutoBridge.explain(tiny()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_parallel_size": 2}, "images would have to be cut as their tokens are"),
        ({"scatter_embedding_sequence_parallel": True}, "before images are in their places"),
        ({"mrope_section": [2, 2, 2]}, "names 6 pairs, and a head has 16 dimensions"),
        ({"mrope_section": None}, "take the provider from AutoBridge"),
    ],
)
def test_settings_that_a_model_that_sees_cannot_have_are_refused(settings: dict[str, Any], message: str) -> None:
    provider = AutoBridge.from_hf_config(tiny()).to_megatron_provider(load_weights=False)
    for name, value in settings.items():
        setattr(provider, name, value)
    with pytest.raises(ConfigError, match=message):
        provider.finalize()


@pytest.mark.parametrize("name", VL_MODELS)
def test_angles_are_those_of_transformers(name: str) -> None:
    config = tiny(name)
    provider: Any = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    positions = torch.randint(0, 60, (3, 2, 11), generator=torch.Generator().manual_seed(1))
    rope = provider.rope()
    angles = MultimodalRope(rope, provider.kv_channels, provider.mrope_section)(positions)
    cosines, sines = Qwen2_5_VLRotaryEmbedding(config.text_config)(torch.zeros(1), positions)
    assert angles.shape == (11, 2, 1, 16)
    assert torch.equal(angles.cos()[:, :, 0].transpose(0, 1) * rope.attention_factor, cosines)
    assert torch.equal(angles.sin()[:, :, 0].transpose(0, 1) * rope.attention_factor, sines)


@pytest.mark.parametrize("case", ["images", "image", "video"])
def test_positions_are_those_of_transformers(case: str) -> None:
    config, batch = tiny(), batches()[case]
    inputs = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    tokens = inputs["input_ids"]
    kinds = (tokens == IMAGE) * 1 + (tokens == VIDEO) * 2
    assert torch.equal(token_kinds(config, tokens), kinds)
    wanted = model.get_rope_index(mm_token_type_ids=kinds, **inputs)[0]
    assert torch.equal(rope_index(config, **inputs), wanted)


def test_text_alone_is_counted() -> None:
    positions = rope_index(tiny(), torch.zeros(2, 4, dtype=torch.long))
    assert positions.tolist() == [[[0, 1, 2, 3]] * 2] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_grid_thw": [[1, 4, 4]]}, "there are 0 image tokens .* makes 4"),
        ({"video_grid_thw": [[2, 2, 2]]}, r"there are 3 video tokens \(id 141\) and video_grid_thw makes 2"),
        ({}, "there are 3 video tokens .* makes 0"),
        ({"pixel_values": [[0.0]]}, "image pixels came without image_grid_thw"),
    ],
)
def test_vision_inputs_that_do_not_match_are_refused(given: dict[str, Any], message: str) -> None:
    inputs = VisionInputs(**{name: torch.tensor(value) for name, value in given.items()})
    with pytest.raises(ConfigError, match=message):
        inputs.check(tiny(), torch.tensor([[5, VIDEO, VIDEO, VIDEO]]), positions_given=False)
    # With positions of one's own, tokens that look like a video's are tokens.
    VisionInputs().check(tiny(), torch.tensor([[5, VIDEO]]), positions_given=True)


def test_padding_hides_keys_only_where_it_is_in_front() -> None:
    assert hidden_positions(torch.tensor([[1, 1, 1], [1, 0, 0]])) is None
    hidden = hidden_positions(torch.tensor([[1, 1, 1], [0, 0, 1]]))
    assert hidden is not None and hidden.shape == (2, 1, 3, 3) and not hidden[0].any()
    assert hidden[1, 0].tolist() == [[False, True, False], [True, False, False], [True, True, False]]
