"""How vLLM and SGLang want to be broadcast to: what lies in which broadcast, and what their HTTP routes are told. Pure.

Their receivers take whole HF tensors from rank 0 of a group, in the order of a list of names that was posted before,
and trust every byte. Both sides cut the list into broadcasts by the same rule; where the cut differs by one tensor,
the transfer hangs or loads garbage. Read in vLLM 0.32 (`packed_tensor.py`, `nccl_engine.py` of its
`distributed/weight_transfer`) and SGLang 0.5.23 (`srt/weight_sync/tensor_bucket.py`, `srt/managers/io_struct.py`).

    for bucket in plan_sglang_buckets(specs, 512 << 20):
        payload = sglang_update_payload(bucket, group_name="weights", flush_cache=False)
    buckets = plan_vllm_packed(specs, buffer_bytes=1 << 30)
    info = vllm_update_info(specs)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec, check_unique_names, dtype_name

VLLM_BUFFER_BYTES = 1 << 30
VLLM_NUM_BUFFERS = 2
SGLANG_BUCKET_BYTES = 512 << 20
SGLANG_GROUP_NAME = "weight_update_group"


@dataclass(frozen=True, slots=True)
class NamedBucket:
    """One broadcast: the bytes of `specs` one after the other, without gaps. `is_single` where it has a dtype."""

    specs: tuple[TensorSpec, ...]
    num_bytes: int
    is_single: bool = False


def plan_vllm_packed(specs: Sequence[TensorSpec], buffer_bytes: int = VLLM_BUFFER_BYTES) -> tuple[NamedBucket, ...]:
    """vLLM's `packed` rule: tensors are appended, in order, until their bytes exceed `buffer_bytes`; then they go.

    So a bucket is larger than the buffer by up to a tensor, and nothing is aligned. Both sides must have the same
    `buffer_bytes`, which `vllm_init_info` tells the workers. Raises `ConfigError` where a tensor would lie at no
    multiple of its element size, which vLLM cannot view: give the specs in the order of `sort_by_itemsize`.
    """
    check_unique_names(specs)
    if buffer_bytes < 1:
        raise ConfigError(f"buffer_bytes must be at least 1, got {buffer_bytes}; vLLM's own is {VLLM_BUFFER_BYTES}")
    buckets: list[NamedBucket] = []
    held: list[TensorSpec] = []
    num_bytes = 0
    for spec in specs:
        held.append(spec)
        num_bytes += spec.num_bytes
        if num_bytes > buffer_bytes:
            buckets.append(NamedBucket(tuple(held), num_bytes))
            held, num_bytes = [], 0
    if held:
        buckets.append(NamedBucket(tuple(held), num_bytes))
    for bucket in buckets:
        _check_aligned(bucket)
    return tuple(buckets)


def sort_by_itemsize(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """By falling element size, else in their order: wherever a bucket begins, all its tensors are aligned."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def _check_aligned(bucket: NamedBucket) -> None:
    at = 0
    for spec in bucket.specs:
        if at % spec.dtype.itemsize:
            raise ConfigError(
                f"{spec.name} ({dtype_name(spec.dtype)}) would begin at byte {at} of a packed buffer, where its "
                "receiver cannot view it; plan and announce sort_by_itemsize(specs)"
            )
        at += spec.num_bytes


def plan_singles(specs: Sequence[TensorSpec]) -> tuple[NamedBucket, ...]:
    """A broadcast a tensor, in order: vLLM without `packed`, SGLang without a `load_format`."""
    check_unique_names(specs)
    return tuple(NamedBucket((spec,), spec.num_bytes, is_single=True) for spec in specs)


