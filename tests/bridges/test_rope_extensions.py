"""YaRN and LongRoPE: the frequencies and the attention factor of transformers, for numbers drawn at random."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from weightcast.bridges.layers.rope import LongRope, Yarn, inverse_frequencies
from weightcast.bridges.models.registry import find_bridge
from weightcast.sync.errors import ConfigError


def translated(hf: PretrainedConfig, architecture: str) -> Any:
    """The provider for a configuration as transformers reads it from config.json."""
    hf.architectures = [architecture]
    return find_bridge(hf).translate(hf)


LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 4096}


@given(
    theta=st.sampled_from([300.0, 10000.0, 1e6]),
    factor=st.sampled_from([None, 1.0, 4.0, 40.0]),
    original=st.sampled_from([64, 1024, 32768]),
    betas=st.sampled_from([(None, None), (32.0, 1.0), (8.0, 2.0)]),
    mscales=st.sampled_from([(None, None), (0.7, 1.4), (1.0, 0.0)]),
    attention_factor=st.sampled_from([None, 0.8, 1.3]),
    truncate=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_yarn_is_that_of_transformers(
    theta: float,
    factor: float | None,
    original: int,
    betas: tuple[float | None, float | None],
    mscales: tuple[float | None, float | None],
    attention_factor: float | None,
    truncate: bool,
) -> None:
    hf = LlamaConfig(**LLAMA, head_dim=32)
    hf.rope_parameters = {
        **{"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original},
        **{"beta_fast": betas[0], "beta_slow": betas[1], "mscale": mscales[0], "mscale_all_dim": mscales[1]},
        **{"attention_factor": attention_factor, "truncate": truncate},
    }
    rope = translated(hf, "LlamaForCausalLM").rope()
    frequencies, scaling = ROPE_INIT_FUNCTIONS["yarn"](hf)
    torch.testing.assert_close(inverse_frequencies(rope, 32), frequencies, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(scaling, rel=1e-12)


@given(
    share=st.sampled_from([0.5, 0.75, 1.0]),
    factor=st.sampled_from([None, 0.5, 32.0]),
    attention_factor=st.sampled_from([None, 1.19]),
    length=st.sampled_from([1, 1024, 1025, 4096]),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_longrope_is_that_of_transformers(
    share: float, factor: float | None, attention_factor: float | None, length: int, data: st.DataObject
) -> None:
    num_pairs = int(16 * share) // 2
    divisors = st.lists(st.floats(1.0, 64.0), min_size=num_pairs, max_size=num_pairs)
    parameters = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": share},
        **{"short_factor": data.draw(divisors), "long_factor": data.draw(divisors)},
        **{"factor": factor, "attention_factor": attention_factor},
    }
    hf = Phi3Config(**LLAMA, pad_token_id=0, rope_parameters=parameters, original_max_position_embeddings=1024)
    rope = translated(hf, "Phi3ForCausalLM").rope()
    frequencies, scaling = ROPE_INIT_FUNCTIONS["longrope"](hf, seq_len=length)
    torch.testing.assert_close(inverse_frequencies(rope, 16, length), frequencies, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_megatron_is_told_the_attention_factor(factor: float) -> None:
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as megatron

    p = translated(LlamaConfig(**LLAMA), "LlamaForCausalLM")
    p.rope_extension, p.apply_rope_fusion = Yarn(4.0, 1024, attention_factor=factor), True
    p.finalize()
    assert megatron._yarn_get_concentration_factor_from_config(p) == pytest.approx(factor, rel=1e-12)
    assert not p.apply_rope_fusion
    p.rope_extension = None
    p.finalize()
    assert megatron._yarn_get_concentration_factor_from_config(p) == 1.0


def test_two_scalings_at_once_are_refused() -> None:
    p = translated(LlamaConfig(**LLAMA), "LlamaForCausalLM")
    p.rope_extension, p.seq_len_interpolation_factor = LongRope((1.0,), (2.0,), 1024, 1.0), 2.0
    with pytest.raises(ConfigError, match="exclude each other; set only one"):
        p.finalize()
    p.seq_len_interpolation_factor, p.rotary_base_local = None, 10000.0
    with pytest.raises(ConfigError, match="a rope of their own; unset one"):
        p.finalize()
