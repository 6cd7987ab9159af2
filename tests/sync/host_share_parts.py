"""A leader and a follower of a small model in this process."""

from pathlib import Path
from typing import Any

from tests.sync.host_peer import make_tensors
from tests.sync.parts import make_specs

from weightcast.sync import Version
from weightcast.sync.host.follower import HostFollower
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.share import join_host_share

ADDRESS = "tcp://trainer:1"
SPECS = make_specs(make_tensors(0))
WAIT_S = 20.0


def lead(base: Path, **settings: Any) -> HostLeader:
    """A leader in this process."""
    member = join_host_share(ADDRESS, "g", SPECS, timeout_s=WAIT_S, base=base, **settings)
    assert isinstance(member, HostLeader)
    return member


def follow(base: Path, **settings: Any) -> HostFollower:
    """A follower in this process."""
    member = join_host_share(ADDRESS, "g", SPECS, timeout_s=WAIT_S, base=base, **settings)
    assert isinstance(member, HostFollower)
    return member


def stage(leader: HostLeader, number: int) -> None:
    """A version whose bits follow from its number."""
    leader.begin_overwrite(WAIT_S)
    for spec in SPECS:
        leader.pool.take(spec).copy_(make_tensors(number)[spec.name])
    leader.finish_overwrite(Version(1, number))
