"""Keys from files: CurveZMQ keys for engines that are not on the trainer's host, and the key of a store of versions.

A key of a store is the bytes of a file, the same that `weightcast versions --key-file` takes. The file of CurveZMQ keys
is JSON with three Z85 strings, as `zmq.curve_keypair()` makes them: this engine's `public` and `secret` key, and
`server`, the public key of the trainer. Either must be readable by its owner alone.
"""

import json
import re
import stat
from pathlib import Path

from weightcast.sync import CurveKeys
from weightcast.sync.errors import ConfigError

_MAX_KEY_BYTES = 64
_Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # rfc.zeromq.org/spec/32
_FIELDS = ("public", "secret", "server")


def read_engine_keys(path: Path | None) -> CurveKeys | None:
    """The keys in `path`; `None` without one. Raises `ConfigError` for a file that is malformed or open to others."""
    if path is None:
        return None
    _check_secret(path)
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
        raise ConfigError(f"{path} must hold a JSON object with exactly {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if not isinstance(fields[name], str) or _Z85_KEY.fullmatch(fields[name]) is None:
            raise ConfigError(f"{name} in {path} is not a key of 40 Z85 characters; make one with zmq.curve_keypair()")
    return CurveKeys(*(fields[name].encode() for name in _FIELDS))


def read_store_key(path: Path | None) -> bytes | None:
    """The key in `path` that a store's versions are sealed with; `None` without one.

    Raises `ConfigError` for a file that is missing, open to others, or too large to be a key.
    """
    if path is None:
        return None
    _check_secret(path)
    if path.stat().st_size > _MAX_KEY_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, a store's key at most {_MAX_KEY_BYTES}")
    return path.read_bytes()


def _check_secret(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"there is no key file {path}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} holds a secret key and is open to others; chmod 600 it")
