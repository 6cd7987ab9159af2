"""Providers: what finalize() checks and derives, and what provide_distributed_model() builds."""

import copy
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from weightcast.bridges.provider import GPTModelProvider
from weightcast.sync.errors import ConfigError


def provider(**settings: Any) -> GPTModelProvider:
    sizes = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "vocab_size": 131,
        "seq_length": 64,
    }
    return GPTModelProvider(**sizes | settings)


CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"tensor_model_parallel_size": 3}, r"num_attention_heads=8 is not a multiple of .*=3; choose"),
    "groups": (
        {"num_attention_heads": 12, "num_query_groups": 3, "tensor_model_parallel_size": 2},
        r"num_query_groups=3 .* neither a multiple nor a divisor of tensor_model_parallel_size=2; choose",
    ),
    "fused rows": (
        {"num_attention_heads": 3, "num_query_groups": 1, "kv_channels": 4, "tensor_model_parallel_size": 3},
        r"num_query_groups\)=20 is not a multiple of tensor_model_parallel_size=3",
    ),
    "mlp": ({"ffn_hidden_size": 62, "tensor_model_parallel_size": 4}, r"ffn_hidden_size=62 is not a multiple"),
    "layers": ({"pipeline_model_parallel_size": 3}, r"num_layers=4 is not a multiple of .*=3; .*first_pipeline_stage"),
    "virtual layers": (
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
        r"num_layers=4 is not a multiple of pipeline_model_parallel_size x .*=8",
    ),
    "virtual alone": ({"virtual_pipeline_model_parallel_size": 2}, r"needs pipeline_model_parallel_size > 1"),
    "sequence alone": ({"sequence_parallel": True}, r"sequence_parallel=True needs tensor_model_parallel_size > 1"),
    "sequence length": (
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "seq_length": 63},
        r"seq_length=63 is not a multiple of tensor_model_parallel_size=2",
    ),
    "precision": ({"bf16": True}, r"params_dtype=torch.float32, bf16=True .*set_dtype"),
    "dtype": ({"params_dtype": torch.float64}, r"params_dtype=torch.float64 is not supported; use torch.float32"),
    "nothing set": ({"vocab_size": 0}, r"vocab_size=0 must be set; take the provider from AutoBridge"),
    "Megatron's own": ({"recompute_granularity": "some"}, r"Megatron-Core refuses this provider: .*recompute"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflicts_are_refused_with_the_remedy(case: str) -> None:
    settings, message = CONFLICTS[case]
    with pytest.raises(ConfigError, match=message):
        provider(**settings).finalize()


@pytest.mark.parametrize("groups, tensor_parallel", [(2, 4), (2, 8), (1, 2), (8, 2)])
def test_key_value_heads_may_be_fewer_than_ranks(groups: int, tensor_parallel: int) -> None:
    provider(num_query_groups=groups, tensor_model_parallel_size=tensor_parallel).finalize()


def test_layers_may_be_cut_by_hand() -> None:
    provider(num_layers=5, pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=2).finalize()


def test_listed_stages_are_read_for_the_present_sizes() -> None:
    p = provider(num_layers=4, pipeline_model_parallel_size=2, pipeline_model_parallel_layout="E|tt|t|tL")
    p.finalize()
    assert (p.virtual_pipeline_model_parallel_size, p.batch_p2p_comm) == (2, False)
    p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size = 4, None
    p.finalize()
    stages: Any = p.pipeline_model_parallel_layout
    assert (stages.virtual_pipeline_model_parallel_size, len(stages.layout)) == (1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pipeline_model_parallel_layout": "Et|t|tL"},
            r"'Et\|t\|tL' does not list the stages .*_size=2.* multiple of 2",
        ),
        ({"pipeline_model_parallel_layout": "Ett|xL"}, "Invalid layer character: x"),
        (
            {"pipeline_model_parallel_layout": "Et|tL", "virtual_pipeline_model_parallel_size": 2},
            r"lists 1 virtual stages a rank, but virtual_pipeline_model_parallel_size=2; set it to None",
        ),
        ({"pipeline_model_parallel_layout": "Et|tL"}, "Number of decoder layers 2must match num_layers 4"),
        (
            {
                "num_layers_in_first_pipeline_stage": 2,
                "num_layers_in_last_pipeline_stage": 2,
                "virtual_pipeline_model_parallel_size": 2,
            },
            r"cannot both be set for two stages with virtual ones; set the first alone",
        ),
    ],
)
def test_cuts_by_hand_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        provider(num_layers=4, pipeline_model_parallel_size=2, **settings).finalize()


def test_sizes_may_change_until_the_model_is_built() -> None:
    p = provider()
    p.finalize()
    assert (p.padded_vocab_size, p.pipeline_dtype) == (256, None)
    p.tensor_model_parallel_size, p.pipeline_model_parallel_size = 4, 2
    p.finalize()
    assert (p.padded_vocab_size, p.pipeline_dtype) == (512, torch.float32)