def plan_sglang_buckets(
    specs: Sequence[TensorSpec], bucket_bytes: int = SGLANG_BUCKET_BYTES
) -> tuple[NamedBucket, ...]:
    """SGLang's `flattened_bucket`: at most `bucket_bytes` each, or one tensor that is larger.

    A receiver puts tensors back to back in the order in which they are named, and refuses one that does not lie at a
    multiple of its element size ("Unaligned received tensor"). It knows no padding, so each bucket names its tensors by
    falling element size: then every start is a multiple of what follows. The buckets themselves keep the order given.
    """
    check_unique_names(specs)
    if bucket_bytes < 1:
        raise ConfigError(
            f"bucket_bytes must be at least 1, got {bucket_bytes}; {SGLANG_BUCKET_BYTES} is a good choice"
        )
    buckets: list[NamedBucket] = []
    held: list[TensorSpec] = []
    num_bytes = 0
    for spec in specs:
        if held and num_bytes + spec.num_bytes > bucket_bytes:
            buckets.append(_by_itemsize(held, num_bytes))
            held, num_bytes = [], 0
        held.append(spec)
        num_bytes += spec.num_bytes
    if held:
        buckets.append(_by_itemsize(held, num_bytes))
    return tuple(buckets)


def _by_itemsize(specs: list[TensorSpec], num_bytes: int) -> NamedBucket:
    return NamedBucket(tuple(sort_by_itemsize(specs)), num_bytes)


def vllm_init_info(
    *,
    rank_offset: int,
    world_size: int,
    packed: bool = True,
    buffer_bytes: int = VLLM_BUFFER_BYTES,
    num_buffers: int = VLLM_NUM_BUFFERS,
    master: tuple[str, int] | None = None,
    unique_id_b64: str | None = None,
) -> dict[str, Any]:
    """`init_info` for one engine's `/init_weight_transfer_engine`, backend `nccl`.

    Each engine gets a `rank_offset` of its own (`assign_rank_offsets`): vLLM's own trainer always sends 1, which serves
    one deployment. Exactly one of `master` (host and port of a store) and `unique_id_b64` (an NCCL id) is given.
    """
    if (master is None) == (unique_id_b64 is None):
        raise ConfigError("give vLLM either the master's host and port or an NCCL unique id, and not both")
    if not 1 <= rank_offset < world_size:
        raise ConfigError(f"rank_offset {rank_offset} is no worker's rank in a group of {world_size}: rank 0 sends")
    meeting: dict[str, Any] = {"nccl_unique_id_b64": unique_id_b64}
    if master is not None:
        meeting = {"master_address": master[0], "master_port": master[1]}
    return {
        **meeting,
        "rank_offset": rank_offset,
        "world_size": world_size,
        "packed": packed,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": num_buffers,
    }


def vllm_update_info(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """`update_info` for `/update_weights`, backend `nccl`: what comes, in the order in which it comes."""
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [dtype_name(spec.dtype) for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


def sglang_init_payload(
    master: tuple[str, int], *, rank_offset: int, world_size: int, group_name: str, backend: str
) -> dict[str, Any]:
    """The body of `/init_weights_update_group`: an engine's worker of tensor-parallel rank t gets `rank_offset + t`."""
    if not 1 <= rank_offset < world_size or not group_name:
        raise ConfigError(
            f"rank_offset {rank_offset} in a group {group_name!r} of {world_size}: give a name, and ranks from 1 on"
        )
    return {
        "master_address": master[0],
        "master_port": master[1],
        "rank_offset": rank_offset,
        "world_size": world_size,
        "group_name": group_name,
        "backend": backend,
    }


def sglang_update_payload(
    bucket: NamedBucket,
    *,
    group_name: str,
    flush_cache: bool = False,
    weight_version: str | None = None,
    selector: str = "all",
) -> dict[str, Any]:
    """The body of `/update_weights_from_distributed` for one bucket.

    SGLang takes on `weight_version` with the bucket that carries it, so it belongs on the last one only; the cache is
    flushed once, after it.
    """
    payload: dict[str, Any] = {
        "names": [spec.name for spec in bucket.specs],
        "dtypes": [dtype_name(spec.dtype) for spec in bucket.specs],
        "shapes": [list(spec.shape) for spec in bucket.specs],
        "group_name": group_name,
        "flush_cache": flush_cache,
        "selector": selector,
    }
    if not bucket.is_single:
        payload["load_format"] = "flattened_bucket"
    if weight_version is not None:
        payload["weight_version"] = weight_version
    return payload
