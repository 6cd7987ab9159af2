"""An HF folder as FP8: what an engine is started on before a trainer publishes FP8 to it.

The tensors are those that a `QuantizedSource` publishes, made from the files one at a time, and config.json says how
to read them, so that the engine builds FP8 layers and expects just what will be published.

    write_quantized_folder(Path("path/to/hf"), Path("out/fp8"), Fp8Scheme(kind="fp8_block"))
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightcast.bridges.hf_folder import DEFAULT_SHARD_BYTES, check_room, plan_files, write_index
from weightcast.bridges.hf_source import COMPANION_FILES, CONFIG_FILE
from weightcast.bridges.standalone_safetensors import SafetensorsWriter
from weightcast.bridges.whole_folder import explain_disk, partial_of, start_empty, take_name
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader, open_checkpoint
from weightcast.sync.errors import ConfigError
from weightcast.sync.quantize_rules import Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.sync.regions import HeldRegion, TensorSpec


@dataclass(frozen=True, slots=True)
class QuantizedFolderReport:
    """What was written."""

    num_tensors: int
    num_quantized: int
    num_bytes: int


class _FileSource:
    """A checkpoint's files as the one source of a model; each tensor is read when it is asked for."""

    rank = 0
    world_size = 1

    def __init__(self, checkpoint: CheckpointFiles, reader: RegionReader) -> None:
        self._specs = checkpoint.specs
        self._reader = reader

    def specs(self) -> Sequence[TensorSpec]:
        """As in the files."""
        return self._specs

    def held(self) -> Sequence[HeldRegion]:
        """Every tensor, whole."""
        return [HeldRegion(spec.whole(), partial(self._reader.read, spec.whole())) for spec in self._specs]


def write_quantized_folder(
    source: Path, folder: Path, scheme: Fp8Scheme, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> QuantizedFolderReport:
    """Write the model in `source` to `folder` as FP8, with its configuration and tokenizer; an older HF folder of the
    name is replaced. Memory is bounded by the largest tensor, a few times.

    Raises `ConfigError` when `source` is quantised already, when its tensors do not fit the scheme's rules, or when
    `folder` holds anything but an HF model; `SourceError` for weights that are not finite; `StorageError`.
    """
    folder = folder.absolute()
    check_room(folder)
    config = json.loads((source / CONFIG_FILE).read_text()) if (source / CONFIG_FILE).is_file() else None
    if config is None or config.get("quantization_config"):
        why = "has no config.json" if config is None else "is quantised already"
        raise ConfigError(f"{source} {why}; give the Hugging Face folder of the model in bf16")
    checkpoint = open_checkpoint(source)
    draft = partial_of(folder)
    with explain_disk(folder, "quantise again"), checkpoint.reader() as reader:
        quantized = QuantizedSource(_FileSource(checkpoint, reader), scheme)
        quantized.prepare()
        start_empty(draft)
        _write_files(quantized, draft, shard_bytes)
        (draft / CONFIG_FILE).write_text(json.dumps(config | quantized.engine_config(), indent=2) + "\n")
        for path in {path for pattern in COMPANION_FILES for path in source.glob(pattern)}:
            shutil.copyfile(path, draft / path.name)
        take_name(draft, folder)
    specs = quantized.specs()
    return QuantizedFolderReport(len(specs), len(quantized.plan.quantized), sum(spec.num_bytes for spec in specs))


def _write_files(quantized: QuantizedSource, draft: Path, shard_bytes: int) -> None:
    held = {item.region: item for item in quantized.held()}
    files = plan_files(quantized.specs(), shard_bytes, 1)
    for file in files:
        with SafetensorsWriter(draft / file.name, file.specs) as writer:
            for spec in file.specs:
                writer.write(spec.whole(), held[spec.whole()].live().to(spec.dtype))
    write_index(files, draft)