def test_a_dtype_is_set_in_one_place() -> None:
    p = provider(pipeline_model_parallel_size=2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p.set_dtype(dtype)
        p.finalize()
        assert (p.params_dtype, p.pipeline_dtype, p.autocast_dtype) == (dtype,) * 3
        assert (p.bf16, p.fp16) == (dtype is torch.bfloat16, dtype is torch.float16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA some of them exist")
def test_fused_kernels_that_are_not_there_are_turned_off_and_named(caplog: pytest.LogCaptureFixture) -> None:
    p = provider(bias_activation_fusion=True, bias_dropout_fusion=True)
    with caplog.at_level("INFO", logger="weightcast.bridges.provider_checks"):
        p.finalize()
    assert not p.bias_activation_fusion and not p.bias_dropout_fusion
    assert "bias_activation_fusion, bias_dropout_fusion" in caplog.text


def test_a_copy_shares_the_hooks_and_nothing_else() -> None:
    class Unique:
        def hook(self, model: list[Any]) -> None: ...

        def __deepcopy__(self, memo: object) -> "Unique":
            raise AssertionError("a hook's owner was copied")

    p = provider()
    p.register_pre_wrap_hook(Unique().hook)
    twin = copy.deepcopy(p)
    twin.num_query_groups = 8
    assert twin.pre_wrap_hooks is p.pre_wrap_hooks and p.num_query_groups == 2


def test_a_model_wants_a_finalized_provider() -> None:
    with pytest.raises(ConfigError, match=r"call provider\.finalize"):
        provider().provide(True, True)


def run_python(program: str) -> None:
    """Run a program in a process of its own, so that the CPU runtime stays out of this one."""
    # Megatron says on every forward that its linears will want a group some day, and of selective recomputation
    # what holds with Transformer Engine.
    expected = ("ignore:Warning:DeprecationWarning", "ignore:If you are using transformer_engine:UserWarning")
    filters = [argument for notice in expected for argument in ("-W", notice)]
    result = subprocess.run(
        [sys.executable, "-W", "error", *filters, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_recomputed_activations_draw_the_same_dropout() -> None:
    run_python(
        """
        import torch
        from weightcast.bridges.provider import GPTModelProvider
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        tokens = torch.arange(32).reshape(2, 16)
        positions = torch.arange(16).expand_as(tokens)

        def gradients(**settings):
            provider = GPTModelProvider(
                num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2,
                vocab_size=131, seq_length=64, attention_dropout=0.3, hidden_dropout=0.2, rotary_base_local=100.0,
                window_size=(4, 0), window_attn_skip_freq=[1, 0], **settings,
            )
            (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 8)
            model_parallel_cuda_manual_seed(7)
            model(tokens, positions, None, labels=tokens).mean().backward()
            return [parameter.grad for parameter in model.parameters()]

        plain = gradients()
        full = gradients(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
        selective = gradients(recompute_granularity="selective")
        assert all(gradient.abs().sum() > 0 for gradient in plain)
        for recomputed in (full, selective):
            assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
        """
    )


def test_any_rank_of_a_large_layout_is_built_on_meta_tensors() -> None:
    run_python(
        """
        import torch
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from weightcast.bridges.process_groups import initialize_model_parallel
        from weightcast.bridges.provider import GPTModelProvider

        provider = GPTModelProvider(
            num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=4,
            vocab_size=128256, tensor_model_parallel_size=8, pipeline_model_parallel_size=16, normalization="RMSNorm",
        )
        provider.finalize()
        dist.init_process_group("fake", store=FakeStore(), rank=777, world_size=1024)
        initialize_model_parallel(provider)
        with torch.device("meta"):
            model = provider.provide()
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert len(model.decoder.layers) == 5
        assert model.decoder.layers[0].self_attention.linear_qkv.weight.shape == ((64 + 2 * 4) * 128 // 8, 8192)
        """
    )


@pytest.mark.slow
def test_a_lone_process_builds_wraps_and_trains_in_bf16() -> None:
    run_python(
        """
        import torch
        from weightcast.bridges.provider import GPTModelProvider
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.transformer.module import Float16Module

        provider = GPTModelProvider(
            num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, vocab_size=131,
            seq_length=64, normalization="RMSNorm", attention_dropout=0.5, layernorm_zero_centered_gamma=True,
        )
        provider.set_dtype(torch.bfloat16)
        calls = []
        provider.register_pre_wrap_hook(lambda model: calls.append(type(model[0]).__name__))
        model = provider.provide_distributed_model(
            pre_wrap_hook=lambda model: calls.append("given"),
            post_wrap_hook=lambda model: calls.append(type(model[0]).__name__),
        )
        assert calls == ["GPTModel", "given", "DistributedDataParallel"], calls
        (ddp,) = model
        assert isinstance(ddp, DistributedDataParallel) and isinstance(ddp.module, Float16Module)
        assert {parameter.dtype for parameter in ddp.parameters()} == {torch.bfloat16}

        tokens = torch.randint(0, 131, (2, 16))
        positions = torch.arange(16).expand_as(tokens)
        losses = []
        for step in range(2):
            loss = ddp(tokens, positions, None, labels=tokens).mean()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] != losses[1], "dropout drew nothing"
        assert all(parameter.main_grad.abs().sum() > 0 for parameter in ddp.parameters())
        ddp.eval()
        assert ddp(tokens, positions, None, labels=tokens).dtype == torch.float32
        """
    )
