"""What a folder holds: its kind, its tensors, dtypes and bytes, its configuration and whether a bridge covers it.

Reads headers and metadata; of an adapter also the A's of linears that are one in Megatron, to tell its kind.

    Console().print(render(inspect_path(Path("path/to/hf")), names=False))
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.hf_source import CONFIG_FILE, HFSource
from weightcast.bridges.peft.describe import AdapterDescription, describe_adapter
from weightcast.bridges.peft.folder import CONFIG_FILE as ADAPTER_CONFIG
from weightcast.bridges.peft.folder import WEIGHTS_FILE as ADAPTER_WEIGHTS
from weightcast.bridges.peft.folder import read_adapter
from weightcast.bridges.standalone_checkpoint import DistCheckpoint
from weightcast.bridges.standalone_stores import HFStore, open_store
from weightcast.sync.checkpoint_files import has_weights
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec, dtype_name


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder holds, in the order in which it is stored."""

    path: Path
    kind: str
    specs: tuple[TensorSpec, ...]
    file_bytes: Mapping[str, int]
    """Files with weights and their sizes."""
    order: str
    """How the tensors are spelled and ordered, in words."""
    others: tuple[str, ...]
    """Entries that are no weights."""
    config: str
    """The configuration's architecture and whether a bridge covers it, or an adapter's settings, in words."""
    adapter: AdapterDescription | None = None
    """Of a PEFT folder."""

    def by_dtype(self) -> dict[str, tuple[int, int]]:
        """Numbers of tensors and of bytes of each dtype."""
        counts: dict[str, tuple[int, int]] = {}
        for spec in self.specs:
            number, size = counts.get(dtype_name(spec.dtype), (0, 0))
            counts[dtype_name(spec.dtype)] = (number + 1, size + spec.num_bytes)
        return counts


def inspect_path(path: Path) -> Contents:
    """Read what `path` holds: an HF folder, a Megatron checkpoint or a PEFT folder.

    Raises `ConfigError` when it is none of them, `CheckpointMismatch` when it is damaged, `UnsupportedModel` for a PEFT
    folder of another kind than LoRA and DoRA.
    """
    if not has_weights(path) and any((path / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        return _inspect_adapter(path)
    config = _describe_config(path)
    with open_store(path) as store:
        if isinstance(store, HFStore):
            files = {file.name: file.stat().st_size for file in sorted(set(store.checkpoint.files.values()))}
            return Contents(
                path,
                "Hugging Face folder",
                store.specs,
                files,
                _hf_order(store.specs),
                store.checkpoint.derived,
                config,
            )
        checkpoint = store.checkpoint
        paths = sorted({chunk.path for chunks in checkpoint.chunks.values() for chunk in chunks})
        files = {file.name: file.stat().st_size for file in paths}
        kind = f"Megatron checkpoint (torch_dist) at {checkpoint.folder}"
        return Contents(path, kind, store.specs, files, _dist_order(checkpoint), checkpoint.others, config)


def _inspect_adapter(path: Path) -> Contents:
    folder = read_adapter(path)
    described = describe_adapter(folder)
    file = path / ADAPTER_WEIGHTS
    specs = folder.files.specs
    return Contents(
        path=path,
        kind=f"PEFT folder, {described.kind}",
        specs=specs,
        file_bytes={file.name: file.stat().st_size},
        order=_hf_order(specs),
        others=(),
        config=described.in_words(),
        adapter=described,
    )


def _hf_order(specs: Sequence[TensorSpec]) -> str:
    names = [spec.name for spec in specs]
    return "names in alphabetical order" if names == sorted(names) else "names in an order of their own"


def _dist_order(checkpoint: DistCheckpoint) -> str:
    numbered = any(".layers." in key and key.split(".layers.")[1][0].isdigit() for key in checkpoint.specs)
    spelling = "a key a layer" if numbered else "an axis of layers in front of each layer's tensors"
    return f"{spelling}; {sum(map(len, checkpoint.chunks.values()))} stored chunks"


def _describe_config(path: Path) -> str:
    if not (path / CONFIG_FILE).is_file():
        return f"no {CONFIG_FILE}"
    try:
        config = HFSource.make(path).load_config()
    except ConfigError as error:
        return str(error)
    names = ", ".join(config.architectures or ("no architecture",))
    reason = AutoBridge.explain(config)
    return f"{names}: {'covered by a bridge' if reason is None else reason}"


def render(contents: Contents, names: bool) -> RenderableType:
    """For a terminal; with `names`, every tensor."""
    dtypes = Table("dtype", "tensors", "bytes")
    for name, (number, size) in contents.by_dtype().items():
        dtypes.add_row(name, str(number), f"{size:,}")
    lines = [
        f"{contents.kind}: {len(contents.specs)} tensors, {sum(spec.num_bytes for spec in contents.specs):,} bytes "
        f"in {len(contents.file_bytes)} files of {sum(contents.file_bytes.values()):,} bytes",
        f"order: {contents.order}",
        f"configuration: {contents.config}",
    ]
    if contents.others:
        lines.append(f"besides: {len(contents.others)} entries that are no weights, the first {contents.others[0]}")
    parts: list[RenderableType] = [*map(Text, lines), dtypes]
    if contents.adapter is not None:
        parts.append(_render_adapter(contents.adapter))
    if names:
        listing = Table("tensor", "dtype", "shape")
        for spec in contents.specs:
            listing.add_row(spec.name, dtype_name(spec.dtype), str(spec.shape))
        parts.append(listing)
    return Group(*parts)


def _render_adapter(adapter: AdapterDescription) -> Table:
    targets = Table("adapts", "modules", "rank", "alpha", "scaling")
    for own in adapter.targets:
        settings = own.settings
        numbers = (own.num_modules, settings.rank, settings.alpha, settings.scaling)
        targets.add_row(own.name, *(f"{number:g}" for number in numbers))
    return targets


def as_json(contents: Contents) -> dict[str, Any]:
    """Everything, in JSON's types."""
    specs = [{"name": s.name, "dtype": dtype_name(s.dtype), "shape": list(s.shape)} for s in contents.specs]
    changed: dict[str, Any] = {"path": str(contents.path), "specs": specs, "others": list(contents.others)}
    if contents.adapter is not None:
        changed["adapter"] = asdict(contents.adapter) | {"targets": [asdict(own) for own in contents.adapter.targets]}
    return asdict(contents) | changed
