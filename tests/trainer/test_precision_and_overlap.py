"""`mixed_precision` and `comm_overlap`: names, records and words; what is refused; what Megatron's records then say."""

from pathlib import Path
from typing import Any

import pytest
import torch

import weightcast.bridges  # noqa: F401  (first: it quietens Megatron's import-time notices)
from weightcast.bridges import AutoBridge
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks import check_config
from weightcast.trainer.comm_overlap import CommOverlapConfig, apply_overlap
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.config.precision import PRECISIONS, precision_record
from weightcast.trainer.data_parallel import data_parallel_settings
from weightcast.trainer.mixed_precision import MixedPrecisionConfig, apply_precision, bf16_mixed, fp16_mixed
from weightcast.trainer.overrides import load_config, save_config

TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
SP, VPP2 = "model.sequence_parallel=true", "model.virtual_pipeline_model_parallel_size=2"
MOE = "comm_overlap.overlap_moe_expert_parallel_comm=true"
GATHER = "ddp.overlap_param_gather=true"


def loaded_from(text: str, tmp_path: Path, *words: str) -> ConfigContainer:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(words, config_file=str(file))


def test_a_name_a_record_a_file_and_words_say_the_same(tmp_path: Path) -> None:
    record = MixedPrecisionConfig(bf16=True, grad_reduce_in_fp32=False)
    by_words = load_config(["mixed_precision=bf16_mixed", "mixed_precision.grad_reduce_in_fp32=false"])
    by_file = loaded_from("mixed_precision: {bf16: true, grad_reduce_in_fp32: false}\n", tmp_path)
    mixed = loaded_from("mixed_precision: bf16_mixed\n", tmp_path, "mixed_precision.grad_reduce_in_fp32=false")
    in_python = load_config(base=ConfigContainer(mixed_precision=record))
    for config in (by_words, by_file, mixed, in_python):
        assert config.mixed_precision == record
    assert load_config(["mixed_precision=bf16-mixed"]).mixed_precision == "bf16-mixed"
    assert precision_record("bf16-mixed") == bf16_mixed() == MixedPrecisionConfig(bf16=True)
    assert load_config(["mixed_precision.bf16=true", "mixed_precision=fp32"]).mixed_precision == "fp32"
    assert load_config(["mixed_precision=bf16_mixed", "~mixed_precision"]).mixed_precision is None
    assert (
        load_config(["mixed_precision=bf16_mixed", "~mixed_precision.bf16"]).mixed_precision == MixedPrecisionConfig()
    )


def test_the_section_of_overlap_is_there_once_a_field_is_set(tmp_path: Path) -> None:
    assert load_config().comm_overlap is None
    expected = CommOverlapConfig(overlap_grad_reduce=True)
    assert load_config(["comm_overlap.overlap_grad_reduce=true"]).comm_overlap == expected
    assert loaded_from("comm_overlap: {overlap_grad_reduce: true}\n", tmp_path).comm_overlap == expected
    assert loaded_from("comm_overlap: {}\n", tmp_path).comm_overlap == CommOverlapConfig()
    assert load_config(["comm_overlap.bucket_size=5", "comm_overlap=null"]).comm_overlap is None
    nested = load_config(["+comm_overlap.tp_comm_overlap_cfg.proj_fprop.method=pipeline"]).comm_overlap
    assert nested.tp_comm_overlap_cfg == {"proj_fprop": {"method": "pipeline"}}


def test_torchs_dtypes_are_taken_by_their_names() -> None:
    record = MixedPrecisionConfig(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype="bf16")  # type: ignore[arg-type]
    assert (record.params_dtype, record.pipeline_dtype) == ("bfloat16", "bfloat16")
    record.autocast_dtype = torch.half  # type: ignore[assignment]
    assert record.autocast_dtype == "float16"
    with pytest.raises(AttributeError):
        record.bf61 = True


