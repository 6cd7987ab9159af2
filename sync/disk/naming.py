"""Names in a store of versions. Pure.

    1764150000000-00000042/            a version: epoch, number
        model-r00003-00000.safetensors     dense regions of rank 3, by their HF names where they are whole tensors
        delta-r00003-00000.safetensors     deltas of rank 3
        model.safetensors.index.json       only where every tensor is whole: then the folder is an ordinary HF folder
        manifest.weightcast                written last: without it there is no version
    run-1764150000000/                 how the sources of one publisher's life meet
    engines/                           what engines say of themselves

A store is flat: folders of files, nothing deeper, so that object stores can hold it.
"""

import re

import xxhash

from weightcast.sync.version import Version

MANIFEST = "manifest.weightcast"
BEGIN = "begin.weightcast"
RUN = "run.weightcast"
SHARES = "shares.weightcast"
ENGINES = "engines"
RECORD_SUFFIX = ".weightcast"

# Wide enough that names sort as versions do; longer numbers still parse.
_EPOCH_DIGITS, _NUMBER_DIGITS = 13, 8
_VERSION = re.compile(r"(\d{13,20})-(\d{8,20})", re.ASCII)
_RUN = re.compile(r"run-(\d{13,20})", re.ASCII)


def version_folder(version: Version) -> str:
    """The folder of a version."""
    return f"{version.epoch:0{_EPOCH_DIGITS}d}-{version.number:0{_NUMBER_DIGITS}d}"


def parse_version_folder(name: str) -> Version | None:
    """The version whose folder has this name; None for any other name, and any other spelling of a version."""
    if not (match := _VERSION.fullmatch(name)):
        return None
    version = Version(int(match[1]), int(match[2]))
    return version if version_folder(version) == name else None


def run_folder(epoch: int) -> str:
    """The folder where the sources of one life of a publisher meet."""
    return f"run-{epoch:0{_EPOCH_DIGITS}d}"


def parse_run_folder(name: str) -> int | None:
    """The epoch of such a folder's name."""
    match = _RUN.fullmatch(name)
    return int(match[1]) if match and run_folder(int(match[1])) == name else None


def data_file(kind: str, rank: int, index: int) -> str:
    """A safetensors file of one source: `kind` is "model" or "delta"."""
    return f"{kind}-r{rank:05d}-{index:05d}.safetensors"


def part_file(rank: int) -> str:
    """The record of a source's part of a version."""
    return f"part-{rank:05d}{RECORD_SUFFIX}"


def failure_file(rank: int) -> str:
    """The record of a source that could not write its part."""
    return f"failed-{rank:05d}{RECORD_SUFFIX}"


def joining_file(rank: int) -> str:
    """The record by which a source joins a run; a source that was restarted replaces it."""
    return f"joining-{rank:05d}{RECORD_SUFFIX}"


def engine_file(engine: str) -> str:
    """An engine's status; engines may be called anything, so the name is a hash."""
    return f"{xxhash.xxh3_64_hexdigest(engine.encode())}{RECORD_SUFFIX}"
