"""Norms, core attention and ropes of the layers without Transformer Engine, against plain formulas and transformers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from weightcast.bridges.layers.context_parallel import positions_of_all, positions_of_rank
from weightcast.bridges.layers.core_attention import SdpaAttention, allowed_positions
from weightcast.bridges.layers.gpt import mask_padding, scale_output
from weightcast.bridges.layers.linears import with_bias, with_post_norm
from weightcast.bridges.layers.norms import LayerNorm, RMSNorm
from weightcast.bridges.layers.rope import Rope, RopeEmbedding, RopePerKindOfLayer, inverse_frequencies
from weightcast.sync.errors import ConfigError

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.transformer import TransformerConfig  # isort: skip
from megatron.core.transformer.enums import AttnMaskType  # isort: skip


# What a CUDA graph captures, under its newer or its older name; Megatron warns of its own default.
WHOLE_GRAPHS = "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope"


def config(**settings: Any) -> Any:
    """A Megatron config of one small layer."""
    sizes: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
    }
    return TransformerConfig(**sizes | {WHOLE_GRAPHS: []} | settings)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("hf_class, zero_centered", [(LlamaRMSNorm, False), (Gemma3RMSNorm, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(hf_class: Any, zero_centered: bool, dtype: torch.dtype) -> None:
    ours = RMSNorm(config(layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype), 32, eps=1e-6)
    theirs = hf_class(32, eps=1e-6).to(dtype)
    x = (random(5, 3, 32) * 3).to(dtype)
    assert torch.equal(ours.weight, theirs.weight), "the start value has no effect"
    with torch.no_grad():
        ours.weight.add_(random(32).to(dtype))
        theirs.weight.copy_(ours.weight)
    # In bf16 Llama rounds before the weight is applied and this norm after it: one unit in the last place.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
    assert ours(x).dtype == dtype


def test_layer_norm_is_that_of_torch() -> None:
    ours, theirs = LayerNorm(config(), 32, eps=1e-5), torch.nn.LayerNorm(32, eps=1e-5)
    with torch.no_grad():
        theirs.weight.copy_(random(32))
        theirs.bias.copy_(random(1, 32)[0])
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(random(5, 3, 32)), theirs(random(5, 3, 32)))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_gradients_of_norms_are_marked_for_summation_under_sequence_parallelism(norm: Any) -> None:
    for sequence_parallel in (False, True):
        sizes = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
        module = norm(config(sequence_parallel=sequence_parallel, **sizes), 32)
        assert all(parameter.sequence_parallel is sequence_parallel for parameter in module.parameters())


@given(
    num_queries=st.integers(1, 6),
    num_earlier=st.integers(0, 4),
    left=st.integers(-1, 7),
    right=st.integers(-1, 3),
    causal=st.booleans(),
)
def test_a_query_sees_what_the_window_says(
    num_queries: int, num_earlier: int, left: int, right: int, causal: bool
) -> None:
    num_keys = num_queries + num_earlier
    seen = allowed_positions(num_queries, num_keys, (left, right), causal, torch.device("cpu"))
    for query in range(num_queries):
        at = query + num_earlier
        for key in range(num_keys):
            expected = (not causal or key <= at) and (left < 0 or key >= at - left) and (right < 0 or key <= at + right)
            assert bool(seen[query, key]) is expected


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention written out; seen is broadcastable to [batch, heads, queries, keys]."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)


def attention(
    layer_number: int = 1, channels: dict[str, Any] | None = None, pg_collection: Any = None, **settings: Any
) -> SdpaAttention:
    scale = settings.get("softmax_scale")
    return SdpaAttention(
        config(attention_dropout=0.0, **settings),
        layer_number,
        AttnMaskType.causal,
        "self",
        softmax_scale=scale,
        pg_collection=pg_collection,
        **(channels or {}),
    )


@pytest.mark.parametrize("num_earlier", [0, 3])
@pytest.mark.parametrize("layer_number, window", [(1, (4, 0)), (2, None)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_is_softmax_attention(
    num_earlier: int, layer_number: int, window: tuple[int, int] | None, scale: float | None
) -> None:
    module = attention(layer_number, window_size=(4, 0), window_attn_skip_freq=[1, 0, 1, 1], softmax_scale=scale)
    q, k, v = random(9, 2, 4, 8), random(9 + num_earlier, 2, 2, 8), random(9 + num_earlier, 2, 2, 8) + 1
    seen = allowed_positions(9, 9 + num_earlier, window, True, torch.device("cpu"))
    expected = plain_attention(q, k, v, seen, scale if scale is not None else 8**-0.5)
    torch.testing.assert_close(module(q, k, v, None), expected, rtol=0, atol=2e-6)


def test_a_given_mask_is_applied_on_top_of_the_causal_one() -> None:
    q, k, v = random(6, 2, 4, 8), random(6, 2, 2, 8), random(6, 2, 2, 8) + 1
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]])
    other_document = (document[:, :, None] != document[:, None, :])[:, None]
    seen = ~other_document & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = plain_attention(q, k, v, seen, 8**-0.5)
    torch.testing.assert_close(attention()(q, k, v, other_document), expected, rtol=0, atol=2e-6)


def test_keys_and_values_may_have_different_channels() -> None:
    q, k, v = random(6, 2, 4, 12), random(6, 2, 4, 12), random(6, 2, 4, 8)
    module = attention(channels={"k_channels": 12, "v_channels": 8})
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(module(q, k, v, None), plain_attention(q, k, v, seen, 12**-0.5), rtol=0, atol=2e-6)


def test_what_attention_does_not_compute_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"softmax_type='off-by-one'.*'vanilla'"):
        attention(softmax_type="off-by-one")
    q = random(6, 2, 4, 8)
    with pytest.raises(ConfigError, match=r"attention bias.*mask"):
        attention()(q, q[:, :, :2], q[:, :, :2], None, attention_bias=q)


def packed(bounds: list[int], **changed: Any) -> PackedSeqParams:
    boundaries = torch.tensor(bounds, dtype=torch.int32)
    given = {"qkv_format": "thd", "cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries} | changed
    return PackedSeqParams(**given)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, (2, 0)])
@pytest.mark.parametrize("bounds", [[0, 7], [0, 3, 7], [0, 1, 2, 6, 7]])
def test_packed_sequences_see_themselves_alone(
    bounds: list[int], window: tuple[int, int] | None, softcap: float | None
) -> None:
    """The same output and gradients as with a mask over the whole that parts them."""
    module = attention(window_size=window)
    module.softcap = softcap
    results = []
    for is_packed in (True, False):
        q, k, v = (part.requires_grad_() for part in (random(7, 1, 4, 8), random(7, 1, 2, 8), random(7, 1, 2, 8)))
        document = torch.bucketize(torch.arange(7), torch.tensor(bounds[1:]), right=True)
        if is_packed:
            out = module(q.squeeze(1), k.squeeze(1), v.squeeze(1), None, packed_seq_params=packed(bounds))
        else:
            out = module(q, k, v, (document[:, None] != document[None, :])[None, None])
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (packed([0, 3, 6]), "goes from 0 to 6, and there are 7 tokens"),
        (packed([0, 7], qkv_format="sbhd"), "of the format thd"),
        (packed([0, 7], cu_seqlens_kv=torch.tensor([0, 3, 7])), "padding between them"),
        (packed([0, 7], cu_seqlens_q_padded=torch.tensor([0, 8])), "padding between them"),
    ],
)
def test_packing_that_attention_does_not_compute_is_refused(params: PackedSeqParams, message: str) -> None:
    q = random(7, 4, 8)
    with pytest.raises(ConfigError, match=message):
        attention()(q, q[:, :2], q[:, :2], None, packed_seq_params=params)


class _Group:
    """A context parallel group's size and this rank's place in it."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def test_a_context_parallel_rank_has_a_chunk_from_either_end_of_the_sequence() -> None:
    ranks = [positions_of_rank(4, rank, 3).tolist() for rank in range(3)]
    assert ranks == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert positions_of_all(4, 3).tolist() == [*ranks[0], *ranks[1], *ranks[2]]
    with pytest.raises(ConfigError, match=r"with 5 tokens on each of 3 .* multiple of 6 tokens"):
        positions_of_rank(5, 0, 3)


