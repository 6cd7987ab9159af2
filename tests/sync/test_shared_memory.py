"""Shared memory: read by those who may, by nobody else, and gone when its processes are, however they end."""

import errno
import mmap
import os
import signal
import socket
import stat
import threading
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.sync.host_peer import NOBODY, HostPeer

from weightcast.sync import schema
from weightcast.sync.errors import ReachError, StorageError, WireError
from weightcast.sync.host import folders
from weightcast.sync.host.arena import Arena, map_arena
from weightcast.sync.host.doors import Open
from weightcast.sync.host.packets import Connection, listen
from weightcast.sync.host.server import PacketServer
from weightcast.sync.transports.shared_memory import ReachedMemory, expose
from weightcast.sync.transports.shared_memory import reach as reach_any
from weightcast.sync.transports.shared_memory_wire import SharedMemoryTicket, read_ticket

NUM_BYTES = (3 << 20) + 5
IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def nothing_stays(base: Path) -> Iterator[None]:
    """Every test leaves the folder for sockets empty."""
    yield
    assert not list(base.iterdir())


def reach(ticket: bytes, timeout_s: float, allowed_uids: Collection[int] = ()) -> ReachedMemory:
    """The memory of a source that packs."""
    reached = reach_any(ticket, timeout_s, allowed_uids=allowed_uids)
    assert isinstance(reached, ReachedMemory)
    return reached


def altered(ticket: bytes, **changes: object) -> bytes:
    """A ticket with other fields."""
    read = schema.unpack(ticket, {"shared_memory": SharedMemoryTicket})
    return schema.pack("shared_memory", replace(read, **changes))


def test_another_process_reads_what_the_source_writes(base: Path) -> None:
    exposed = expose(NUM_BYTES, base=base)
    assert exposed.memory.flags.writeable and not exposed.memory.any() and exposed.memory.ctypes.data % 4096 == 0
    with HostPeer() as engine:
        exposed.memory[:] = 7
        assert engine.do("reach", ticket=exposed.ticket.hex(), allowed=[]) == NUM_BYTES
        assert engine.do("see") == [7, 7]
        exposed.memory[:] = 8
        assert engine.do("see") == [8, 8]
        exposed.close()
        exposed.memory[:] = 9
        assert engine.do("see") == [9, 9]
        assert engine.do("reach", ticket=exposed.ticket.hex(), allowed=[])["error"] == "ReachError"
    exposed.close()


def test_views_are_read_only_and_inside(base: Path) -> None:
    exposed = expose(NUM_BYTES, base=base)
    exposed.memory[:] = np.arange(NUM_BYTES) % 251
    memory = reach(exposed.ticket, 10)
    view = memory.view(1000, 5000)
    assert not view.flags.writeable and np.array_equal(view, exposed.memory[1000:6000])
    target = np.zeros(77, np.uint8)
    memory.read(NUM_BYTES - 77, target)
    assert np.array_equal(target, exposed.memory[-77:])
    for start, count in ((-1, 2), (NUM_BYTES, 1), (0, NUM_BYTES + 1), (5, -1)):
        with pytest.raises(WireError, match="outside the source's"):
            memory.view(start, count)
    memory.close()
    exposed.close()
    assert np.array_equal(view, exposed.memory[1000:6000]), "what is in use stays"


def test_a_reader_cannot_write_in_any_way() -> None:
    arena = Arena(NUM_BYTES)
    with pytest.raises(PermissionError):
        mmap.mmap(arena.descriptor, NUM_BYTES)
    # The file's owner may open it again for writing; the seals stand.
    again = os.open(f"/proc/self/fd/{arena.descriptor}", os.O_RDWR)
    for attempt in (
        lambda: mmap.mmap(again, NUM_BYTES),
        lambda: os.write(again, b"x"),
        lambda: os.ftruncate(again, 10),
        lambda: os.ftruncate(again, NUM_BYTES * 2),
    ):
        with pytest.raises(PermissionError):
            attempt()
    os.close(again)
    arena.memory[0] = 1
    assert map_arena(arena.descriptor, NUM_BYTES, 10)[0] == 1
    arena.close()


