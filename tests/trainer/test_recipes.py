"""Recipes: every one is built from what it carries and has the published number of parameters; proxies train."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import run_ranks
from tests.trainer.recipe_runs import NAMES, QUICK, sparing, train_proxies
from tests.trainer.sft_files import write_lines

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks import check_config
from weightcast.trainer.config import ConfigContainer, DatasetConfig, ModelConfig
from weightcast.trainer.model_source import open_model, open_planned_model
from weightcast.trainer.overrides import load_config, save_config
from weightcast.trainer.recipes.defaults import train_on_records
from weightcast.trainer.recipes.proxy import shrink
from weightcast.trainer.recipes.registry import load_recipe, recipe_modules
from weightcast.trainer.run_words import load_run, sort_words
from weightcast.trainer.state import make_provider

STAGES = "model.pipeline_model_parallel"


def test_the_models_that_are_promised_have_recipes() -> None:
    llama = {"llama3_8b", "llama3_70b", "llama31_8b", "llama31_70b", "llama31_405b", "llama32_1b", "llama32_3b"}
    qwen2 = {f"qwen2_{size}" for size in ("500m", "1p5b", "7b", "72b")}
    qwen25 = {f"qwen25_{size}" for size in ("500m", "1p5b", "3b", "7b", "14b", "32b", "72b")}
    qwen3 = {f"qwen3_{size}" for size in ("600m", "1p7b", "4b", "8b", "14b", "32b", "30b_a3b", "235b_a22b")}
    others = {"llama33_70b", "qwen25_vl_3b", "qwen25_vl_7b", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3"}
    assert set(recipe_modules()) == llama | qwen2 | qwen25 | qwen3 | others | {"moonlight_16b", "gemma3_270m"}


def is_whole(name: str) -> bool:
    return name in QUICK or name.endswith((".pretrain", ".sft"))


@pytest.mark.parametrize("name", sparing(is_whole))
def test_a_recipe_is_made_anew_each_time_and_fits_itself(name: str) -> None:
    """Nothing is shared between two, and neither the model nor the layout contradicts the rest of it."""
    config, again = load_recipe(name), load_recipe(name)
    assert config == again
    again.model.hf_config["num_hidden_layers"] = 0
    assert load_recipe(name) == config
    _, provider = open_planned_model(config.model)
    provider.finalize()
    check_config(config, world_size=least_ranks(config.model))


def least_ranks(model: ModelConfig) -> int:
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    experts = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or model.tensor_model_parallel_size)
    return model.pipeline_model_parallel_size * max(dense, experts)


@pytest.mark.parametrize("name", sparing(lambda name: name in QUICK or name.endswith(".pretrain")))
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_proxy_keeps_the_architecture_and_fits_the_ranks(name: str, world_size: int) -> None:
    config = load_recipe(name)
    small = shrink(config, world_size)
    assert config == load_recipe(name)
    assert small.model.hf_config.keys() == config.model.hf_config.keys()
    kept = ("model_type", "hidden_act", "tie_word_embeddings", "topk_method", "scoring_func")
    assert all(small.model.hf_config.get(field) == config.model.hf_config.get(field) for field in kept)
    bridge, provider = open_model(small.model)
    provider.finalize()
    check_config(small, world_size=world_size)
    full_bridge, full = open_planned_model(config.model)
    assert bridge.family is full_bridge.family
    for field in ("add_qkv_bias", "qk_layernorm", "multi_latent_attention", "rope_scaling", "gated_linear_unit"):
        assert getattr(provider, field) == getattr(full, field)
    assert bool(provider.num_moe_experts) == bool(full.num_moe_experts)


@pytest.fixture(scope="module")
def proxies() -> dict[str, Any]:
    """Three steps of four recipes on two ranks."""
    first, second = run_ranks(train_proxies, 2, QUICK, ["train.train_iters=3"], timeout_s=240)
    assert {name: found.get("losses") for name, found in first.items()} == {
        name: found.get("losses") for name, found in second.items()
    }
    results: dict[str, Any] = first
    return results


@pytest.mark.parametrize("name", QUICK)
def test_proxies_train(name: str, proxies: dict[str, Any]) -> None:
    check_losses(proxies[name])


# Kinds differ by what trains, layouts by what they cut: not every pair is run.
def test_a_proxy_is_fine_tuned_on_records(qwen3: Path, tmp_path: Path) -> None:
    """Packed: 3 steps of 4 samples of 64 tokens, each full of records of 12 words."""
    records = [{"prompt": "w3 w4 w5 w6 ", "completion": " ".join(f"w{7 + n % 50}" for n in range(8))}] * 100
    words = [
        f"dataset.files=[{write_lines(tmp_path / 'train.jsonl', records)}]",
        f"tokenizer.tokenizer_model={qwen3}",
        f"dataset.cache_dir={tmp_path}",
        "train.train_iters=3",
    ]
    found = run_ranks(train_proxies, 1, ["llama32_1b.lora"], words, timeout_s=240)[0]["llama32_1b.lora"]
    check_losses(found)
    assert 4 * 30 < found["num_tokens"] < 4 * 64, "of each record the answer alone counts, and a sample holds several"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("pretrain", 1), ("pretrain", 2), ("pretrain", 4), ("sft", 2), ("lora", 2), ("lora", 4), ("dora", 1), ("dora", 2)],
)
def test_every_proxy_trains(kind: str, world_size: int) -> None:
    names = [name for name in NAMES if name.endswith(f".{kind}")]
    results = run_ranks(train_proxies, world_size, names, ["train.train_iters=3"], timeout_s=560)[0]
    assert sorted(results) == sorted(names)
    for name, found in results.items():
        assert "losses" in found, (name, found)
        check_losses(found)


def test_fine_tuning_starts_from_the_hub_unless_told_otherwise() -> None:
    for model in recipe_modules():
        config = load_recipe(f"{model}.sft")
        assert config.model.hf_path.count("/") == 1 and config.model.load_weights
        assert not load_recipe(f"{model}.pretrain").model.hf_path
        assert not shrink(config, 1).model.hf_path


@pytest.mark.parametrize("kind", ["sft", "lora", "dora"])
def test_fine_tuning_reads_records_once_they_are_named(kind: str) -> None:
    """Until then it starts on mock data; what the words say wins."""

    def dataset(*words: str, model: str = "llama32_1b") -> DatasetConfig:
        return load_run([f"recipe={model}.{kind}", *words], world_size=2).dataset

    assert (dataset().kind, dataset().packed_sequence) == ("mock", False)
    named = dataset("dataset.files=[a.jsonl]")
    assert (named.kind, named.packed_sequence, named.seq_length) == ("sft", True, 2048)
    assert dataset("dataset.dataset_name=some/set", "proxy=true").packed_sequence
    assert dataset("dataset.kind=sft").packed_sequence
    assert not dataset("dataset.files=[a.jsonl]", "dataset.packed_sequence=false").packed_sequence
    assert dataset("dataset.files=[a.jsonl]", "dataset.kind=mock").kind == "mock"
    # Where packing cannot be, records are padded.
    for word in ("train.micro_batch_size=2", "model.context_parallel_size=2"):
        assert (dataset("dataset.files=[a.jsonl]", word).packed_sequence, dataset().kind) == (False, "mock")
    assert dataset("dataset.files=[a.jsonl]", model="qwen25_vl_3b").packed_sequence is False
    by_hand = load_recipe(f"llama32_1b.{kind}")
    train_on_records(by_hand)
    by_hand.dataset.files = ["a.jsonl"]
    assert by_hand == load_run([f"recipe=llama32_1b.{kind}", "dataset.files=[a.jsonl]"])


def test_pretraining_is_not_turned_into_fine_tuning() -> None:
    config = load_run(["recipe=llama32_1b.pretrain", "dataset.files=[a.txt]"])
    assert config.dataset.kind == "mock"
    with pytest.raises(ConfigError, match=r"dataset\.files: there is no file"):
        check_config(config, world_size=1)


def test_adapters_of_recipes() -> None:
    for model in recipe_modules():
        lora, dora = load_recipe(f"{model}.lora"), load_recipe(f"{model}.dora")
        assert (lora.peft.scheme, lora.peft.dim, lora.optimizer.lr, lora.optimizer.min_lr) == ("lora", 32, 1e-4, 0.0)
        dora.peft.scheme = "lora"
        assert lora == dora
        assert lora.model.hf_path == load_recipe(f"{model}.sft").model.hf_path
    module = importlib.import_module(recipe_modules()["llama32_1b"])
    assert module.peft_config() == load_recipe("llama32_1b.lora")
    assert module.peft_config("canonical_lora") == load_run(["recipe=llama32_1b.lora", "peft.scheme=canonical_lora"])


def test_packing_is_refused_for_models_of_pictures() -> None:
    config = load_run(["recipe=qwen25_vl_3b.sft", "proxy=true", "dataset.kind=sft", "dataset.packed_sequence=true"])
    with pytest.raises(ConfigError, match="positions are those in pictures"):
        make_provider(config, None)


def check_losses(found: dict[str, Any]) -> None:
    """Three of them, each near the logarithm of the proxy's 512 tokens: the model starts as it should."""
    assert "losses" in found, found
    assert len(found["losses"]) == 3
    assert all(5.9 < loss < 6.6 for loss in found["losses"])
    assert found["losses"][0] != found["losses"][2]


