"""Operations of a model against torch's own count, the slow rank among others, and schedule lengths."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.bridges.tiny_mla import MLA_MODELS, write_mla_model
from tests.bridges.tiny_models import write_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from weightcast.bridges import AutoBridge
from weightcast.trainer.flops import flops_of_sample
from weightcast.trainer.lr_schedule import schedule_lengths
from weightcast.trainer.overrides import load_config
from weightcast.trainer.peak import DENSE_BF16_TFLOPS, peak_share, present_card, share_of_run
from weightcast.trainer.stragglers import RankTime, find_straggler

SEQ_LENGTH = 32


@pytest.mark.parametrize("name", ["llama3.2", "qwen3-moe", "qwen2-moe", "deepseek-v2-lite", "deepseek-v2", "moonlight"])
def test_operations_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    """Torch counts the whole square of scores; a causal model needs half of it, which is what we count."""
    tokens = torch.arange(3, 3 + SEQ_LENGTH)[None]
    if name in MLA_MODELS:
        write_mla_model(name, tmp_path, tokens)
        folder = tmp_path / "model"
    else:
        folder = write_tiny_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens)
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.mtp_num_layers = None
    if provider.multi_latent_attention:
        channels = provider.qk_head_dim + provider.qk_pos_emb_head_dim + provider.v_head_dim
    else:
        channels = 2 * provider.kv_channels
    unseen = provider.num_layers * 2 * provider.num_attention_heads * channels * SEQ_LENGTH**2 / 2
    assert flops_of_sample(provider, SEQ_LENGTH) / 3 + unseen == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_a_dense_model_takes_about_six_operations_a_parameter_and_token(tmp_path: Path) -> None:
    write_tiny_model("qwen3", tmp_path)
    provider = AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    looked_up = model.get_input_embeddings().weight.numel()
    scores = 6 * provider.num_layers * provider.num_attention_heads * provider.kv_channels * SEQ_LENGTH
    per_token = flops_of_sample(provider, SEQ_LENGTH) / SEQ_LENGTH
    assert per_token == 6 * (matrices - looked_up) + scores


def test_a_share_of_the_peak_is_told_of_cards_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_share(494.5, "NVIDIA H100 80GB HBM3") == peak_share(494.5, "NVIDIA H200") == 0.5
    assert peak_share(400.0, "NVIDIA H100 80GB HBM3 MIG 3g.40gb") is None and peak_share(1.0, "") is None
    assert all(100 < peak < 1000 for peak in DENSE_BF16_TFLOPS.values()), "a figure with sparsity"
    assert torch.cuda.is_available() or present_card() == ""

    monkeypatch.setattr("weightcast.trainer.peak.present_card", lambda: "NVIDIA H200")
    in_bf16 = SimpleNamespace(params_dtype=torch.bfloat16, fp8=None, fp4=None)
    assert share_of_run(98.9, in_bf16) == pytest.approx(0.1)
    for others in ({"params_dtype": torch.float32}, {"fp8": "hybrid"}, {"fp4": "e2m1"}):
        assert share_of_run(98.9, SimpleNamespace(**vars(in_bf16) | others)) is None


def test_a_window_costs_no_more_than_the_sequence(tmp_path: Path) -> None:
    write_tiny_model("gemma3", tmp_path)
    provider = AutoBridge.from_hf_pretrained(tmp_path).to_megatron_provider()
    with_window = flops_of_sample(provider, SEQ_LENGTH)
    provider.window_size = None
    whole = flops_of_sample(provider, SEQ_LENGTH)
    # Three of four layers see 8 keys at most: on average 8 - 8^2 / (2 * 32) = 7 instead of 16.
    saved = 3 * 2 * 3 * (16 - 7) * 2 * provider.num_attention_heads * provider.kv_channels * SEQ_LENGTH
    assert whole - with_window == pytest.approx(saved)


def test_a_straggler_is_slow_beside_its_own_stage() -> None:
    times = [RankTime(0, "a", 0, 1.0), RankTime(1, "a", 0, 1.0), RankTime(2, "b", 0, 1.5), RankTime(3, "b", 1, 3.0)]
    found = find_straggler(times)
    assert (found.slowest.rank, found.slowest.host, found.ratio) == (2, "b", 1.5)


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ([], (0, 80, None, 80)),
        (["scheduler.lr_warmup_iters=2"], (16, 80, None, 80)),
        (["scheduler.lr_warmup_samples=20"], (20, 80, None, 80)),
        (["scheduler.lr_warmup_fraction=0.5", "scheduler.lr_decay_iters=5"], (20, 40, None, 80)),
        (["scheduler.lr_decay_samples=60"], (0, 60, None, 80)),
        (["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=3"], (0, 80, 24, 80)),
        (["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_samples=9"], (0, 80, 9, 80)),
    ],
)
def test_every_unit_of_a_schedule_becomes_samples(words: list[str], lengths: tuple[int, int, int | None, int]) -> None:
    found = schedule_lengths(load_config(words))
    assert (
        found.warmup_samples,
        found.decay_samples,
        found.wsd_decay_samples,
        found.weight_decay_samples,
    ) == lengths
