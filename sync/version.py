"""Versions: what rises, and what is listed under it.

A version is (epoch, number). The epoch belongs to one life of the publisher and is later for a later life, so a
trainer that was restarted outranks the one that it replaces, and a forgotten one is fenced. A manifest lists every
HF tensor of a version with the digest that its assembled bytes must have.
"""

import time
from dataclasses import dataclass

import xxhash

from weightcast.sync.regions import TensorSpec, dtype_name


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """A version of the weights; ordered by epoch, then number, both >= 0."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.number} (epoch {self.epoch})"


def new_epoch() -> int:
    """An epoch for a publisher that starts now: milliseconds since 1970, so that a later start is later."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Manifest:
    """All tensors of one version, in HF order, and the digest of each (see `weightcast.sync.digest`)."""

    version: Version
    specs: tuple[TensorSpec, ...]
    digests: tuple[int, ...]


def fingerprint(specs: tuple[TensorSpec, ...]) -> str:
    """32 hex digits that name a model: its tensors' names, dtypes and shapes, in any order."""
    lines = sorted(f"{spec.name}\0{dtype_name(spec.dtype)}\0{spec.shape}" for spec in specs)
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def find_model_differences(expected: tuple[TensorSpec, ...], offered: tuple[TensorSpec, ...]) -> list[str]:
    """One line for each tensor that is missing, unexpected, or of another dtype or shape; empty when equal."""
    want = {spec.name: spec for spec in expected}
    have = {spec.name: spec for spec in offered}
    lines = [f"{name}: expected, but the publisher does not have it" for name in want if name not in have]
    lines += [f"{name}: not expected, but the publisher has it" for name in have if name not in want]
    for name in want.keys() & have.keys():
        if want[name] != have[name]:
            lines.append(f"{name}: expected {_describe(want[name])}, the publisher has {_describe(have[name])}")
    return sorted(lines)


def _describe(spec: TensorSpec) -> str:
    return f"{dtype_name(spec.dtype)} {list(spec.shape)}"