def test_words_name_recipes_and_change_them() -> None:
    config = load_run(["recipe=llama32_1b.pretrain", "train.train_iters=7", "model.hf_config.num_hidden_layers=3"])
    assert (config.train.train_iters, config.model.hf_config["num_hidden_layers"]) == (7, 3)
    assert config.scheduler.lr_warmup_iters == 2000
    assert load_run(["recipe=llama32_1b"]) == load_recipe("llama32_1b.pretrain")
    small = load_run(["proxy=true", "recipe=llama3_70b.pretrain", "dataset.seq_length=32"], world_size=2)
    assert small.dataset.seq_length == 32
    assert (small.model.tensor_model_parallel_size, small.model.pipeline_model_parallel_size) == (2, 1)


def test_a_recipe_of_ones_own() -> None:
    config = load_run(["recipe=tests.trainer.test_recipes:own_recipe", "train.train_iters=2"])
    assert (config.dataset.seq_length, config.train.train_iters) == (8, 2)


def own_recipe() -> ConfigContainer:
    config = load_recipe("qwen3_600m.pretrain")
    config.dataset.seq_length = 8
    return config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=llama32_1bb.pretrain"], "there is no recipe 'llama32_1bb'; did you mean 'llama32_1b'?"),
        (["recipe=zzz"], "`weightcast recipes` lists all"),
        (["recipe=llama32_1b.pretrian"], "'pretrian' is none of pretrain"),
        (["recipe=no_such_module:make"], "cannot be imported"),
        (["recipe=tests.trainer.test_recipes:none"], "has no function none"),
        (["recipe=tests.trainer.test_recipes:recipe_modules"], "it gives a dict"),
        (["proxy=maybe"], "write proxy=true or proxy=false"),
        (["proxy=true"], "take a recipe, such as recipe=llama32_1b.pretrain"),
        (["recipe=llama32_1b", "train.trainiters=3"], "did you mean 'train.train_iters'"),
        (["recipe=llama32_1b", "model.hf_config.num_layers=3"], "did you mean 'num_hidden_layers'? to add it, write +"),
        (["recipe=llama32_1b", "+train.train_iters=3"], "is there already (1168251): leave the + out"),
        (["recipe=llama32_1b", "~model.hf_config.head_dims"], "did you mean 'head_dim'? nothing to take out"),
        (["recipe=llama32_1b", "~train.train_iters=3"], "train.train_iters is 1168251"),
        (["recipe=llama32_1b", "~train.trainiters"], "did you mean 'train.train_iters'"),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(words)
    assert message in str(caught.value)


