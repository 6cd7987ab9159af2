"""Workers that share one copy: one receives, all read the same bits, and whoever is killed does the others no harm."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.sync.host_peer import NOBODY, HostPeer, digests_of, make_tensors
from tests.sync.host_share_parts import ADDRESS, SPECS, WAIT_S, follow, lead, stage
from tests.sync.parts import assert_same_bits, wait_until

from weightcast.sync import Version
from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch, PeerLost, ReachError, VersionError
from weightcast.sync.host.share import join_host_share


@pytest.fixture
def peers() -> Iterator[Callable[[], HostPeer]]:
    """Makes processes that end with the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(HostPeer())


def join(peer: HostPeer, base: Path, *, again: bool = False, lease_s: float = 60.0, timeout_s: float = WAIT_S) -> Any:
    """Its role."""
    return peer.do("join", base=str(base), group="g", timeout_s=timeout_s, lease_s=lease_s, again=again)


def stop(peer: HostPeer) -> None:
    """SIGSTOP, and wait until it has stopped."""
    peer.signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(peer.process.pid).status() == psutil.STATUS_STOPPED)


def test_all_workers_read_what_one_received(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, *followers = peers(), peers(), peers()
    assert join(leader, base) == "leader"
    assert [join(peer, base) for peer in followers] == ["follower", "follower"]
    for number in (1, 2, 3):
        leader.do("stage", number=number)
        for peer in followers:
            assert peer.do("wait", after=number - 1, timeout_s=WAIT_S) == number
            assert peer.do("digests") == digests_of(make_tensors(number))
            assert peer.do("release") is None
    assert leader.do("version") == 3 and leader.do("followers") == 2


def test_one_of_many_that_start_together_leads(base: Path, peers: Callable[[], HostPeer]) -> None:
    everybody = [peers() for _ in range(4)]
    command = {"do": "join", "base": str(base), "group": "g", "timeout_s": WAIT_S, "lease_s": 60.0, "again": False}
    for peer in everybody:
        peer.tell(**command)
    assert sorted(peer.hear() for peer in everybody) == ["follower"] * 3 + ["leader"]


def test_a_killed_leader_is_followed_by_one_who_carries_the_version_over(
    base: Path, peers: Callable[[], HostPeer]
) -> None:
    leader, heir, third = peers(), peers(), peers()
    assert [join(peer, base) for peer in (leader, heir, third)] == ["leader", "follower", "follower"]
    leader.do("stage", number=1)
    assert heir.do("wait", after=None, timeout_s=WAIT_S) == 1
    leader.kill()
    assert heir.do("digests") == digests_of(make_tensors(1)), "a lease outlives the leader"
    assert heir.do("release") is None
    answer = third.do("wait", after=1, timeout_s=WAIT_S)
    assert answer["error"] == "PeerLost" and "closed its connection, or died" in answer["text"]
    assert join(heir, base, again=True) == "leader"
    assert heir.do("version") == 1 and heir.do("digests") == digests_of(make_tensors(1))
    assert join(third, base, again=True) == "follower"
    assert third.do("wait", after=None, timeout_s=WAIT_S) == 1
    assert third.do("release") is None
    heir.do("stage", number=2)
    assert third.do("wait", after=1, timeout_s=WAIT_S) == 2
    assert third.do("digests") == digests_of(make_tensors(2))


def test_a_copy_torn_by_its_leaders_death_is_not_carried_over(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, heir = peers(), peers()
    assert [join(peer, base) for peer in (leader, heir)] == ["leader", "follower"]
    leader.do("stage", number=1)
    leader.do("begin", timeout_s=WAIT_S)
    leader.do("write", seed=2)
    leader.kill()
    assert join(heir, base, again=True) == "leader"
    assert heir.do("version") is None
    heir.do("stage", number=3)
    assert heir.do("version") == 3


def test_a_killed_reader_holds_nobody_up(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, reader = peers(), peers()
    assert [join(peer, base) for peer in (leader, reader)] == ["leader", "follower"]
    leader.do("stage", number=1)
    reader.do("wait", after=None, timeout_s=WAIT_S)
    answer = leader.do("begin", timeout_s=0.2)
    assert answer["error"] == "DeadlineExceeded" and f"process {reader.process.pid} still read" in answer["text"]
    assert leader.do("version") == 1
    reader.kill()
    assert leader.do("begin", timeout_s=WAIT_S) < WAIT_S


def test_a_refused_overwrite_leaves_the_version_on_offer(base: Path) -> None:
    leader, reader, other = lead(base), follow(base), follow(base)
    stage(leader, 1)
    lease = reader.wait(timeout_s=WAIT_S)
    with pytest.raises(DeadlineExceeded, match=r"still read version 1 \(epoch 1\) after 0\.1 s"):
        leader.begin_overwrite(0.1)
    with other.wait(timeout_s=WAIT_S) as second:
        assert second.version == lease.version
    lease.release()
    lease.release()
    stage(leader, 2)
    assert other.wait(Version(1, 1), timeout_s=WAIT_S).version == Version(1, 2)
    leader.close()
    reader.close()
    other.close()


def test_who_keeps_a_lease_for_too_long_is_told_that_what_he_read_is_void(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leader, reader = lead(base, lease_s=0.2), follow(base)
    stage(leader, 1)
    lease = reader.wait(timeout_s=WAIT_S)
    stage(leader, 2)
    assert f"process {os.getpid()} kept version 1 (epoch 1) for more than 0.2 s" in caplog.text
    with pytest.raises(VersionError, match=r"version 1 \(epoch 1\) was overwritten while it was read"):
        lease.check()
    with pytest.raises(VersionError, match="the lease was kept for too long"):
        lease.release()
    with pytest.raises(RuntimeError, match="the engine's own"), reader.wait(timeout_s=WAIT_S):
        raise RuntimeError("the engine's own")
    with reader.wait(timeout_s=WAIT_S) as again:
        assert again.version == Version(1, 2)
    leader.close()
    reader.close()


def test_a_lease_that_comes_too_late_is_given_back(base: Path, peers: Callable[[], HostPeer]) -> None:
    """The leader grants what is no longer waited for; that must not keep it from overwriting."""
    leader = peers()
    assert join(leader, base) == "leader"
    leader.do("stage", number=1)
    reader = follow(base)
    stop(leader)
    with pytest.raises(DeadlineExceeded):
        reader.wait(timeout_s=0.2)
    leader.signal(signal.SIGCONT)
    assert leader.do("begin", timeout_s=WAIT_S) < WAIT_S
    leader.do("finish", number=2)
    with reader.wait(timeout_s=WAIT_S) as lease:
        assert lease.version == Version(1, 2)
    reader.close()


def test_writing_to_a_followers_tensors_ends_the_writer_alone(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, follower = peers(), peers()
    assert [join(peer, base) for peer in (leader, follower)] == ["leader", "follower"]
    leader.do("stage", number=1)
    follower.tell(do="write_where_one_must_not")
    assert follower.process.wait() == -signal.SIGSEGV
    assert leader.do("digests") == digests_of(make_tensors(1))


def test_a_stopped_leader_is_waited_for_and_named(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, follower = peers(), peers()
    assert [join(peer, base) for peer in (leader, follower)] == ["leader", "follower"]
    stop(leader)
    answer = follower.do("wait", after=None, timeout_s=0.3)
    assert answer["error"] == "DeadlineExceeded" and f"process {leader.process.pid}" in answer["text"]
    with pytest.raises(DeadlineExceeded, match=r"has the lock .* and did not answer"):
        join_host_share(ADDRESS, "g", SPECS, timeout_s=0.3, base=base)
    leader.signal(signal.SIGCONT)
    leader.do("stage", number=1)
    assert follower.do("wait", after=None, timeout_s=WAIT_S) == 1


def test_a_fork_of_a_dead_leader_does_not_hide_its_death(base: Path, peers: Callable[[], HostPeer]) -> None:
    leader, heir = peers(), peers()
    assert [join(peer, base) for peer in (leader, heir)] == ["leader", "follower"]
    child = leader.do("fork")
    try:
        leader.kill()
        assert heir.do("wait", after=None, timeout_s=WAIT_S)["error"] == "PeerLost"
        assert join(heir, base, again=True) == "leader"
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_leader_that_closes_leaves_no_socket_and_is_followed(base: Path) -> None:
    leader, follower = lead(base), follow(base)
    stage(leader, 1)
    leader.close()
    (folder,) = base.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    with pytest.raises(PeerLost):
        follower.wait(Version(1, 1), timeout_s=WAIT_S)
    heir = lead(base, previous=follower)
    assert heir.version == Version(1, 1) and follower.fileno() == -1
    assert_same_bits(heir.pool.tensors, make_tensors(1))
    heir.close()


def test_other_models_groups_and_addresses(base: Path) -> None:
    leader = lead(base)
    with pytest.raises(ModelMismatch, match="give workers of different models different groups"):
        join_host_share(ADDRESS, "g", SPECS[1:], timeout_s=WAIT_S, base=base)
    others = [
        join_host_share(ADDRESS, "other", SPECS[1:], timeout_s=WAIT_S, base=base),
        join_host_share("tcp://trainer:2", "g", SPECS, timeout_s=WAIT_S, base=base),
        join_host_share(ADDRESS, "g", SPECS[::-1], timeout_s=WAIT_S, base=base),
    ]
    assert [other.is_leader for other in others] == [True, True, False]
    with pytest.raises(ConfigError, match="lease_s must be more than 0 seconds, got 0"):
        join_host_share(ADDRESS, "g", SPECS, timeout_s=1, lease_s=0, base=base)
    for member in (*others, leader):
        member.close()


def test_places_that_others_prepared_are_refused(base: Path) -> None:
    folder = base / f"weightcast-{os.geteuid()}"
    elsewhere = base / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(ReachError, match="is not a folder but something else, a link perhaps"):
        lead(base)
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ReachError, match="other users can write to"):
        lead(base)
    folder.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        with pytest.raises(ReachError, match=f"belongs to the user {NOBODY}"):
            lead(base)
        os.chown(folder, 0, 0)
    lead(base).close()
    (lock,) = folder.iterdir()
    lock.unlink()
    target = base / "precious"
    target.write_text("kept")
    lock.symlink_to(target)
    with pytest.raises(ReachError, match="it is a link; remove it"):
        lead(base)
    assert target.read_text() == "kept"
    lock.unlink()
    # What lies at the socket's place is replaced: it is in the user's own folder, and the lock is ours.
    lock.with_suffix(".sock").write_text("stale")
    lead(base).close()


def test_another_user_has_a_share_of_his_own(base: Path, peers: Callable[[], HostPeer]) -> None:
    """As root, `nobody` cannot enter the folder and so leads by himself; else two users are two folders by name."""
    leader = lead(base)
    if os.geteuid() == 0:
        base.chmod(0o1777)
        stranger = peers()
        stranger.do("become", uid=NOBODY)
        assert join(stranger, base) == "leader"
        assert (base / f"weightcast-{NOBODY}").stat().st_uid == NOBODY
        (base / "weightcast-0").chmod(0o777)
        (base / f"weightcast-{NOBODY}").rename(base / "away")
        (base / f"weightcast-{NOBODY}").symlink_to(base / "weightcast-0")
        other = peers()
        other.do("become", uid=NOBODY)
        assert join(other, base)["error"] == "ReachError"
    else:
        assert (base / f"weightcast-{os.geteuid()}").is_dir()
    assert leader.num_followers == 0
    leader.close()
