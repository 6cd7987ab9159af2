"""The table of cases: what is measured, against what, and what must be reached. Data; the functions are elsewhere.

Names and targets are the project's; cases without a target are there to be watched.
"""

from functools import partial
from importlib import import_module

import codec
import digests
import engines
import links
import moves
import overhead
import train_gpu
import train_step
from records import Case, CaseError, Reading, Settings, at_least, at_most

import gpu

DENSITIES = {"008": 0.008, "023": 0.023, "066": 0.066}
# dense bytes over delta bytes, plain and with zstandard
BYTES_TARGETS = {"008": (110, 170), "023": (42, 70), "066": (15, 30)}


def measure_buckets(settings: Settings) -> Reading:
    """Gloo in buckets against gloo a parameter."""
    try:
        value_s, baseline_s = import_module("collective_case").measure(settings.rounds, settings.quick)
    except SystemExit as error:
        raise CaseError(str(error)) from None
    return Reading([value_s], [baseline_s], "s", "one source, one engine", rounds=settings.rounds)


def _against(name: str, module: str, place: str, limit: float, needs: tuple[str, ...] = (), note: str = "") -> Case:
    measure = partial(moves.race, place=place, baseline=f"baselines.{module}", note=note)
    return Case(f"vs_{name}", f"speed against {name}, {place}", at_least(limit), measure, module, needs=needs)


def _bytes(name: str, is_packed: bool) -> Case:
    suffix = "_z" if is_packed else ""
    measure = partial(codec.measure_bytes, density=DENSITIES[name], is_packed=is_packed)
    figure = f"dense bytes over delta bytes at {DENSITIES[name]:.1%} changed{', zstandard' if is_packed else ''}"
    limit = at_least(BYTES_TARGETS[name][is_packed])
    return Case(f"delta_bytes_{name}{suffix}", figure, limit, measure, "dense bytes", "baseline / value")


LINKS = ("root", "links")

CPU_CASES: tuple[Case, ...] = (
    Case(
        "shm_vs_memcpy",
        "shared memory, one engine, staged and verified: speed against a one-thread copy",
        at_least(0.85),
        partial(moves.race, place="host", baseline=None),
        "copy in one process",
    ),
    Case(
        "shm_4_workers",
        "shared memory, 4 engine workers of one host: time against 1 worker",
        at_most(1.3),
        partial(moves.race_workers, workers=4),
        "1 worker",
    ),
    Case(
        "slices_4_workers",
        "shared memory, 4 engine workers of one host that want a quarter each: time against 1 worker that wants all",
        at_most(1.3),
        partial(moves.race_workers, workers=4, slices=True),
        "1 worker",
    ),
    Case(
        "zmq_vs_sockets",
        "ZeroMQ over tcp loopback, staged and verified: speed against raw sockets doing the same",
        at_least(0.95),
        partial(moves.race, place="zmq", baseline="baselines.sockets", options={"verify": True}),
        "sockets, staged and verified",
    ),
    Case(
        "collective_buckets",
        "gloo in buckets: speed against gloo a parameter, 20,000 tensors",
        at_least(5),
        measure_buckets,
        "gloo a parameter",
        "baseline / value",
    ),
    Case(
        "two_sources",
        "2 sources: speed against 1, each on a link of 1 Gb/s",
        at_least(1.8),
        links.measure_sources,
        "1 source",
        needs=LINKS,
    ),
    _against("memcpy", "memcpy", "host", 1, note="in and out of one block of shared memory"),
    _against("sockets", "sockets", "network", 1, note="sockets that check nothing and keep no copy"),
    _against("ray", "ray_store", "host", 1, ("ray",)),
    _against("gloo", "gloo", "network", 1.5),
    _against("zmq_pickle", "zmq_pickle", "network", 1.5),
    _against("rpc", "rpc", "host", 1.5, note="TensorPipe takes shared memory within a host"),
    _against("mooncake", "mooncake_tcp", "network", 1.5, ("mooncake",)),
    _against("safetensors", "safetensors_files", "host", 1.5),
    Case(
        "vs_sparse_int32",
        "delta over 1 Gb/s, end to end: speed against vLLM's sparse form",
        at_least(1.5),
        partial(links.race_codec, baseline="baselines.sparse_int32"),
        "sparse_int32",
        "baseline / value",
        LINKS,
    ),
    Case(
        "vs_xor_zstd",
        "delta over 1 Gb/s, end to end: speed against dense XOR and zstandard",
        at_least(1.5),
        partial(links.race_codec, baseline="baselines.xor_zstd"),
        "xor_zstd",
        "baseline / value",
        LINKS,
    ),
    Case(
        "vllm_pause_share",
        "engine pause against the whole publish, vLLM, 1.19 GB",
        at_most(0.15),
        partial(engines.measure_pause, engine="vllm"),
        "the whole publish",
        needs=("vllm", "transformers"),
    ),
    Case(
        "pause_transformers",
        "engine pause against the whole publish, embedded engine, 1.19 GB",
        None,
        partial(engines.measure_pause, engine="transformers"),
        "the whole publish",
        needs=("transformers",),
    ),
    *(_bytes(name, is_packed) for name in DENSITIES for is_packed in (False, True)),
    *(
        Case(
            f"delta_{what}_gbps{'' if use_kernel else '_numpy'}",
            f"GB/s of dense bytes, {what}, one core, {'fast path' if use_kernel else 'numpy'}",
            at_least(limit),
            partial(measure, use_kernel=use_kernel),
            "copy",
            "value",
        )
        for what, measure, use_kernel, limit in (
            ("encode", codec.measure_encode, True, 6),
            ("encode", codec.measure_encode, False, 2.5),
            ("apply", codec.measure_apply, True, 10),
            ("apply", codec.measure_apply, False, 7),
        )
    ),
    Case(
        "delta_1gbit",
        "delta publish over 1 Gb/s, end to end, verified, 0.8 % changed: speed against dense",
        at_least(10),
        links.measure_delta,
        "dense publish",
        "baseline / value",
        LINKS,
    ),
    Case(
        "checksum_share",
        "checking of everything received, share of the publish",
        at_most(0.05),
        moves.measure_checking,
        "the whole publish",
    ),
    Case(
        "memory_source",
        "a source's memory beyond the model itself, in models (with deltas it holds what it published last)",
        at_most(1.05),
        partial(moves.measure_memory, side="source"),
        "the model",
    ),
    Case(
        "memory_source_in_place",
        "a source's memory beyond the model itself, whose weights are read where they lie, in models",
        at_most(0.05),
        partial(moves.measure_memory, side="source", way="shared_memory, in place"),
        "the model",
    ),
    Case(
        "memory_receiver",
        "a receiver's memory, in models (one staged copy)",
        at_most(1.05),
        partial(moves.measure_memory, side="receiver"),
        "the model",
    ),
    Case(
        "memory_receiver_in_place",
        "a receiver's memory beyond its engine's own tensors, in which versions land, in models",
        at_most(0.05),
        partial(moves.measure_memory, side="receiver", in_place=True),
        "the model",
    ),
    *(
        Case(
            f"{what}_gbps",
            f"{text}: speed against a plain copy",
            None,
            partial(digests.measure_digest, what=what),
            "copy",
        )
        for what, text in (
            ("digest", "a digest alone, one core"),
            ("digest_numpy", "a digest alone, with numpy"),
            ("copy_then_digest", "a copy, then its digest"),
            ("copy_with_digest", "a copy with its digest, in one pass"),
            ("land_chunks", "chunks hashed, then copied with their digests"),
        )
    ),
    Case(
        "ipc_overhead_ms",
        "a version in place over CUDA IPC but for the device's work, 399 tensors as Qwen3-8B's: time against 1 tensor",
        None,
        overhead.measure_overhead,
        "1 tensor",
    ),
    Case(
        "train_step_cpu",
        "a training step on one CPU core: time against transformers with plain PyTorch",
        at_most(1.1),
        train_step.measure_train_step,
        "transformers",
        needs=("transformers",),
    ),
    Case(
        "shared_memory_read_gbps",
        "a source's shared memory, read with its digest, one core: speed against a plain copy",
        None,
        digests.measure_read,
        "copy",
    ),
)

