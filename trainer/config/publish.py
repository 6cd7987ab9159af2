"""Streaming versions to inference engines while training.

cfg.publish.to = "tcp://127.0.0.1:5600"     # or a store: "/shared/versions", "s3://bucket/versions"
"""

import re
from dataclasses import dataclass, field

from weightcast.sync.errors import ConfigError
from weightcast.sync.fleet import FleetPolicy


@dataclass(slots=True, kw_only=True)
class PublishConfig:
    """Streaming versions to inference engines while training."""

    to: str | None = None
    """Address that rank 0 binds, such as `tcp://127.0.0.1:5600` or `ipc:///tmp/weights`; or a store of versions that
    all ranks write to, a folder or a URL such as `s3://bucket/versions`; null publishes nothing."""
    every: int = 1
    """Steps between two versions. A version's number is its step."""
    wait_for: int = 0
    """Engines that must be connected before the first step. With a store it needs `policy`."""
    wait_timeout_s: float = 600.0
    """Seconds to wait for them."""
    timeout_s: float = 600.0
    """Seconds that one version may take until the fleet serves it; in a store without `policy`, until it is written."""
    policy: str | None = None
    """How many engines must have staged a version before any serves it: `all`, `all(2)` (all, and at least two) or
    `quorum(2)`. Null: `all` at an address; in a store engines then take each version as they find it."""
    anchor_every: int | None = None
    """Of a store: at least every so many versions is a whole one; null: 25."""
    keep: int | None = None
    """Of a store: how many of the newest versions stay, with all that they need; null: 5."""
    key_file: str | None = None
    """Of a store: file with the key that versions are sealed with; engines need the same."""
    config_from: str | None = None
    """Of a store: folder whose configuration and tokenizer go into every whole version, which makes it a Hugging Face
    folder; null: `model.hf_path`, where that is a folder and its weights are published as they are."""
    overlap: bool = False
    """Train on as soon as a version is packed, while engines fetch and load it. Its report, and its failure, come with
    the next version or at the end of the run; otherwise each step waits until the fleet serves."""
    hold_next_step: bool = False
    """With `overlap`: pack while the next forward and backward pass goes on, and hold the next optimizer step back
    until that is done. Training then stands still only for what is left of the packing."""
    delta: str = "auto"
    """Whether engines that have an earlier version are sent only what changed: `on`, `off`, `zstd` (compressed as well,
    for links below 1 Gb/s), or `auto`, which decides by measurement."""
    expose: list[str] | None = None
    """At an address: how engines of the same host may read versions by themselves, and over what besides ZeroMQ: of
    `shared_memory`, `cuda_ipc` (weights on a GPU), `mooncake`, the first that this machine has, and `tcp` (links that
    are not encrypted). Null: `shared_memory`, and `tcp` where the address is a TCP one; an empty list: ZeroMQ alone."""
    in_place: bool = False
    """With `delta=off`: the parameters are read and sent where they lie, and nothing is copied here; with
    `expose=[cuda_ipc]` by engines on this rank's GPU, otherwise where they are in host memory, by engines of the host
    and over TCP links. Training stands still until the fleet serves the version; with `overlap` and `hold_next_step`
    from the next optimizer step on."""
    report_log: str | None = None
    """File of JSON lines that rank 0 appends each version's report to, for `weightcast trace`; null keeps none."""
    metrics_port: int | None = None
    """Port on which rank 0 answers Prometheus at `/metrics` (0: a free one, which is logged); null answers nobody."""
    metrics_host: str = "127.0.0.1"
    """Address of this machine for `metrics_port`. Whoever reaches it may read the metrics."""
    peft: str = "merged"
    """Of a run with adapters: `merged`, whole weights as engines without adapters know them; or `adapter`, the adapter
    alone under the names of a PEFT folder."""
    quantize: str = "none"
    """`none`; `fp8_block` (FP8 with a scale for each 128 x 128, as DeepSeek's and Qwen's checkpoints); or `fp8_tensor`
    (one scale a matrix): what vLLM would make of the weights itself, made here, at half the bytes."""
    modules_to_not_convert: list[str] = field(default_factory=list)
    """Modules to publish as they are besides embeddings, norms, routers and output layers: names, parts of them in
    whole words, or patterns with `*`."""
    engine_config: str | None = None
    """File for what an engine must be told to read FP8, as JSON for its `--hf-overrides` or `config.json`; with
    `peft=adapter` for the adapter's `adapter_config.json`."""


_POLICY = re.compile(r"(all|quorum)(?:\((\d{1,5})\))?")


def parse_policy(text: str) -> FleetPolicy:
    """`all`, `all(N)` or `quorum(N)` as a policy. Raises `ConfigError`."""
    match = _POLICY.fullmatch(text)
    if match is None or (match[1] == "quorum" and match[2] is None):
        raise ConfigError(
            f"publish.policy={text!r} is not known; use all, all(2) or quorum(2), with a number of engines"
        )
    count = int(match[2] or 0)
    return FleetPolicy.all(count) if match[1] == "all" else FleetPolicy.quorum(count)


def delta_mode(publish: PublishConfig) -> str:
    """`publish.delta` as `WeightPublisher` takes it: YAML reads a bare `on` or `off` as true or false."""
    return {"True": "on", "False": "off"}.get(str(publish.delta), str(publish.delta))