def test_records_are_saved_and_read_back(tmp_path: Path) -> None:
    overlap = CommOverlapConfig(tp_comm_overlap=True, tp_comm_overlap_cfg={"qkv_fprop": {"method": "ring_exchange"}})
    precision = MixedPrecisionConfig(fp16=True, params_dtype=torch.float16, loss_scale=1024)  # type: ignore[arg-type]
    for given in (precision, "bf16_mixed", None):
        config = ConfigContainer(mixed_precision=given, comm_overlap=overlap)
        save_config(config, tmp_path / "run.yaml")
        assert load_config(config_file=str(tmp_path / "run.yaml")) == config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mixed_precision.grad_reduce_fp32=true", "did you mean 'mixed_precision.grad_reduce_in_fp32'"),
        ("comm_overlap.tp_com_overlap=true", "did you mean 'comm_overlap.tp_comm_overlap'"),
        ("delay_wgrad_compute=true", "did you mean 'comm_overlap.delay_wgrad_compute'"),
        ("mixed_precision.bf16=maybe", "mixed_precision.bf16: Value 'maybe' is not a valid bool"),
        ("comm_overlap.bucket_size=1.5", "could not be converted to Integer"),
        ("~comm_overlap.bucket_sizes", "did you mean 'comm_overlap.bucket_size'"),
    ],
)
def test_wrong_words_are_named(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([word])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_name_stands_for_a_record_that_holds(name: str) -> None:
    check_config(ConfigContainer(mixed_precision=name), world_size=1)
    record = precision_record(name)
    assert record.dtype == ("float32" if name == "fp32" else "float16" if name == "fp16_mixed" else "bfloat16")


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (["mixed_precision=bf16_mixd"], 1, "did you mean 'bf16_mixed'?"),
        (["mixed_precision=5"], 1, "neither a name such as bf16_mixed nor a MixedPrecisionConfig"),
        (["mixed_precision=bf16_mixed", "mixed_precision.fp16=true"], 1, "are both true: set one of them to false"),
        (
            ["mixed_precision.bf16=true", "mixed_precision.params_dtype=fp16"],
            1,
            "contradicts mixed_precision.bf16=true",
        ),
        (["mixed_precision.params_dtype=int8"], 1, "is not one of: null, float32, bfloat16, float16"),
        (["mixed_precision.bf16=true", "mixed_precision.pipeline_dtype=float32"], 1, "leave it out, or set both alike"),
        (["mixed_precision.autocast_dtype=bfloat16"], 1, "mixed_precision.autocast_enabled is not"),
        (["mixed_precision.fp8=e5m2"], 1, "is not one of: null, e4m3, hybrid"),
        (["mixed_precision.fp8_recipe=mxfp8"], 1, "is for mixed_precision.fp8, which is not set"),
        (["mixed_precision=fp32", "mixed_precision.fp8=hybrid"], 1, "products of 16-bit weights"),
        (["mixed_precision=bf16_with_nvfp4_mixed", "mixed_precision.fp8=hybrid"], 1, "keep one of them"),
        (
            ["mixed_precision=bf16_with_fp8_delayed_scaling_mixed", "mixed_precision.first_last_layers_bf16=true"],
            1,
            "or the recipe to tensorwise",
        ),
        (
            ["mixed_precision=bf16_with_fp8_subchannel_scaling_mixed", "mixed_precision.num_layers_at_end_in_bf16=1"],
            1,
            "for mixed_precision.first_last_layers_bf16=true",
        ),
        (
            ["mixed_precision=bf16_with_mxfp8_mixed", "mixed_precision.fp8_param=true"],
            1,
            "contradicts mixed_precision.fp8_param_gather=false",
        ),
        (
            ["mixed_precision=bf16_with_mxfp8_mixed", "mixed_precision.fp8_param_gather=true"],
            1,
            "it is true with fp8_recipe=mxfp8",
        ),
        (
            [
                "mixed_precision=bf16_with_fp8_current_scaling_mixed",
                "mixed_precision.fp8_param_gather=true",
                "ddp.use_distributed_optimizer=false",
            ],
            1,
            "needs ddp.use_distributed_optimizer=true",
        ),
        (["mixed_precision=bf16_mixed", "mixed_precision.loss_scale=8"], 1, "is for mixed_precision.fp16"),
        (["mixed_precision=fp16_mixed", "mixed_precision.hysteresis=0"], 1, "mixed_precision.hysteresis is 0"),
        (["mixed_precision=fp16_mixed", "mixed_precision.initial_loss_scale=0.5"], 1, "is below mixed_precision.min"),
        (
            ["mixed_precision=fp16_mixed", "ddp.grad_reduce_in_fp32=true"],
            1,
            "mixed_precision.grad_reduce_in_fp32=false and ddp.grad_reduce_in_fp32=true contradict each other",
        ),
        (["comm_overlap=true"], 1, "is no CommOverlapConfig"),
        (["comm_overlap.tp_comm_overlap=true"], 1, "needs model.tensor_model_parallel_size of 2 or more"),
        (["comm_overlap.tp_comm_overlap=true", TP2], 2, "needs model.sequence_parallel=true"),
        (["comm_overlap.tp_comm_bootstrap_backend=gloo"], 1, "and comm_overlap.tp_comm_overlap is not"),
        (["comm_overlap.tp_comm_bootstrap_backend=ucc"], 1, "is not one of: null, nccl, mpi, gloo"),
        (["+comm_overlap.tp_comm_overlap_cfg.proj_prop.num_sm=1"], 1, "did you mean 'proj_fprop'?"),
        (["comm_overlap.overlap_p2p_comm=true"], 1, "is about pipeline stages, and there is one"),
        (["comm_overlap.overlap_p2p_comm=true", PP2], 2, "interleaved stages (model.virtual"),
        (["comm_overlap.overlap_p2p_comm=false", PP2, VPP2], 2, "always overlap and others never do"),
        (["comm_overlap.batch_p2p_comm=true", PP2, VPP2], 2, "is not for interleaved stages"),
        (["comm_overlap.wgrad_deferral_limit=2"], 1, "comm_overlap.defer_embedding_wgrad_compute is not"),
        (["comm_overlap.defer_embedding_wgrad_compute=true"], 1, "with one stage no rank waits"),
        (["comm_overlap.overlap_grad_reduce=false", "ddp.overlap_grad_reduce=true"], 2, "contradict each other"),
        (["comm_overlap.bucket_size=5", "ddp.bucket_size=6"], 2, "bucket_size=5 and ddp.bucket_size=6 contradict"),
        (["comm_overlap.bucket_size=0"], 1, "comm_overlap.bucket_size is 0"),
        (["comm_overlap.overlap_param_gather=true"], 1, "needs ddp.overlap_grad_reduce=true"),
        (
            [GATHER, "ddp.overlap_grad_reduce=true", "ddp.use_distributed_optimizer=false"],
            2,
            "use_distributed_optimizer",
        ),
        (["comm_overlap.align_param_gather=true"], 2, "needs overlap_param_gather=true and interleaved stages"),
        (
            ["comm_overlap.overlap_param_gather_with_optimizer_step=true", PP2, VPP2, "checkpoint.save=x"],
            4,
            "cannot be saved or resumed",
        ),
        (["comm_overlap.delay_wgrad_compute=true"], 1, "to hide behind: set that to true too"),
        ([MOE], 1, "needs model.expert_model_parallel_size of 2 or more"),
        ([MOE, "model.expert_model_parallel_size=2", PP2], 4, "needs model.virtual_pipeline_model_parallel_size where"),
        ([MOE, "model.expert_model_parallel_size=2", "mixed_precision=fp32"], 2, "needs 16-bit weights"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(words: list[str], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config([*words, "train.global_batch_size=8"]), world_size=world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["comm_overlap.tp_comm_overlap=true", TP2, SP], "or set comm_overlap.tp_comm_overlap=false"),
        ([MOE, "model.expert_model_parallel_size=2"], "needs a GPU and Transformer Engine"),
        (["comm_overlap.defer_embedding_wgrad_compute=true", PP2], "needs a GPU and Transformer Engine"),
        (["mixed_precision=bf16_with_mxfp8_mixed"], "set mixed_precision=bf16_mixed"),
        (["mixed_precision.bf16=true", "mixed_precision.fp4=e2m1"], "mixed_precision=e2m1 (fp8 or fp4) needs a GPU"),
        (["mixed_precision.bf16=true", "mixed_precision.autocast_enabled=true"], "autocast_enabled needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what a machine without a GPU is told")
def test_what_needs_a_gpu_is_refused_before_a_process_group(words: list[str], message: str, qwen3: Path) -> None:
    config = load_config(words)
    check_config(config, world_size=2)
    provider = AutoBridge.from_hf_pretrained(qwen3).to_megatron_provider(load_weights=False)
    with pytest.raises(ConfigError) as caught:
        apply_precision(config.mixed_precision, provider)
        apply_overlap(config, provider)
    assert message in str(caught.value)


def test_the_provider_has_what_the_sections_say(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that Megatron's `TransformerConfig` is told, as on a machine that has Transformer Engine."""
    for module in ("mixed_precision", "comm_overlap"):
        monkeypatch.setattr(f"weightcast.trainer.{module}.has_transformer_engine", lambda: True)
    provider = AutoBridge.from_hf_pretrained(qwen3).to_megatron_provider(load_weights=False)
    words = ["mixed_precision=bf16_with_fp8_current_scaling_mixed", "mixed_precision.fp8_param_gather=true"]
    words += ["comm_overlap.tp_comm_overlap=true", "comm_overlap.tp_comm_bootstrap_backend=gloo"]
    words += ["comm_overlap.batch_p2p_comm=false", MOE, "comm_overlap.delay_wgrad_compute=true"]
    config = load_config(words)
    apply_precision(config.mixed_precision, provider)
    apply_overlap(config, provider)
    expected: dict[str, Any] = {
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "fp8_param": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 1,
        "tp_comm_overlap": True,
        "tp_comm_bootstrap_backend": "gloo",
        "batch_p2p_comm": False,
        "overlap_moe_expert_parallel_comm": True,
        "delay_wgrad_compute": True,
        "defer_embedding_wgrad_compute": False,
    }
    assert {name: getattr(provider, name) for name in expected} == expected
    assert {setting for setting in expected if not hasattr(type(provider), setting)} <= {"params_dtype"}


@pytest.mark.parametrize(
    ("words", "replicas", "overlaps"),
    [
        ([], 8, (False, False)),
        (["comm_overlap.bucket_size=null"], 8, (True, True)),
        (["comm_overlap.bucket_size=null"], 1, (False, False)),
        (["comm_overlap.bucket_size=null", "ddp.use_distributed_optimizer=false"], 8, (False, False)),
        (["comm_overlap.bucket_size=null", "ddp.overlap_param_gather=false"], 8, (True, False)),
        (["comm_overlap.overlap_grad_reduce=false"], 8, (False, False)),
        (["ddp.overlap_grad_reduce=true"], 8, (True, False)),
        (["ddp.overlap_grad_reduce=true", "comm_overlap.overlap_param_gather=true"], 1, (True, True)),
    ],
)
def test_overlap_is_what_sections_say_or_the_layout_allows(
    words: list[str], replicas: int, overlaps: tuple[bool, bool]
) -> None:
    found = data_parallel_settings(load_config(words), replicas=replicas, interleaved=True)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == overlaps
    assert found.align_param_gather == (words != [] and "ddp.overlap_grad_reduce=true" not in words and overlaps[1])
    assert not data_parallel_settings(load_config(words), replicas=replicas, interleaved=False).align_param_gather


@pytest.mark.parametrize(
    ("words", "in_fp32"),
    [
        ([], True),
        (["mixed_precision=bf16_mixed"], True),
        (["mixed_precision=fp16_mixed"], False),
        (["mixed_precision=bf16_mixed", "ddp.grad_reduce_in_fp32=false"], False),
        (["mixed_precision.grad_reduce_in_fp32=false"], False),
    ],
)
def test_gradients_are_reduced_as_either_section_says(words: list[str], in_fp32: bool) -> None:
    found = data_parallel_settings(load_config(words), replicas=2, interleaved=False)
    assert found.grad_reduce_in_fp32 is in_fp32
    assert fp16_mixed().grad_reduce_in_fp32 is False
