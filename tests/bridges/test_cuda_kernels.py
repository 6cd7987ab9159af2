"""What stands in for loops on a GPU without Transformer Engine does the same as the loops; and when it is used."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightcast.bridges import cuda_kernels, provider_checks, runtime
from weightcast.bridges import provider as provider_module
from weightcast.bridges.layers.compiled import compiled, rotate, row_losses
from weightcast.bridges.layers.whole_loss import whole_cross_entropy
from weightcast.bridges.provider import GPTModelProvider
from weightcast.bridges.runtime import ensure_runtime
from weightcast.sync.errors import ConfigError

from megatron.core import utils as megatron_utils  # isort: skip
from megatron.core.models.common.embeddings import rope_utils  # isort: skip


def numbers(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_norm_and_scale_of_all_are_those_of_megatrons_loops() -> None:
    ensure_runtime()
    tensors = numbers((3, 4), (5,), (2, 2, 2))
    norm, _ = cuda_kernels.norm_of_all(0, torch.zeros(1), [tensors], False)
    wanted, _ = megatron_utils.local_multi_tensor_l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.shape == wanted.shape == (1,)
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)

    theirs = copy.deepcopy(tensors)
    megatron_utils.local_multi_tensor_scale(0, torch.zeros(1), [theirs, theirs], 0.3)
    others = [torch.empty_like(tensor) for tensor in tensors]
    cuda_kernels.scale_of_all(0, torch.zeros(1), [tensors, others], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(others, theirs, strict=True))
    assert not torch.equal(tensors[0], theirs[0]), "the sources stay"
    cuda_kernels.scale_of_all(0, torch.zeros(1), [tensors, tensors], 0.3)
    assert all(torch.equal(one, other) for one, other in zip(tensors, theirs, strict=True))


def test_only_megatrons_own_loops_are_replaced() -> None:
    def of_apex() -> None: ...

    for replace, local, ours in (
        (cuda_kernels.with_norm_of_all, megatron_utils.local_multi_tensor_l2_norm, cuda_kernels.norm_of_all),
        (cuda_kernels.with_scale_of_all, megatron_utils.local_multi_tensor_scale, cuda_kernels.scale_of_all),
    ):
        assert replace(local) is ours and replace(of_apex) is of_apex
    assert {mend.target for mend in runtime.MENDS if mend.needed is runtime._cuda_alone} == {
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
        "megatron.core.transformer.attention:apply_rotary_pos_emb",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotated", [16, 8], ids=["whole heads", "half of each head"])
def test_a_rotation_is_megatrons_to_the_bit(dtype: torch.dtype, rotated: int) -> None:
    states, angles, gradient = numbers((6, 2, 4, 16), (6, 1, 1, rotated), (6, 2, 4, 16))
    results = []
    for function in (rotate, rope_utils._apply_rotary_pos_emb_bshd):
        leaf = states.to(dtype).requires_grad_()
        turned = function(leaf, angles)
        turned.backward(gradient.to(dtype))
        assert leaf.grad is not None
        results.append((turned, leaf.grad))
    (ours, our_gradient), (theirs, their_gradient) = results
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient)


def config(**settings: Any) -> SimpleNamespace:
    plain = {"rotary_interleaved": False, "apply_rope_fusion": False, "uses_compiled_kernels": True}
    return SimpleNamespace(**plain | settings)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "not asked for": ({"uses_compiled_kernels": False}, {}),
    "interleaved": ({"rotary_interleaved": True}, {}),
    "Transformer Engine's": ({"apply_rope_fusion": True}, {}),
    "packed": ({}, {"cu_seqlens": torch.tensor([0, 2])}),
    "YaRN": ({}, {"mscale": 1.2}),
}


def test_a_plain_rotation_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Callable[..., Any]] = []

    def as_plain_torch(function: Callable[..., Any]) -> Callable[..., Any]:
        asked.append(function)
        return function

    monkeypatch.setattr(cuda_kernels, "compiled", as_plain_torch)
    states, angles = numbers((6, 2, 4, 16), (6, 1, 1, 16))
    rotated = cuda_kernels.with_compiled_rotation(lambda *args, **kwargs: pytest.fail("Megatron's was called"))
    assert torch.equal(rotated(states, angles, config=config(), cp_group=None), rotate(states, angles))
    assert asked == [rotate]


@pytest.mark.parametrize(("settings", "arguments"), OTHERS.values(), ids=OTHERS.keys())
def test_other_rotations_stay_with_megatron(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    calls: list[tuple[Any, ...]] = []
    states, angles = numbers((2, 1, 1, 4), (2, 1, 1, 4))

    def of_megatron(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((*args, kwargs))
        return states

    rotated = cuda_kernels.with_compiled_rotation(of_megatron)
    given = config(**settings)
    rotated(states, angles, config=given, cp_group="group", **arguments)
    ((*_, its_config, cu_seqlens, mscale, rest),) = calls
    assert its_config is given and rest == {"cp_group": "group"}
    assert (cu_seqlens, mscale) == (arguments.get("cu_seqlens"), arguments.get("mscale", 1.0))


def keep_in(seen: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    seen.append(tensor)
    return tensor


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


# The compiler looks at `grad` of what it is given, and hides the warning of it, but not where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loss_is_the_same_and_keeps_no_copy_of_the_logits() -> None:
    """With the compiler's own cut of forward and backward, whatever makes the kernels then."""
    ensure_runtime()
    compiled_losses = torch.compile(row_losses, backend="aot_eager_decomp_partition")
    (given,) = numbers((24, 1, 500))
    labels = torch.arange(24)[None]
    kept: dict[str, list[torch.Tensor]] = {}
    results = []
    for name, kernel in (("eager", row_losses), ("compiled", compiled_losses)):
        logits = given.to(torch.bfloat16).requires_grad_()
        seen = kept.setdefault(name, [])
        with torch.autograd.graph.saved_tensors_hooks(partial(keep_in, seen), as_it_is):
            losses = whole_cross_entropy(labels, logits, kernel)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        results.append((losses, logits.grad))
    assert results[0][0].shape == (1, 24) and results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-6)
    of_vocabulary = {name: {item.dtype for item in seen if item.numel() >= 24 * 500} for name, seen in kept.items()}
    assert of_vocabulary == {"eager": {torch.float32}, "compiled": {torch.bfloat16}}