def test_there_is_no_generation_under_context_parallelism() -> None:
    module = attention(context_parallel_size=2, pg_collection=SimpleNamespace(cp=_Group(2, 0)))
    with pytest.raises(ConfigError, match=r"1 queries over 6 cached keys: .* context_parallel_size=1"):
        module(random(1, 2, 4, 8), random(6, 2, 2, 8), random(6, 2, 2, 8), None)


@settings(deadline=None)
@given(
    base=st.floats(10.0, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    above_low=st.floats(0.5, 8.0),
    original=st.sampled_from([32, 512, 8192]),
    kind=st.sampled_from(["default", "linear", "llama3"]),
)
def test_frequencies_are_those_of_transformers(
    base: float, factor: float, low: float, above_low: float, original: int, kind: Any
) -> None:
    numbers: dict[str, Any] = {"factor": factor, "low_freq_factor": low, "high_freq_factor": low + above_low}
    parameters = {"rope_type": kind, "rope_theta": base, **numbers, "original_max_position_embeddings": original}
    hf = LlamaConfig(head_dim=16, max_position_embeddings=65536)
    hf.rope_parameters = parameters
    ours = inverse_frequencies(Rope(base, 1.0, kind, **numbers, original_max_position_embeddings=original), 16)
    if kind == "default":
        assert torch.equal(ours, 1.0 / (base ** (torch.arange(0, 16, 2, dtype=torch.int64).float() / 16)))
    else:
        assert torch.equal(ours, ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))[0])


