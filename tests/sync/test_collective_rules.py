"""The rules of vLLM and SGLang: which tensors lie in which broadcast, and what their routes are told. Pure."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.parts import PROPERTY

from weightcast.sync.errors import ConfigError, SourceError
from weightcast.sync.regions import DTYPES, TensorSpec
from weightcast.sync.transports.collective_rules import (
    NamedBucket,
    plan_sglang_buckets,
    plan_singles,
    plan_vllm_packed,
    sglang_init_payload,
    sglang_update_payload,
    sort_by_itemsize,
    vllm_init_info,
    vllm_update_info,
)


def spec(name: str, num_bytes: int) -> TensorSpec:
    """A tensor of bytes."""
    return TensorSpec(name, torch.uint8, (num_bytes,))


def names_of(buckets: tuple[NamedBucket, ...]) -> list[str]:
    """The names in each bucket, joined."""
    return ["".join(spec.name for spec in bucket.specs) for bucket in buckets]


@pytest.mark.parametrize(
    ("sizes", "buffer_bytes", "buckets"),
    [
        ("", 10, []),
        ("5", 10, ["a"]),
        ("55", 10, ["ab"]),  # 10 does not exceed 10
        ("551", 10, ["abc"]),
        ("5511", 10, ["abc", "d"]),
        ("91", 9, ["ab"]),
        ("95", 8, ["a", "b"]),
        ("000", 1, ["abc"]),
    ],
)
def test_vllm_goes_on_until_the_buffer_is_exceeded(sizes: str, buffer_bytes: int, buckets: list[str]) -> None:
    specs = [spec(name, int(size)) for name, size in zip("abcdef", sizes, strict=False)]
    assert names_of(plan_vllm_packed(specs, buffer_bytes)) == buckets


@pytest.mark.parametrize(
    ("sizes", "bucket_bytes", "buckets"),
    [("", 10, []), ("55", 10, ["ab"]), ("551", 10, ["ab", "c"]), ("919", 9, ["a", "b", "c"]), ("99", 5, ["a", "b"])],
)
def test_sglang_stays_within_the_cap(sizes: str, bucket_bytes: int, buckets: list[str]) -> None:
    specs = [spec(name, int(size)) for name, size in zip("abcdef", sizes, strict=False)]
    assert names_of(plan_sglang_buckets(specs, bucket_bytes)) == buckets


SPECS = st.lists(
    st.builds(
        lambda dtype, shape: (dtype, tuple(shape)),
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=40,
).map(lambda rows: [TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(rows)])


@PROPERTY
@given(SPECS, st.integers(1, 2000))
def test_sglang_tensors_are_aligned_within_buckets_and_none_is_lost(specs: list[TensorSpec], bucket_bytes: int) -> None:
    buckets = plan_sglang_buckets(specs, bucket_bytes)
    at = 0
    for bucket in buckets:
        members = specs[at : at + len(bucket.specs)]
        assert sorted(bucket.specs, key=lambda s: int(s.name[1:])) == members, "buckets keep the order of the model"
        at += len(members)
        offset = 0
        for tensor in bucket.specs:
            assert offset % tensor.dtype.itemsize == 0, "SGLang: Unaligned received tensor"
            offset += tensor.num_bytes
        assert offset == bucket.num_bytes and (offset <= bucket_bytes or len(members) == 1)
    assert at == len(specs)


@PROPERTY
@given(SPECS, st.integers(1, 2000))
def test_vllm_buckets_hold_every_tensor_in_order(specs: list[TensorSpec], buffer_bytes: int) -> None:
    specs = sort_by_itemsize(specs)
    buckets = plan_vllm_packed(specs, buffer_bytes)
    assert [spec for bucket in buckets for spec in bucket.specs] == specs
    assert all(bucket.num_bytes > buffer_bytes for bucket in buckets[:-1])
    assert all(bucket.num_bytes == sum(spec.num_bytes for spec in bucket.specs) for bucket in buckets)


def test_singles_are_one_a_tensor_in_order() -> None:
    specs = [spec("a", 3), spec("b", 0)]
    buckets = plan_singles(specs)
    assert [(bucket.specs, bucket.num_bytes, bucket.is_single) for bucket in buckets] == [
        ((specs[0],), 3, True),
        ((specs[1],), 0, True),
    ]


@pytest.mark.parametrize("plan", [plan_singles, plan_vllm_packed, plan_sglang_buckets])
def test_names_are_unique_and_caps_sound(plan: object) -> None:
    with pytest.raises(SourceError, match="listed twice"):
        plan([spec("a", 1), spec("a", 1)])  # type: ignore[operator]
    if plan is not plan_singles:
        with pytest.raises(ConfigError, match="at least 1"):
            plan([spec("a", 1)], 0)  # type: ignore[operator]


SOME = (TensorSpec("w", torch.bfloat16, (2, 3)), TensorSpec("s", torch.float32, ()))


def test_vllm_payloads() -> None:
    assert vllm_update_info(SOME) == {
        "names": ["w", "s"],
        "dtype_names": ["bfloat16", "float32"],
        "shapes": [[2, 3], []],
    }
    assert vllm_init_info(rank_offset=3, world_size=5, master=("h", 1), buffer_bytes=7, num_buffers=3) == {
        "master_address": "h",
        "master_port": 1,
        "rank_offset": 3,
        "world_size": 5,
        "packed": True,
        "packed_buffer_size_bytes": 7,
        "packed_num_buffers": 3,
    }
    info = vllm_init_info(rank_offset=1, world_size=2, unique_id_b64="AA==", packed=False)
    assert info["nccl_unique_id_b64"] == "AA==" and not info["packed"] and "master_address" not in info
    for wrong in ({"master": ("h", 1), "unique_id_b64": "AA=="}, {}):
        with pytest.raises(ConfigError, match="not both"):
            vllm_init_info(rank_offset=1, world_size=2, **wrong)  # type: ignore[arg-type]
    for offset in (0, 2):
        with pytest.raises(ConfigError, match="rank 0 sends"):
            vllm_init_info(rank_offset=offset, world_size=2, master=("h", 1))


def test_sglang_payloads() -> None:
    (bucket,) = plan_sglang_buckets(SOME)
    assert math.prod(()) == 1 and bucket.num_bytes == 16
    assert sglang_update_payload(bucket, group_name="g") == {
        "names": ["s", "w"],
        "dtypes": ["float32", "bfloat16"],
        "shapes": [[], [2, 3]],
        "group_name": "g",
        "flush_cache": False,
        "selector": "all",
        "load_format": "flattened_bucket",
    }
    single = sglang_update_payload(plan_singles(SOME)[0], group_name="g", flush_cache=True, weight_version="7")
    assert "load_format" not in single and single["weight_version"] == "7" and single["flush_cache"]
    assert sglang_init_payload(("h", 1), rank_offset=2, world_size=4, group_name="g", backend="gloo") == {
        "master_address": "h",
        "master_port": 1,
        "rank_offset": 2,
        "world_size": 4,
        "group_name": "g",
        "backend": "gloo",
    }
    for wrong in ({"rank_offset": 0, "group_name": "g"}, {"rank_offset": 1, "group_name": ""}):
        with pytest.raises(ConfigError, match="give a name"):
            sglang_init_payload(("h", 1), world_size=4, backend="gloo", **wrong)  # type: ignore[arg-type]
