"""What only the operator of a vLLM server may say to the backend, in `--additional-config '{"weightcast": {…}}'`.

    {"events": "events.jsonl", "publisher": "tcp://…", "keys": "keys.json", "share": "off", "prepare": "auto"}

Its update routes take no password, so none of this can be posted to them.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from weightcast.sync import HostShare, kind_of
from weightcast.sync.errors import AddressError, ConfigError

PrepareMode: TypeAlias = Literal["auto", "on", "off"]
"""Whether versions are prepared while the engine serves: where it can be done, or else they are refused, or never."""
SliceMode: TypeAlias = Literal["auto", "on", "off"]
"""Whether workers of one model ask for their own slices: where that is less than all of it, always, or never."""
# How long a host's receiver waits for the other workers, which say what they want once each has watched its loader.
_GATHER_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """See the module."""

    events: Path | None = None
    """A file for the phases of each update, one JSON line each."""
    publisher: str | None = None
    """The one publisher, or store, from which this server takes weights, whatever is posted to it."""
    keys: Path | None = None
    """A file of CurveZMQ keys, for a publisher (`weightcast.adapters.keys`)."""
    key_file: Path | None = None
    """A file with the key that a store's versions are sealed with."""
    share: bool = True
    """Whether several workers of one host receive each version once: "on" or "off". Each reads a store by itself."""
    slices: SliceMode = "auto"
    """Whether workers of one model ask for their own slices of tensors: "auto", where a host's workers do not need all
    of the model together (`share` is off, or they are on several hosts), "on" or "off". Those of a host that share
    receive what any of them asks for, once. A store's versions are read whole."""
    lease_s: float = 120.0
    """How long such a worker may go on loading a version when the next one is announced."""
    prepare: PrepareMode = "auto"
    """Whether a version is loaded beside the one that serves, for a short pause: "auto", "on" or "off". What comes from
    a store is loaded in the pause."""


def read_settings(additional_config: Any) -> BackendSettings:
    """The settings in vLLM's additional config. Raises `ConfigError` for one that is unknown or malformed."""
    given: Any = additional_config.get("weightcast", {}) if isinstance(additional_config, dict) else {}
    allowed = sorted(field.name for field in fields(BackendSettings))
    if not isinstance(given, dict) or not given.keys() <= set(allowed):
        unknown = ", ".join(sorted(map(str, given.keys() - set(allowed)))) if isinstance(given, dict) else repr(given)
        raise ConfigError(f"--additional-config weightcast: {unknown} unknown; allowed: {', '.join(allowed)}")
    settings: dict[str, Any] = {name: value for name, value in given.items() if value not in ("", None)}
    for name in ("events", "key_file", "keys", "publisher"):
        if name in settings and not isinstance(settings[name], str):
            raise ConfigError(f"--additional-config weightcast: {name} must be a text, got {settings[name]!r}")
    for name in ("events", "key_file", "keys"):
        if name in settings:
            settings[name] = Path(settings[name])
    if "share" in settings:
        settings["share"] = _read_switch(settings["share"])
    for name, modes in (("slices", get_args(SliceMode)), ("prepare", get_args(PrepareMode))):
        if settings.get(name, "auto") not in modes:
            raise ConfigError(
                f"--additional-config weightcast: {name} must be one of {', '.join(modes)}, got {settings[name]!r}"
            )
    lease_s = settings.get("lease_s", 1.0)
    if isinstance(lease_s, bool) or not isinstance(lease_s, int | float) or not lease_s > 0:
        raise ConfigError(f"--additional-config weightcast: lease_s must be seconds above 0, got {lease_s!r}")
    return BackendSettings(**settings)


def _read_switch(value: Any) -> bool:
    if value not in ("on", "off", True, False):
        raise ConfigError(f'--additional-config weightcast: share must be "on" or "off", got {value!r}')
    return value in ("on", True)


def check_publisher(publisher: Any) -> None:
    """Raise `ConfigError` unless `publisher`, which anybody may have posted, is an address, a folder or a URL."""
    if not isinstance(publisher, str):
        raise ConfigError(f"publisher must be an address such as tcp://127.0.0.1:5600, or a store, got {publisher!r}")
    try:
        kind_of(publisher)
    except AddressError as error:
        raise ConfigError(f"publisher: {error}") from error


def choose_share(
    settings: BackendSettings, publisher: str, engine: str, num_workers: int, num_hosts: int
) -> HostShare | None:
    """The share of a server's workers on one host, under the engine's name; None for one worker, or where it is off.

    A store has none: each worker reads it by itself. How many share it is known where all are on one host.
    """
    if not settings.share or num_workers == 1 or kind_of(publisher) == "store":
        return None
    workers = num_workers if num_hosts == 1 else None
    return HostShare(engine, lease_s=settings.lease_s, workers=workers, gather_s=_GATHER_S)


def takes_slices(settings: BackendSettings, publisher: str, num_workers: int, num_hosts: int) -> bool:
    """Whether each of `num_workers` that hold one model together, on so many hosts, asks for its own slices. Pure.

    On one host, workers that share need all of the model together, which they receive without having to say who needs
    what. On several, those of a host receive what any of them needs, once. A store's versions are read whole.
    """
    if settings.slices == "off" or num_workers == 1 or kind_of(publisher) == "store":
        return False
    return settings.slices == "on" or not settings.share or num_hosts > 1
