"""What a Hugging Face folder has besides weights: its configuration, its tokenizer, its templates."""

from pathlib import Path

from weightcast.sync.disk.records import file_name
from weightcast.sync.errors import ConfigError, WireError

# Weights in any form, and the tables of contents of such.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".weightcast")


def find_extra_files(folder: Path) -> dict[str, bytes]:
    """The plain files of `folder` that are no weights, by name; hidden ones and folders are left.

    Raises `ConfigError` when there is no such folder, or a name in it is not plain.
    """
    if not folder.is_dir():
        raise ConfigError(f"config_from={str(folder)!r} is no folder; give the Hugging Face folder of the same model")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
            try:
                found[file_name(path.name)] = path.read_bytes()
            except WireError as error:
                raise ConfigError(f"{path}: {error}; rename it or take it out of config_from") from error
    return found
