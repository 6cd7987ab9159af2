"""Reading, overriding, checking and saving a configuration."""

import ast
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from weightcast.bridges import GPTModelProvider
from weightcast.sync.errors import ConfigError
from weightcast.trainer import config as config_module
from weightcast.trainer.checks import check_config
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.overrides import known_keys, load_config, save_config

IN_PLACE = ["publish.to=ipc:///tmp/x", "publish.expose=[cuda_ipc]", "publish.delta=off", "publish.in_place=true"]
SFT = ("dataset.kind=sft", "dataset.dataset_name=x")


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  train_iters: 7\n  global_batch_size: 4\noptimizer: {lr: 1e-2}\n")
    config = load_config(["train.train_iters=9", "train.train_iters=5", "model.hf_path=x"], config_file=str(file))
    assert (config.train.train_iters, config.train.global_batch_size) == (5, 4)
    assert config.optimizer.lr == 0.01
    assert config.model.hf_path == "x"
    assert config.train.micro_batch_size == ConfigContainer().train.micro_batch_size


@pytest.mark.parametrize(
    ("word", "section", "key", "value"),
    [
        ("dataset.files=[a.txt, 'b c.txt']", "dataset", "files", ["a.txt", "b c.txt"]),
        ("publish.to=tcp://127.0.0.1:5600", "publish", "to", "tcp://127.0.0.1:5600"),
        ("publish.to=null", "publish", "to", None),
        ("publish.expose=[cuda_ipc, tcp]", "publish", "expose", ["cuda_ipc", "tcp"]),
        ("publish.in_place=true", "publish", "in_place", True),
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("model.sequence_parallel=true", "model", "sequence_parallel", True),
        ("model.virtual_pipeline_model_parallel_size=2", "model", "virtual_pipeline_model_parallel_size", 2),
        ("model.hf_path=/models/1=2", "model", "hf_path", "/models/1=2"),
    ],
)
def test_overrides_are_typed(word: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_config([word]), section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.train_iter=5", "did you mean 'train.train_iters'"),
        ("tensor_model_parallel_size=2", "did you mean 'model.tensor_model_parallel_size'"),
        ("train=5", "it is a section, with the settings train.micro_batch_size"),
        ("zzz.q=1", "the sections are model, train, optimizer"),
        ("train.train_iters", "write section.key=value"),
        ("=5", "write section.key=value"),
        ("train.train_iters=many", "could not be converted to Integer"),
        ("train.train_iters=2.5", "could not be converted to Integer"),
        ("train.micro_batch_size=null", "train.micro_batch_size"),
        ("train.rampup_batch_size=8", "it is a list, and is written in brackets"),
        ("train.train_iters.x=1", "train.train_iters"),
        ("dataset.files=[a", "quote it"),
    ],
)
def test_wrong_overrides_are_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([word])
    assert message in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize("text", ["train: {train_iter: 5}", "- 1", "train: [", "train: 5"])
def test_wrong_files_are_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(config_file=str(file))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(config_file=str(tmp_path / "none.yaml"))


def test_saved_configuration_starts_the_same_run(tmp_path: Path) -> None:
    config = load_config(["dataset.files=[a, b]", "mixed_precision=fp32", "model.tensor_model_parallel_size=2"])
    save_config(config, tmp_path / "run.yaml")
    assert load_config(config_file=str(tmp_path / "run.yaml")) == config


def test_a_misspelt_attribute_is_refused_in_python() -> None:
    with pytest.raises(AttributeError):
        ConfigContainer().train.train_iter = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["__init__", *(module.name for module in pkgutil.iter_modules(config_module.__path__))]
)
def test_every_field_says_what_it_means(name: str) -> None:
    """A string follows each field, but for the sections of the container."""
    source = Path(config_module.__path__[0], f"{name}.py").read_text()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field_node, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field_node, ast.AnnAssign) and not ast.unparse(field_node).endswith("Config)"):
                assert isinstance(following, ast.Expr), f"{node.name}.{ast.unparse(field_node.target)} has no line"


def test_known_keys_are_the_fields() -> None:
    keys = list(known_keys())
    assert len(keys) == len(set(keys))
    assert {key.partition(".")[0] for key in keys} == {item.name for item in fields(ConfigContainer)}


