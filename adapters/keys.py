"""CurveZMQ keys from a file, for engines that are not on the trainer's host.

The file is JSON with three Z85 strings, as `zmq.curve_keypair()` makes them: this engine's `public` and `secret`
key, and `server`, the public key of the trainer. It must be readable by its owner alone.
"""

import json
import re
import stat
from pathlib import Path

from weightcast.sync import CurveKeys
from weightcast.sync.errors import ConfigError

_Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # rfc.zeromq.org/spec/32
_FIELDS = ("public", "secret", "server")


def read_engine_keys(path: Path | None) -> CurveKeys | None:
    """The keys in `path`; `None` without one. Raises `ConfigError` for a file that is malformed or open to others."""
    if path is None:
        return None
    if not path.is_file():
        raise ConfigError(f"there is no key file {path}")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} holds a secret key and is open to others; chmod 600 it")
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