def test_one_function_is_compiled_once() -> None:
    assert compiled(row_losses) is compiled(row_losses) and compiled(rotate) is not compiled(row_losses)


def provider(**settings: Any) -> GPTModelProvider:
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 131,
    }
    swiglu = {"activation_func": torch.nn.functional.silu, "gated_linear_unit": True, "add_bias_linear": False}
    result = GPTModelProvider(**sizes | swiglu | settings)
    result.set_dtype(torch.bfloat16)
    return result


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that compiles, as far as a provider asks."""
    for module in (provider_module, provider_checks):
        monkeypatch.setattr(module, "can_compile_kernels", lambda: True)
    monkeypatch.setattr(provider_checks, "has_cuda", lambda: True)


def test_kernels_are_compiled_where_they_can_be_for_16_bits(compiler: None) -> None:
    made = provider()
    made.finalize()
    assert made.uses_compiled_kernels and made.bias_activation_fusion
    made.set_dtype(torch.float32)
    assert not made.uses_compiled_kernels


@pytest.mark.parametrize(
    "settings",
    [
        {"compiled_kernels": False},
        {"activation_func": torch.nn.functional.gelu},
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16},
    ],
    ids=["turned off", "another activation", "experts"],
)
def test_swiglu_is_left_alone(compiler: None, settings: dict[str, Any]) -> None:
    made = provider(**settings)
    made.finalize()
    assert not made.bias_activation_fusion


@pytest.mark.skipif(runtime.can_compile_kernels(), reason="this machine compiles kernels")
def test_a_machine_that_cannot_compile_says_so() -> None:
    made = provider()
    made.finalize()
    assert not made.uses_compiled_kernels and not made.bias_activation_fusion
    with pytest.raises(ConfigError, match="compiled_kernels=True needs CUDA, Triton, a C compiler"):
        provider(compiled_kernels=True).finalize()