def test_memory_that_could_shrink_or_is_of_another_size_is_not_mapped(tmp_path: Path) -> None:
    arena = Arena(NUM_BYTES)
    with pytest.raises(ReachError, match=rf"has {NUM_BYTES} bytes, 4096 were expected"):
        map_arena(arena.descriptor, 4096, 10)
    loose = os.memfd_create("loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, NUM_BYTES)
    (tmp_path / "file").write_bytes(bytes(NUM_BYTES))
    file = os.open(tmp_path / "file", os.O_RDONLY)
    for descriptor in (loose, file):
        with pytest.raises(ReachError, match="no sealed memory"):
            map_arena(descriptor, NUM_BYTES, 10)
        os.close(descriptor)


def test_too_much_memory_is_an_error() -> None:
    with pytest.raises(StorageError, match="no 281474976710656 bytes of memory") as caught:
        Arena(1 << 48)
    assert caught.value.errno == errno.ENOMEM


def test_a_killed_source_leaves_its_memory_to_readers_and_its_folder_to_the_next_source(base: Path) -> None:
    with HostPeer() as source, HostPeer() as engine:
        ticket = source.do("expose", num_bytes=NUM_BYTES, base=str(base), byte=5, allowed=[])
        engine.do("reach", ticket=ticket, allowed=[])
        source.kill()
        assert engine.do("see") == [5, 5]
        answer = engine.do("reach", ticket=ticket, allowed=[])
        assert answer["error"] == "ReachError" and "ended without closing" in answer["text"]
        (left,) = base.iterdir()
        assert [path.name for path in left.iterdir()] == [folders.SOCKET_NAME]
        exposed = expose(NUM_BYTES, base=base)
        assert not left.exists()
        answer = engine.do("reach", ticket=ticket, allowed=[])
        assert answer["error"] == "ReachError" and "the source ended, or lives in a container" in answer["text"]
        exposed.close()


def test_a_killed_reader_does_no_harm(base: Path) -> None:
    exposed = expose(NUM_BYTES, base=base)
    with HostPeer() as engine:
        engine.do("reach", ticket=exposed.ticket.hex(), allowed=[])
        engine.kill()
    assert reach(exposed.ticket, 10).num_bytes == NUM_BYTES
    exposed.close()


def test_a_fork_of_a_source_does_not_answer_in_its_place(base: Path) -> None:
    with HostPeer() as source:
        ticket = bytes.fromhex(source.do("expose", num_bytes=NUM_BYTES, base=str(base), byte=5, allowed=[]))
        child = source.do("fork")
        try:
            assert reach(ticket, 10).num_bytes == NUM_BYTES
            source.kill()
            with pytest.raises(ReachError, match="ended without closing"):
                reach(ticket, 10)
        finally:
            os.kill(child, signal.SIGKILL)
    folders.sweep(base)


def test_the_ticket_is_needed(base: Path) -> None:
    exposed = expose(NUM_BYTES, base=base)
    with pytest.raises(ReachError, match="refused: the ticket is of an earlier life"):
        reach(altered(exposed.ticket, token=bytes(32)), 10)
    with pytest.raises(ReachError, match=f"has {NUM_BYTES} bytes, its ticket 77"):
        reach(altered(exposed.ticket, num_bytes=77), 10)
    elsewhere = altered(exposed.ticket, path=f"/nowhere/{folders.PREFIX}x/{folders.SOCKET_NAME}", host="other")
    with pytest.raises(ReachError, match="it is on another host"):
        reach(elsewhere, 10)
    assert reach(exposed.ticket, 10).num_bytes == NUM_BYTES
    exposed.close()


GOOD = SharedMemoryTicket("host", f"/tmp/{folders.PREFIX}a/{folders.SOCKET_NAME}", bytes(32), 9)


@pytest.mark.parametrize(
    "ticket",
    [
        b"",
        b"\xc1",
        bytes(2000),
        schema.pack("shared_memory", replace(GOOD, path="relative/weightcast-a/socket")),
        schema.pack("shared_memory", replace(GOOD, path="/var/run/docker.sock")),
        schema.pack("shared_memory", replace(GOOD, path="/tmp/other/socket")),
        schema.pack("shared_memory", replace(GOOD, path="/tmp/weightcast-a/../weightcast-b/socket")),
        schema.pack("shared_memory", replace(GOOD, path=f"/tmp/{'x' * 100}/weightcast-a/socket")),
        schema.pack("shared_memory", replace(GOOD, path="/tmp/weightcast-\0/socket")),
        schema.pack("shared_memory", replace(GOOD, token=b"short")),
        schema.pack("shared_memory", replace(GOOD, num_bytes=0)),
        schema.pack("shared_memory", replace(GOOD, num_bytes=1 << 60)),
        schema.pack("mooncake", GOOD),
    ],
)
def test_a_malformed_ticket_is_refused_before_anything_is_opened(ticket: bytes) -> None:
    assert read_ticket(schema.pack("shared_memory", GOOD)) == GOOD
    with pytest.raises(WireError):
        reach(ticket, 10)


def test_bystanders_are_dropped_and_others_served(base: Path) -> None:
    exposed = expose(NUM_BYTES, base=base)
    path = read_ticket(exposed.ticket).path
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for bystander in silent:
        bystander.connect(path)
    for words in (b"x", b"\x81" * 3000, os.urandom(60_000), schema.pack("open", Open(b"?"))):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as talker:
            talker.connect(path)
            talker.send(words)
            talker.settimeout(5)
            assert talker.recv(10) == b""
    assert reach(exposed.ticket, 10).num_bytes == NUM_BYTES
    exposed.close()
    for bystander in silent:
        bystander.close()


class Listening:
    """A handler that keeps whoever speaks."""

    def heard(self, peer: Connection, message: object) -> bool:
        return True

    def left(self, peer: Connection) -> None:
        pass


def test_the_silent_and_the_too_many_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "s"
    kinds = {"open": Open}
    allowed = frozenset({os.geteuid()})
    server = PacketServer(listen(path), kinds, Listening(), allowed, max_peers=2, first_message_s=0.3)
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    for sock in sockets:
        sock.settimeout(5)
        sock.connect(str(path))
    sockets[0].send(schema.pack("open", Open(b"")))
    assert sockets[2].recv(1) == b""
    assert sockets[1].recv(1) == b""
    sockets[0].settimeout(0.5)
    with pytest.raises(TimeoutError):
        sockets[0].recv(1)
    server.close()
    assert sockets[0].recv(1) == b""
    for sock in sockets:
        sock.close()


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