def test_layout_is_worked_out() -> None:
    words = ["train.global_batch_size=12", "train.micro_batch_size=2", "model.tensor_model_parallel_size=2"]
    layout = check_config(load_config(words), world_size=4)
    assert (layout.data_parallel_size, layout.num_microbatches) == (2, 3)


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (["model.tensor_model_parallel_size=4"], 2, "torchrun --nproc-per-node 4"),
        (["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"], 6, "multiple of 4 ranks"),
        (["model.context_parallel_size=2"], 1, "TP=1 x PP=1 x CP=2 needs a multiple of 2 ranks"),
        (["model.context_parallel_size=2", "dataset.seq_length=18"], 2, "make it a multiple of 4"),
        (["model.expert_model_parallel_size=2"], 1, "EP=2 x ETP=1 x PP=1 need a multiple of 2 ranks"),
        (["train.global_batch_size=3"], 2, "make it a multiple of 2"),
        (["train.micro_batch_size=3"], 1, "make it a multiple of 3"),
        (["train.train_iters=0"], 1, "train.train_iters is 0"),
        (["model.sequence_parallel=true"], 1, "tensor_model_parallel_size of 2 or more"),
        (
            ["model.sequence_parallel=true", "model.tensor_model_parallel_size=2", "dataset.seq_length=33"],
            2,
            "multiple of it",
        ),
        (["model.virtual_pipeline_model_parallel_size=2"], 1, "pipeline_model_parallel_size >= 2"),
        (
            [
                "model.virtual_pipeline_model_parallel_size=2",
                "model.pipeline_model_parallel_size=2",
                "train.global_batch_size=3",
            ],
            2,
            "multiples of PP=2",
        ),
        (["scheduler.lr_decay_style=cosin"], 1, "is not one of: constant, linear, cosine"),
        (["scheduler.lr_warmup_iters=10"], 1, "shorter than the 10 steps or 80 samples"),
        (["train.train_samples=80"], 1, "set one of them to null, such as train.train_iters=null"),
        (["train.train_iters=null"], 1, "set train.train_iters (steps) or train.train_samples"),
        (["train.train_iters=null", "train.train_samples=0"], 1, "train.train_samples is 0"),
        (["train.train_iters=null", "train.train_samples=7"], 1, "less than the 8 samples of the first step"),
        (["train.rampup_batch_size=[4,4]"], 1, "must be three numbers above 0: [start, increment, samples]"),
        (["train.rampup_batch_size=[4,4,0]"], 1, "must be three numbers above 0"),
        (["train.rampup_batch_size=[8,8,80]"], 1, "begin below it, with an increment that divides the difference"),
        (["train.rampup_batch_size=[2,4,80]"], 1, "does not go from 2 in steps of 4 up to train.global_batch_size=8"),
        (["train.rampup_batch_size=[1,1,80]"], 2, "the start of train.rampup_batch_size=1 cannot be divided"),
        (
            ["train.rampup_batch_size=[2,1,80]", "train.global_batch_size=4"],
            2,
            "the increment of train.rampup_batch_size=1",
        ),
        (
            [
                "model.virtual_pipeline_model_parallel_size=2",
                "model.pipeline_model_parallel_size=2",
                "train.rampup_batch_size=[2,3,80]",
            ],
            2,
            "and a step of 5 samples has 5",
        ),
        (["scheduler.lr_warmup_fraction=0.1", "scheduler.lr_warmup_iters=1"], 1, "keep one"),
        (["scheduler.lr_warmup_fraction=1"], 1, "from 0 to below 1"),
        (["scheduler.lr_decay_style=WSD"], 1, "needs scheduler.lr_wsd_decay_iters"),
        (["scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=11"], 1, "at most the 80 samples"),
        (["scheduler.end_weight_decay=0.2"], 1, "use linear or cosine"),
        (["scheduler.end_weight_decay=0.01"], 1, "nor down"),
        (["train.nan_action=hope"], 1, "is not one of: stop, skip"),
        (["train.eval_interval=0"], 1, "train.eval_interval is 0"),
        (["dataset.files=a.txt"], 1, "it is a list, and is written in brackets, such as dataset.files=["),
        (["train.eval_at_start=true"], 1, "train.eval_at_start is set and train.eval_interval is not"),
        (["train.manual_gc_interval=5"], 1, "train.manual_gc is not"),
        (["train.iterations_to_skip=[3, 11]"], 1, "names step 11"),
        (["checkpoint.async_save=true"], 1, "say where to save"),
        (["checkpoint.finetune=true"], 1, "say which folder to load from"),
        (["checkpoint.pretrained_checkpoint=/nowhere"], 1, "there is no folder '/nowhere'"),
        (["logger.straggler_interval=0"], 1, "logger.straggler_interval is 0"),
        (["optimizer.min_lr=1"], 1, "between 0 and optimizer.lr"),
        (["mixed_precision=fp8"], 1, "is not one of: null, fp32, bf16_mixed, fp16_mixed, bf16_with_fp8"),
        (["publish.to=ipc:///tmp/x", "publish.hold_next_step=true"], 1, "set publish.overlap=true too"),
        (["ddp.overlap_param_gather=true"], 1, "needs ddp.overlap_grad_reduce=true"),
        (["checkpoint.save_interval=0"], 1, "checkpoint.save_interval is 0; it must be more than 0"),
        (["publish.wait_for=1"], 1, "publish.to is not"),
        (["publish.to=tcp://127.0.0.1:0"], 2, "name a port that is free"),
        (["publish.delta=sometimes"], 1, "publish.delta='sometimes' is not known; use one of auto, on, off, zstd"),
        (["publish.expose=[cuda_ipc]"], 1, "publish.expose is set and publish.to is not"),
        (["publish.in_place=true"], 1, "publish.in_place is set and publish.to is not"),
        (["publish.to=/shared/versions", "publish.expose=[]"], 1, "publish.expose does not apply to /shared/versions"),
        (["publish.to=ipc:///tmp/x", "publish.expose=[rdma]"], 1, "no such kind of memory: rdma; allowed are"),
        (["publish.to=ipc:///tmp/x", "publish.expose=[tcp]"], 1, "TCP links need an address such as tcp://"),
        (
            ["publish.to=ipc:///tmp/x", "publish.in_place=true"],
            1,
            "with publish.delta=auto: the parameters are read where they lie",
        ),
        ([*IN_PLACE, "publish.delta=on"], 1, "set publish.delta=off"),
        ([*IN_PLACE, "publish.overlap=true"], 1, "Set publish.hold_next_step=true"),
        (["publish.report_log=reports.jsonl"], 1, "publish.report_log is set and publish.to is not"),
        (["publish.metrics_port=9464"], 1, "publish.metrics_port is set and publish.to is not"),
        (["publish.to=tcp://127.0.0.1:5600", "publish.metrics_port=70000"], 1, "use 1 to 65535, or 0"),
        (["publish.quantize=int4"], 1, "publish.quantize='int4' is not one of: none, fp8_block, fp8_tensor"),
        (["publish.quantize=fp8_block"], 1, "publish.quantize is set and publish.to is not"),
        (["publish.modules_to_not_convert=[mlp.down_proj]"], 1, "are for quantised publishing"),
        (["publish.engine_config=x.json"], 1, "are for quantised publishing"),
        (["dataset.kind=mok"], 1, "dataset.kind='mok' is not one of: text, mock, sft, indexed"),
        (["dataset.kind=mock", f"dataset.files=[{__file__}]"], 1, "dataset.files is for dataset.kind=text or sft"),
        (
            ["dataset.packed_sequence=true"],
            1,
            "dataset.packed_sequence is for dataset.kind=sft, and the kind is 'text'",
        ),
        (["dataset.split='0,1'"], 1, "such as 9999,8,2"),
        (["dataset.kind=sft"], 1, "needs either dataset.files or dataset.dataset_name"),
        ([*SFT, f"dataset.files=[{__file__}]"], 1, "and not both"),
        ([*SFT, "dataset.too_long=cut"], 1, "dataset.too_long='cut' is not one of: truncate, drop, refuse"),
        ([*SFT, "dataset.prompt_template='{output} {input}'"], 1, "must end with {output} and have it once"),
        ([*SFT, "dataset.val_proportion=0.5", "dataset.test_proportion=0.5"], 1, "leave something to train on"),
        ([*SFT, "dataset.val_proportion=0.5", f"dataset.validation_files=[{__file__}]"], 1, "keep one of them"),
        ([*SFT, "dataset.packed_sequence=true", "train.micro_batch_size=2"], 1, "needs train.micro_batch_size=1"),
        (["dataset.kind=indexed"], 1, "needs either dataset.data_path, or dataset.train_data_path"),
        (["dataset.kind=indexed", "dataset.data_path=[a]", "dataset.valid_data_path=[b]"], 1, "needs either"),
        (["dataset.kind=indexed", "dataset.train_data_path=[a]", "dataset.split='8,1,1'"], 1, "name the other splits'"),
        (["dataset.files=[/nowhere/a.txt]"], 1, "there is no file '/nowhere/a.txt'"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(words: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config(words), world_size=world_size)
    assert message in str(caught.value)


def test_a_provider_with_context_parallelism_is_checked() -> None:
    config = ConfigContainer(model=GPTModelProvider(context_parallel_size=2, num_layers=2, num_attention_heads=2))
    config.dataset.seq_length = 6
    with pytest.raises(ConfigError, match="make it a multiple of 4"):
        check_config(config, world_size=2)
