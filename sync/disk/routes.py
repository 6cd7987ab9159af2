"""Which versions are written as anchors, how an engine gets from what it holds to a newer one, what may go. Pure.

Versions are nodes; an anchor can be entered from nothing, a delta leads from its base to its version. An engine takes
the route of fewest bytes to the newest version that can be reached.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightcast.sync.disk.records import Base
from weightcast.sync.version import Version

StepKind = Literal["dense", "delta"]
# Reading this many bytes of deltas takes as long as an anchor, or nearly.
CHAIN_MAX_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What routes need to know of a whole version; `seal` is the hash of its manifest file."""

    version: Version
    seal: bytes
    is_anchor: bool
    base: Base | None
    dense_bytes: int
    """Bytes of the files of its anchor; 0 where it is none."""
    delta_bytes: int
    """Bytes of the files of its delta; 0 where it has none."""
    created_s: float = 0.0
    is_governed: bool = False
    """Whether a fleet must release it before engines serve it."""


@dataclass(frozen=True, slots=True)
class Step:
    """Enter `version` by its anchor, or come to it by its delta."""

    version: Version
    kind: StepKind


@dataclass(frozen=True, slots=True)
class Route:
    """How to get to a version. Without steps, it is what the engine's copy has already."""

    target: Version
    steps: tuple[Step, ...]

    @property
    def is_upon_held(self) -> bool:
        """Whether it goes on from what the copy has, rather than from an anchor."""
        return not self.steps or self.steps[0].kind == "delta"


@dataclass(frozen=True, slots=True)
class Held:
    """What an engine has in its staged copy: a version, and the seal of the manifest that it came from."""

    version: Version
    seal: bytes


@dataclass(frozen=True, slots=True)
class Chain:
    """What a publisher remembers of the versions since its last anchor."""

    num_versions: int
    delta_bytes: int


def needs_anchor(chain: Chain | None, anchor_every: int, model_bytes: int) -> bool:
    """Whether the next version must be an anchor: the first, every `anchor_every`-th, or when deltas have piled up."""
    if chain is None or chain.num_versions + 1 >= anchor_every:
        return True
    return chain.delta_bytes > CHAIN_MAX_SHARE * model_bytes


def find_route(
    infos: Sequence[VersionInfo], held: Held | None, above: Version | None, spoiled: Collection[Step] = ()
) -> Route | None:
    """The route to the newest version above `above` that can be reached without `spoiled` ones; None: there is none.

    From `held` by deltas, or from an anchor; of the two, whichever reads fewer bytes.
    """
    by_version = {info.version: info for info in infos}
    for target in sorted(by_version, reverse=True):
        if above is not None and target <= above:
            return None
        if (route := route_to(target, by_version, held, spoiled)) is not None:
            return route
    return None


def route_to(
    target: Version,
    infos: Mapping[Version, VersionInfo],
    held: Held | None = None,
    spoiled: Collection[Step] = (),
) -> Route | None:
    """The route of fewest bytes to `target`; None when it cannot be reached."""
    best: tuple[int, tuple[Step, ...]] | None = None
    info: VersionInfo | None = infos[target]
    deltas: tuple[Step, ...] = ()
    delta_bytes = 0
    while info is not None:
        if held is not None and (held.version, held.seal) == (info.version, info.seal):
            return Route(target, deltas if best is None or delta_bytes < best[0] else best[1])
        enter = Step(info.version, "dense")
        cost_bytes = delta_bytes + info.dense_bytes
        if info.is_anchor and enter not in spoiled and (best is None or cost_bytes < best[0]):
            best = cost_bytes, (enter, *deltas)
        follow = Step(info.version, "delta")
        if info.base is None or follow in spoiled:
            break
        deltas, delta_bytes = (follow, *deltas), delta_bytes + info.delta_bytes
        if held is not None and (held.version, held.seal) == (info.base.version, info.base.seal):
            return Route(target, deltas if best is None or delta_bytes < best[0] else best[1])
        before = infos.get(info.base.version)
        info = before if before is not None and before.seal == info.base.seal else None
    return None if best is None else Route(target, best[1])


def find_needed(infos: Sequence[VersionInfo], keep: int, also: Collection[Version] = ()) -> set[Version]:
    """The newest `keep` versions and `also`, and all that is needed to reach each of them from an anchor."""
    by_version = {info.version: info for info in infos}
    needed: set[Version] = set()
    for version in (*sorted(by_version, reverse=True)[:keep], *(by_version.keys() & set(also))):
        needed.add(version)
        route = route_to(version, by_version)
        needed.update(step.version for step in (route.steps if route is not None else ()))
    return needed
