"""Qwen2.5-VL as a model that is trained: copies of the vision tower, ranks without images, precision, frozen parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.tiny_qwen25_vl import SEQUENCE, batches, labels_and_mask, run_transformers, write_vl_model
from tests.ranks import run_ranks
from transformers import Qwen2_5_VLForConditionalGeneration

from weightcast.bridges import AutoBridge
from weightcast.sync.errors import ConfigError

NAME = "qwen2.5-vl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("vl-model")
    write_vl_model(NAME, root)
    return str(root / "model")


def build(folder: str, *, load: bool = True, with_ddp: bool = False, overlap: bool = False, **settings: Any) -> Any:
    """The only chunk of the model on this rank, after a fresh start of Megatron's groups."""
    from megatron.core.distributed import DistributedDataParallelConfig

    from weightcast.bridges.process_groups import destroy_model_parallel

    destroy_model_parallel()
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=load)
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=overlap)
    (chunk,) = provider.provide_distributed_model(ddp_config=ddp_config, wrap_with_ddp=with_ddp)
    return chunk


def same_on_all_ranks(tensors: list[torch.Tensor]) -> bool:
    """Whether every rank has the same bits, and something other than zeros."""
    mine = torch.cat([tensor.detach().flatten() for tensor in tensors])
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return all(torch.equal(mine, other) for other in theirs) and bool(mine.abs().max() > 0)


def train_step(chunk: Any, case: str) -> None:
    """Forward, backward and Megatron's reduction of gradients for one microbatch of this rank's own choice."""
    from megatron.core.distributed import finalize_model_grads

    batch = batches()[case]
    labels, mask = labels_and_mask(batch)
    chunk.train()
    torch.autograd.backward(chunk(**batch, labels=labels)[mask].mean())
    finalize_model_grads([chunk])


def use_tensor_parallel_ranks(folder: str) -> None:
    from weightcast.bridges.process_groups import destroy_model_parallel

    sizes: dict[str, Any] = {"tensor_model_parallel_size": 2}
    fresh = build(folder, load=False, **sizes)
    assert same_on_all_ranks(list(fresh.visual.parameters()))

    chunk = build(folder, with_ddp=True, **sizes)
    train_step(chunk, "images")
    assert same_on_all_ranks([parameter.main_grad for parameter in chunk.module.visual.parameters()])

    odd = build(folder, **sizes, sequence_parallel=True)
    with pytest.raises(ConfigError, match="55 tokens do not divide by tensor_model_parallel_size=2"):
        odd(batches()["text"]["input_ids"][:, : SEQUENCE - 1])
    destroy_model_parallel()


def test_the_tower_is_the_same_on_all_tensor_parallel_ranks(folder: str) -> None:
    run_ranks(use_tensor_parallel_ranks, 2, folder)


def train_on_different_cases(folder: str, cases: list[str]) -> list[float]:
    """Data parallel ranks, each with its own case, overlapped; some of the tower's reduced gradient."""
    from weightcast.bridges.process_groups import destroy_model_parallel

    chunk = build(folder, with_ddp=True, overlap=True)
    train_step(chunk, cases[dist.get_rank()])
    grads = [parameter.main_grad for parameter in chunk.module.visual.parameters()]
    assert cases == ["text", "text"] or same_on_all_ranks(grads)
    destroy_model_parallel()
    return [float(grad.double().abs().sum()) for grad in grads]


def test_a_rank_without_images_brings_zeros_for_the_tower(folder: str) -> None:
    seen, mixed, none = (
        run_ranks(train_on_different_cases, 2, folder, cases)[0]
        for cases in (["image", "image"], ["image", "text"], ["text", "text"])
    )
    assert mixed == pytest.approx([value / 2 for value in seen], rel=1e-4)
    assert set(none) == {0.0} and min(seen) > 0


@torch.no_grad()
def call_in_other_ways(folder: str) -> None:
    """Positions and masks of the caller's own, precision, frozen parts."""
    from weightcast.bridges.layers.mrope import rope_index
    from weightcast.bridges.layers.vision_inputs import hidden_positions

    chunk = build(folder).eval()
    batch = batches()["images"]
    logits = chunk(**batch)
    grids = {name: value for name, value in batch.items() if not name.startswith("pixel")}
    positions = rope_index(chunk.config.hf_config, **grids)
    hidden = hidden_positions(batch["attention_mask"])
    assert torch.equal(chunk(**batch | {"position_ids": positions, "attention_mask": hidden}), logits)
    text = batches()["text"]["input_ids"]
    assert torch.equal(chunk(text, torch.arange(SEQUENCE).expand(2, -1)), chunk(text))
    with pytest.raises(ConfigError, match=r"position_ids have shape \(4, 2, 56\)"):
        chunk(text, torch.zeros(4, 2, SEQUENCE))

    half = build(folder, params_dtype=torch.bfloat16, bf16=True).eval()
    frequencies = half.module.visual.rotary_pos_emb.inv_freq
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, chunk.visual.rotary_pos_emb.inv_freq)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    seen = batch["attention_mask"].bool()
    assert (half(**batch) - logits)[seen].abs().max() < 0.1 * logits[seen].abs().max()

    for frozen, trained in (
        ("language_model.", "visual."),
        ("visual.blocks.", "visual.merger."),
        ("visual.merger.", ""),
    ):
        part = {"language_model.": "language_model", "visual.blocks.": "vision_model"}.get(frozen, "vision_projection")
        names = {
            name: parameter.requires_grad
            for name, parameter in build(folder, load=False, **{f"freeze_{part}": True}).named_parameters()
        }
        assert not any(value for name, value in names.items() if name.startswith(frozen))
        assert all(value for name, value in names.items() if name.startswith(trained) and not name.startswith(frozen))


def test_positions_masks_precision_and_frozen_parts(folder: str) -> None:
    run_ranks(call_in_other_ways, 1, folder)


def adapt(folder: str, out: str) -> None:
    """LoRA on a model that sees, saved for PEFT; logits beside it, and the same adapters back in a fresh model."""
    from safetensors.torch import save_file

    from weightcast.bridges.peft import LoRA

    chunk = build(folder).eval()
    LoRA(dim=4).apply([chunk])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        adapters = {name: weight for name, weight in chunk.named_parameters() if "linear_out" in name}
        for weight in adapters.values():  # they start as zeros, under which nothing shows
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        logits = chunk(**batches()["images"])
    bridge = AutoBridge.from_hf_pretrained(folder)
    bridge.save_hf_adapter([chunk], Path(out, "adapter"))
    save_file({"logits": logits}, Path(out, "logits.safetensors"))

    fresh = build(folder).eval()
    bridge.load_hf_adapter([fresh], Path(out, "adapter"))
    with torch.no_grad():
        assert torch.equal(fresh(**batches()["images"]), logits)


def test_adapters_have_the_names_that_peft_looks_for(folder: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    run_ranks(adapt, 1, folder, str(tmp_path))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    batch = batches()["images"]
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = run_transformers(model, batch)
        adapted = run_transformers(PeftModel.from_pretrained(model, tmp_path / "adapter"), batch)
    logits = load_file(tmp_path / "logits.safetensors")["logits"][..., : plain.shape[-1]]
    assert (logits - adapted)[seen].abs().max() < 1e-5 < (logits - plain)[seen].abs().max() / 100
