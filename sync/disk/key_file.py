"""The file with the key that a store's versions are sealed with."""

from pathlib import Path

from weightcast.sync.errors import ConfigError


def read_key(path: Path | None) -> bytes | None:
    """The bytes of the file, None without one. Raises `ConfigError` when it cannot be read."""
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from error