def test_hydras_plus_and_tilde() -> None:
    def apply(*words: str) -> ConfigContainer:
        return load_run(["recipe=llama32_1b.pretrain", *words])

    assert apply("+model.hf_config.attention_dropout_rate=0.1").model.hf_config["attention_dropout_rate"] == 0.1
    assert apply("++model.hf_config.head_dim=32").model.hf_config["head_dim"] == 32
    assert apply("++train.train_iters=3").train.train_iters == 3
    assert apply("+checkpoint.save=run").checkpoint.save == "run"
    assert "head_dim" not in apply("~model.hf_config.head_dim").model.hf_config
    assert "head_dim" not in apply("~model.hf_config.head_dim=64").model.hf_config
    assert apply("~train.train_iters").train.train_iters == ConfigContainer().train.train_iters
    assert apply("~optimizer").optimizer == ConfigContainer().optimizer
    assert apply("~checkpoint.save_interval=500").checkpoint.save_interval is None
    nested = apply("model.hf_config.rope_scaling.factor=8", "model.pipeline_model_parallel_layout=[[embedding],[loss]]")
    assert nested.model.hf_config["rope_scaling"]["factor"] == 8
    assert nested.model.hf_config["rope_scaling"]["rope_type"] == "llama3"
    assert nested.model.pipeline_model_parallel_layout == [["embedding"], ["loss"]]