GPU_CASES: tuple[Case, ...] = (
    Case(
        "gpu_ipc_vs_copy",
        "trainer parameters into engine parameters over CUDA IPC, 16.4 GB, read and written where they lie: "
        "speed against a copy on the device",
        at_least(0.5),
        partial(gpu.race_ipc, baseline=None, direct=True, into=True),
        "device copy",
        needs=("cuda",),
    ),
    Case(
        "gpu_ipc_direct_vs_copy",
        "the same, staged, and then the engine's parameters point to what was staged",
        None,
        partial(gpu.race_ipc, baseline=None, direct=True, points=True),
        "device copy",
        needs=("cuda",),
    ),
    Case(
        "gpu_ipc_packed_vs_copy",
        "the same, packed by the trainer, which may go on, and written where the engine's parameters lie",
        None,
        partial(gpu.race_ipc, baseline=None, into=True),
        "device copy",
        needs=("cuda",),
    ),
    Case(
        "gpu_ipc_staged_vs_copy",
        "the same, packed and staged, and then copied to where the engine's parameters lie, which serves until then",
        None,
        partial(gpu.race_ipc, baseline=None),
        "device copy",
        needs=("cuda",),
    ),
    Case(
        "gpu_pass_gbps",
        "the pass that copies and digests a model on the device, alone: speed against a copy",
        None,
        gpu.measure_pass,
        "device copy",
        needs=("cuda",),
    ),
    Case(
        "vs_checkpoint_engine",
        "trainer parameters into engine parameters, 16.4 GB: speed against checkpoint-engine",
        at_least(1.5),
        partial(gpu.race_ipc, baseline="baselines.checkpoint_engine_ipc"),
        "checkpoint_engine_ipc",
        needs=("cuda", "checkpoint_engine"),
    ),
    Case(
        "gpu_delta_encode_gbps",
        "GB/s of dense bytes, encoded on the device, 0.8 % changed",
        at_least(500),
        gpu.measure_encode,
        "device copy",
        "value",
        needs=("cuda",),
    ),
    Case(
        "train_step_gpu",
        "training a Llama of 1.2 B parameters in bf16: speed against transformers with plain PyTorch",
        at_least(1),
        train_gpu.measure_train_step,
        "transformers",
        needs=("cuda", "transformers"),
    ),
    Case(
        "train_peak_share",
        "training a Llama of 1.2 B parameters in bf16: share of the rate of a large product, in bf16 too",
        None,
        train_gpu.measure_peak_share,
        "product",
        needs=("cuda",),
    ),
)

TABLES: dict[str, tuple[Case, ...]] = {"cpu": CPU_CASES, "gpu": GPU_CASES}
