"""Which slices vLLM's tensor-parallel workers need: asked of the loaders of real model classes, on two ranks."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.models import VLLM_ENVIRONMENT, save_checkpoint
from tests.adapters.trainer_side import TensorSource
from tests.ranks import run_ranks
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from weightcast.sync import HostShare, TensorSpec, UpdateStats, WeightPublisher, WeightSubscriber, wanted_tensors
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.wanted import WantedRegions, share_of

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT: dict[str, Any] = EXPERTS | {
    "num_key_value_heads": 4,
    "head_dim": None,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, num_experts=4),
    "deepseek-v2": DeepseekV2Config(**LATENT),
    "gpt-oss": GptOssConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def receive(
    address: str, wanted: WantedRegions, share: HostShare | None = None
) -> tuple[dict[str, torch.Tensor], UpdateStats]:
    """The version that is published there, of which this rank gets its slices, with NaN in everything else.

    With `share` both ranks' are received once, and what lies beside this rank's may be the other's.
    """

    def make_poisoned(spec: TensorSpec, device: torch.device) -> torch.Tensor:
        return torch.full(spec.shape, float("nan"), dtype=spec.dtype, device=device)

    with (
        pytest.MonkeyPatch.context() as patch,
        WeightSubscriber(address, engine=f"rank-{os.environ['RANK']}", want=wanted, share=share) as subscriber,
    ):
        patch.setattr(wanted_tensors, "make_empty", make_poisoned)
        update = subscriber.wait(60)
        return {name: tensor.clone() for name, tensor in update}, update.stats


def watch_and_load(folders: dict[str, str], addresses: dict[str, str], cache: str, base: str) -> dict[str, Any]:
    """For each model: what this rank wants; and whether a load of just that gives the parameters of a full load."""
    from tests.adapters.vllm_models import build, join_groups, load, make_config

    from weightcast.adapters.vllm.twin import place_key, read_wanted, record_twin, wanted_of_worker

    seen: dict[str, Any] = {}
    join_groups(make_config(Path(folders["qwen3-moe"])))  # a group of experts is made for a model that has some
    for name, folder in folders.items():
        config = make_config(Path(folder))
        checkpoint = open_checkpoint(Path(folder))
        record = record_twin(config, checkpoint.specs)
        wanted = wanted_of_worker(config, checkpoint.specs, cache=Path(cache))
        assert wanted == record.wanted
        file = Path(cache) / f"{place_key(config, checkpoint.specs)}.json"
        assert (
            read_wanted(file, checkpoint.specs)
            == wanted
            == wanted_of_worker(config, [*checkpoint.specs], cache=file.parent)
        )
        with checkpoint.reader() as reader:
            full = {spec.name: reader.read(spec.whole()) for spec in checkpoint.specs}
        sliced = {key: torch.full_like(tensor, float("nan")) for key, tensor in full.items()}
        for key, boxes in wanted.items():
            for box in boxes:
                sliced[key][box.slices] = full[key][box.slices]
        received, stats = receive(addresses[name], wanted)
        share = HostShare("slices", base=Path(base), workers=2, gather_s=60)
        together, shared = receive(addresses[name], wanted, share)
        expected = load(build(config), config, full)
        for given in (sliced, received, together):
            found = load(build(config), config, given)
            assert expected.keys() == found.keys()
            for key, tensor in expected.items():
                assert torch.equal(tensor, found[key]), f"{name}: {key}"
        seen[name] = {
            "received": stats.num_bytes / stats.model_bytes,
            "asked": stats.asked_bytes / stats.model_bytes,
            "shared": (shared.transport, shared.num_bytes, stats.model_bytes),
            "kept": stats.kept_bytes / stats.model_bytes,
            "share": share_of(wanted, checkpoint.specs),
            "computed": list(record.computed),
            "unfilled": list(record.unfilled),
            "wanted": {key: [str(box) for box in boxes] for key, boxes in wanted.items()},
        }
    return seen


@pytest.mark.vllm
@pytest.mark.slow
def test_a_load_of_the_wanted_slices_alone_fills_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESH_RANKS", "1")
    folders: dict[str, str] = {}
    addresses: dict[str, str] = {}
    with ExitStack() as stack:
        for name, config in MODELS.items():
            torch.manual_seed(len(folders))
            model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
            folders[name] = str(save_checkpoint(model, tmp_path / name))
            checkpoint = open_checkpoint(tmp_path / name)
            with checkpoint.reader() as reader:
                source = TensorSource({spec.name: reader.read(spec.whole()) for spec in checkpoint.specs})
            publisher = stack.enter_context(WeightPublisher(source, "tcp://127.0.0.1:0", chunk_bytes=4096))
            publisher.publish(1)
            addresses[name] = publisher.address
        cache = str(tmp_path / "cache")
        # Paths of sockets are short, and those of pytest's folders are not where it runs in several processes.
        base = stack.enter_context(tempfile.TemporaryDirectory())
        ranks = run_ranks(
            watch_and_load, 2, folders, addresses, cache, base, process_group=False, env=VLLM_ENVIRONMENT, timeout_s=540
        )
    dense = [rank["qwen3"]["wanted"] for rank in ranks]
    layer = "model.layers.0"
    for name, first, second in (
        (f"{layer}.self_attn.q_proj.weight", "[0:64, 0:64]", "[64:128, 0:64]"),
        (f"{layer}.self_attn.k_proj.weight", "[0:32, 0:64]", "[32:64, 0:64]"),
        (f"{layer}.self_attn.o_proj.weight", "[0:64, 0:64]", "[0:64, 64:128]"),
        (f"{layer}.mlp.up_proj.weight", "[0:64, 0:64]", "[64:128, 0:64]"),
        (f"{layer}.mlp.down_proj.weight", "[0:64, 0:64]", "[0:64, 64:128]"),
        # vLLM pads 200 rows to 256 and gives each worker half of those.
        ("model.embed_tokens.weight", "[0:128, 0:64]", "[128:200, 0:64]"),
        (f"{layer}.input_layernorm.weight", "[0:64]", "[0:64]"),
    ):
        assert [dense[0][name], dense[1][name]] == [[name + first], [name + second]]
    for name in folders:
        (read, received) = sorted(rank[name]["shared"] for rank in ranks)
        assert read[:2] == ["host", 0] and received[0] == "shared_memory", (name, read, received)
        # All of the model, once for both; of what gpt-oss's loader leaves to nobody only digests.
        assert received[1] == received[2] or (name == "gpt-oss" and received[1] < 1.001 * received[2]), name
    for rank in ranks:
        for name in ("qwen3", "qwen3-tied", "qwen3-moe", "deepseek-v2"):
            assert rank[name]["computed"] == [] and rank[name]["unfilled"] == [], name
            assert 0.4 < rank[name]["share"] < 0.66, (name, rank[name]["share"])
            # Besides chunks, digests of pieces that are left out: 8 bytes each, of few KiB here.
            assert rank[name]["kept"] == rank[name]["share"] <= rank[name]["received"]
            assert rank[name]["received"] < rank[name]["asked"] + 0.01 < 0.85
        # Its loader transposes experts before it cuts them: those are read whole, the rest in part.
        computed = {key.split(".")[-1] for key in rank["gpt-oss"]["computed"]}
        assert {"gate_up_proj", "down_proj"} <= computed, computed
        assert rank["gpt-oss"]["wanted"][f"{layer}.mlp.experts.down_proj"]
