"""Shared memory and its folders, where others are: users, strangers in a source's place, and what the dead leave."""

import os
import stat
import threading
from pathlib import Path

import pytest
from tests.sync.host_peer import NOBODY, HostPeer
from tests.sync.memory_parts import NUM_BYTES, altered, reach

from weightcast.sync.errors import ReachError
from weightcast.sync.host import folders
from weightcast.sync.transports.shared_memory import expose
from weightcast.sync.transports.shared_memory_wire import read_ticket

pytestmark = pytest.mark.usefixtures("nothing_stays")
IS_ROOT = os.geteuid() == 0


def test_another_user_is_refused_unless_allowed(base: Path) -> None:
    """As root a process becomes `nobody`; else a peer of this user with another's token has to do."""
    if not IS_ROOT:
        exposed = expose(NUM_BYTES, base=base)
        with pytest.raises(ReachError, match="refused"):
            reach(altered(exposed.ticket, token=bytes(32)), 10)
        exposed.close()
        return
    with HostPeer() as stranger:
        stranger.do("become", uid=NOBODY)
        exposed = expose(NUM_BYTES, base=base)
        path = Path(read_ticket(exposed.ticket).path)
        answer = stranger.do("reach", ticket=exposed.ticket.hex(), allowed=[0])
        assert answer["error"] == "ReachError" and "belongs to another user" in answer["text"]
        # Even where the folder let them through, the kernel says who they are.
        path.parent.chmod(0o755)
        path.chmod(0o666)
        answer = stranger.do("reach", ticket=exposed.ticket.hex(), allowed=[0])
        assert answer["error"] == "ReachError" and f"user {NOBODY} is not allowed" in answer["text"]
        answer = stranger.do("reach", ticket=exposed.ticket.hex(), allowed=[])
        assert answer["error"] == "ReachError" and "belongs to the user 0" in answer["text"]
        exposed.close()
        exposed = expose(NUM_BYTES, base=base, allowed_uids=[NOBODY])
        assert stranger.do("reach", ticket=exposed.ticket.hex(), allowed=[0]) == NUM_BYTES
        assert stranger.do("see") == [0, 0]
        exposed.close()


def test_a_stranger_who_listens_in_a_sources_place_is_not_believed(base: Path) -> None:
    """A socket of `nobody` at the ticket's path; without root, a link in the place of the folder."""
    exposed = expose(NUM_BYTES, base=base)
    path = Path(read_ticket(exposed.ticket).path)
    link = base / f"{folders.PREFIX}link"
    link.symlink_to(path.parent)
    with pytest.raises(ReachError, match="is not a folder but something else, a link perhaps"):
        reach(altered(exposed.ticket, path=str(link / folders.SOCKET_NAME)), 10)
    link.unlink()
    path.parent.chmod(0o777)
    with pytest.raises(ReachError, match="other users can write to"):
        reach(exposed.ticket, 10)
    path.parent.chmod(0o700)
    if IS_ROOT:
        os.chown(path.parent, NOBODY, NOBODY)
        with pytest.raises(ReachError, match=f"belongs to the user {NOBODY}"):
            reach(exposed.ticket, 10)
        os.chown(path.parent, 0, 0)
        base.chmod(0o1777)
        with HostPeer() as stranger:
            stranger.do("become", uid=NOBODY)
            forged = bytes.fromhex(stranger.do("expose", num_bytes=4096, base=str(base), byte=1, allowed=[0]))
            with pytest.raises(ReachError, match=f"belongs to the user {NOBODY}"):
                reach(forged, 10)
            assert reach(forged, 10, allowed_uids=[NOBODY]).num_bytes == 4096
            # Their socket under a folder of ours: the kernel says whose process listens.
            os.unlink(path)
            os.link(read_ticket(forged).path, path)
            with pytest.raises(ReachError, match=f"a process of the user {NOBODY} listens"):
                reach(exposed.ticket, 10)
            folder = Path(read_ticket(forged).path).parent
        exposed.close()
        folders.sweep(base)
        assert folder.exists(), "another user's folder is not ours to sweep"
        folders.remove_socket_folder(folder)
    else:
        exposed.close()


def test_a_folder_that_others_can_change_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(open_to_all))
    with pytest.raises(ReachError, match=r"other users may replace what lies in .* set XDG_RUNTIME_DIR"):
        expose(NUM_BYTES)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    with pytest.raises(ReachError, match="no folder for sockets"):
        expose(NUM_BYTES)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with pytest.raises(ReachError, match="longer than 107 bytes"):
        expose(NUM_BYTES)
    assert not list(long.iterdir()) and not list(open_to_all.iterdir())


def test_only_the_dead_are_swept(base: Path) -> None:
    """What belongs to the living, to others, or is something else, stays."""
    exposed = expose(4096, base=base)
    young = base / f"{folders.PREFIX}young"
    old = base / f"{folders.PREFIX}old"
    other = base / "other"
    for folder in (young, old, other):
        folder.mkdir(mode=0o700)
    (old / (folders.SOCKET_NAME + folders.UNFINISHED)).touch()
    os.utime(old, (1, 1))
    os.utime(other, (1, 1))
    link = base / f"{folders.PREFIX}link"
    link.symlink_to(other)
    folders.sweep(base)
    assert set(base.iterdir()) == {Path(read_ticket(exposed.ticket).path).parent, young, other, link}
    for path in (young, other):
        path.rmdir()
    link.unlink()
    exposed.close()


def test_sources_that_start_together_do_not_sweep_each_other(base: Path) -> None:
    failures: list[BaseException] = []

    def start_and_end() -> None:
        try:
            for _ in range(30):
                exposed = expose(4096, base=base)
                assert reach(exposed.ticket, 10).num_bytes == 4096
                exposed.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start_and_end) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_nothing_is_for_others_to_see(base: Path) -> None:
    exposed = expose(4096, base=base)
    path = Path(read_ticket(exposed.ticket).path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(exposed.ticket) <= 1024
    exposed.close()