def test_part_of_a_head_is_rotated() -> None:
    assert inverse_frequencies(Rope(100.0, percent=0.5), 16).shape == (4,)


def test_each_kind_of_layer_has_its_own_table() -> None:
    full, local = Rope(1e6, 1.0, "linear", 8.0), Rope(1e4)
    both = RopePerKindOfLayer(full, local, 16)
    both.inv_freq = both.inv_freq.to("cpu")
    angles = [torch.outer(torch.arange(10.0), inverse_frequencies(rope, 16)) for rope in (full, local)]
    frequencies = [module.get_freqs_non_repeated(10) for module in (both, both.local)]
    for got, expected in zip(frequencies, angles, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert isinstance(both.local, RopeEmbedding)


class Linear(torch.nn.Linear):
    """A linear with the constructor and the return values of Megatron's parallel ones."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool) -> None:
        super().__init__(input_size, output_size, bias=bias)
        self.output_size_per_partition = output_size

    def forward(self, x: torch.Tensor) -> Any:
        return torch.nn.functional.linear(x, self.weight), self.bias


def test_a_bias_can_be_forced_by_place() -> None:
    assert with_bias(Linear, False)(4, 4, config=None, bias=True).bias is None
    assert with_bias(Linear, True)(4, 4, config=None, bias=False).bias is not None


def test_a_norm_behind_a_linear_comes_after_its_bias() -> None:
    module: Any = with_post_norm(Linear, RMSNorm)(6, 32, config=config(), bias=True)
    x = random(5, 6)
    output, bias = module(x)
    expected = module.post_layernorm(torch.nn.functional.linear(x, module.weight, module.bias))
    assert bias is None and torch.equal(output, expected)
    assert "post_layernorm.weight" in module.state_dict()


@pytest.mark.parametrize("rank, num_padding", [(0, 0), (1, 3)])
def test_padding_tokens_have_no_probability(rank: int, num_padding: int) -> None:
    layer = Linear(4, 8, config=None, bias=False)
    mask_padding(layer, vocab_size=13, rank=rank)
    logits = layer(random(2, 4))[0]
    assert (logits.softmax(-1) == 0).sum().item() == 2 * num_padding
    logits.exp().sum().backward()
    untouched = layer.weight.grad.abs().sum(-1) == 0 if layer.weight.grad is not None else torch.zeros(8)
    assert untouched.sum().item() == num_padding


def test_embeddings_are_scaled_with_the_rounded_factor() -> None:
    module = torch.nn.Embedding(3, 4, dtype=torch.bfloat16)
    tokens = torch.tensor([0, 2])
    plain = module(tokens)
    scale_output(module, 640**0.5)
    assert torch.equal(module(tokens), plain * torch.tensor(640**0.5, dtype=torch.bfloat16))
