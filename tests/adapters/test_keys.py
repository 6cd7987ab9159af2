"""Key files: what is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import zmq

from weightcast.adapters.keys import read_engine_keys
from weightcast.sync import CurveKeys
from weightcast.sync.errors import ConfigError

PUBLIC, SECRET = zmq.curve_keypair()
FIELDS = {"public": PUBLIC.decode(), "secret": SECRET.decode(), "server": PUBLIC.decode()}


def write(folder: Path, fields: Any, mode: int = 0o600) -> Path:
    path = folder / "keys.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    path.chmod(mode)
    return path


def test_keys_are_read(tmp_path: Path) -> None:
    assert read_engine_keys(write(tmp_path, FIELDS)) == CurveKeys(PUBLIC, SECRET, PUBLIC)
    assert read_engine_keys(None) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "is not JSON"),
        ([], "exactly public, secret, server"),
        ({"public": "x"}, "exactly public, secret, server"),
        ({**FIELDS, "secret": "short"}, "secret in .* is not a key of 40 Z85 characters"),
        ({**FIELDS, "server": 3}, "server in .* is not a key"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_engine_keys(write(tmp_path, fields))
    assert FIELDS["secret"] not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_engine_keys(write(tmp_path, FIELDS, 0o640))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key file"):
        read_engine_keys(tmp_path / "none.json")
