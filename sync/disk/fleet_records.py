"""The records by which the engines of a store and its publisher agree on a version; sealed and checked as all others.

run-<epoch>/fleet.weightcast        FleetTerms: a publisher with a policy runs; engines make themselves known
<version>/fleet.weightcast          the same, listed in the manifest: this version must be released to be served
engines/member-<hash>.weightcast    Member: an engine that agrees, written anew at every beat
<version>/release.weightcast        Release: the policy was met
<version>/outcome.weightcast        Outcome: what rank 0 tells the other sources
"""

from dataclasses import dataclass

import xxhash

from weightcast.sync import schema
from weightcast.sync.disk.naming import RECORD_SUFFIX
from weightcast.sync.disk.records import FORMAT, HASH_BYTES, file_name
from weightcast.sync.fleet import FleetPolicy, Role
from weightcast.sync.records import REPORT, SPANS, VERSION, EngineReport, Span
from weightcast.sync.schema import checked, many, optional, real, text, uint
from weightcast.sync.version import Version

FLEET = f"fleet{RECORD_SUFFIX}"
RELEASE = f"release{RECORD_SUFFIX}"
OUTCOME = f"outcome{RECORD_SUFFIX}"
MEMBER_PREFIX = "member-"
MAX_ENGINES = 1 << 16
MAX_MEMBER_BYTES = 1 << 20
MAX_SMALL_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class FleetTerms:
    """How engines agree: the publisher's policy, and how long it waits for a silent engine."""

    format: int = checked(uint(FORMAT))
    rule: str = checked(schema.choice("all", "quorum"))
    count: int = checked(uint(MAX_ENGINES))
    lost_after_s: float = checked(real)


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that agrees. `beat` rises with every writing; `life` tells its process from an earlier one's.

    The figures are those of the version that was staged last; `at_s` (since 1970, by the engine's clock) is for people.
    """

    engine: str = checked(text)
    life: str = checked(file_name)
    role: Role = checked(schema.choice("receiver", "observer"))
    beat: int = checked(uint())
    serving: Version | None = checked(optional(VERSION))
    staged: Version | None = checked(optional(VERSION))
    refused: Version | None = checked(optional(VERSION))
    reason: str = checked(text)
    stage_s: float = checked(real)
    pause_s: float = checked(real)
    num_bytes: int = checked(uint())
    checksums_checked: int = checked(uint())
    spans: tuple[Span, ...] = checked(SPANS)
    at_s: float = checked(real)


@dataclass(frozen=True, slots=True)
class Release:
    """Engines may serve a version; `seal` is the hash of its manifest file, so that it is good for no other one."""

    version: Version = checked(VERSION)
    seal: bytes = checked(schema.binary(HASH_BYTES))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a version in the fleet; `error` is empty when the policy was met."""

    version: Version = checked(VERSION)
    engines: tuple[EngineReport, ...] = checked(many(REPORT, MAX_ENGINES))
    spans: tuple[Span, ...] = checked(SPANS)
    error: str = checked(text)


def terms_of(policy: FleetPolicy, lost_after_s: float) -> FleetTerms:
    """A policy as it lies in a store."""
    return FleetTerms(FORMAT, policy.kind, policy.count, lost_after_s)


def member_file(engine: str) -> str:
    """An engine's record; engines may be called anything, so the name is a hash."""
    return f"{MEMBER_PREFIX}{xxhash.xxh3_64_hexdigest(engine.encode())}{RECORD_SUFFIX}"
