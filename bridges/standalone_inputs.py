"""What a command is given as a model: a folder, a hub name, or a `config.json` alone.

bridge = open_bridge("configs/llama-3-70b/config.json")
"""

from pathlib import Path

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.hf_config import read_config
from weightcast.sync.errors import ConfigError


def open_bridge(model: str | Path) -> AutoBridge:
    """The bridge of `model`; of a file, without weights. Raises `ConfigError`, `UnsupportedModel`."""
    path = Path(model).expanduser()
    if not path.is_file():
        return AutoBridge.from_hf_pretrained(model)
    try:
        config = read_config(path)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"transformers cannot read {path} as a configuration: {error}; give a config.json, or a folder that has one"
        ) from error
    return AutoBridge.from_hf_config(config)