def test_the_last_recipe_and_the_last_proxy_count() -> None:
    words = sort_words(["recipe=a", "x.y=1", "recipe=b.c", "proxy=true", "proxy=false", "recipes.z=1"])
    assert (words.recipe, words.proxy, words.overrides) == ("b.c", False, ("x.y=1", "recipes.z=1"))


@pytest.mark.parametrize("name", sparing(is_whole))
def test_a_saved_recipe_is_the_same_run(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    save_config(config, tmp_path / "run.yaml")
    assert load_config(config_file=str(tmp_path / "run.yaml")) == config


@pytest.mark.parametrize(
    ("recipe", "words", "world_size", "message"),
    [
        ("llama3_70b", [], 8, "TP=4 x PP=4 x CP=2 needs a multiple of 32 ranks, and there are 8"),
        ("qwen3_30b_a3b", ["model.expert_tensor_parallel_size=4"], 16, "EP=4 x ETP=4 x PP=2 need a multiple of 32"),
        ("llama32_1b", ["model.tensor_model_parallel_size=5"], 5, "num_attention_heads=32 is not a multiple"),
        ("qwen3_30b_a3b", ["model.expert_model_parallel_size=3"], 24, "num_moe_experts=128 is not a multiple of"),
        ("qwen3_30b_a3b", ["model.sequence_parallel=false"], 8, "needs model.sequence_parallel=true"),
        ("llama31_405b", ["model.account_for_loss_in_pipeline_split=false"], 256, "Megatron-Core refuses"),
        ("qwen3_8b", ["model.pipeline_model_parallel_size=5"], 20, "num_layers=36 is not a multiple"),
        ("qwen3_8b", [f"{STAGES}_layout=Et|t|tL", f"{STAGES}_size=2"], 8, "does not list the stages"),
        ("qwen3_8b", ["model.moe_grouped_gemm=true"], 4, "model.moe_grouped_gemm is set, and the model has no experts"),
        ("qwen3_8b", ["model.recompute_granularity=full"], 4, "needs model.recompute_method"),
        ("qwen3_8b", ["model.recompute_method=uniform"], 4, "are for model.recompute_granularity=full"),
        ("qwen3_8b", ["model.recompute_modules=[mpl]"], 4, "model.recompute_modules='mpl' is not one of"),
        ("qwen3_8b", ["mixed_precision=bf16_with_mxfp8_mixed"], 4, "set mixed_precision=bf16_mixed"),
        ("qwen3_8b", ["model.hf_config.model_type=qwen9"], 4, "model_type='qwen9' is not known to transformers"),
    ],
)
def test_contradictions_are_refused_before_a_process_group(
    recipe: str, words: list[str], world_size: int, message: str
) -> None:
    config = load_run([f"recipe={recipe}.pretrain", "train.global_batch_size=7200", "train.micro_batch_size=1", *words])
    with pytest.raises(ConfigError) as caught:
        check_config(config, world_size=world_size)
        make_provider(config, None)
    assert message in str(caught.value)
