"""Shared memory: read by those who may, by nobody else, and gone when its processes are, however they end."""

import errno
import mmap
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.sync.host_peer import HostPeer
from tests.sync.memory_parts import NUM_BYTES, altered, reach

from weightcast.sync import schema
from weightcast.sync.errors import ReachError, StorageError, WireError
from weightcast.sync.host import folders
from weightcast.sync.host.arena import Arena, map_arena
from weightcast.sync.host.doors import Open
from weightcast.sync.host.packets import Connection, listen
from weightcast.sync.host.server import PacketServer
from weightcast.sync.transports.shared_memory import expose
from weightcast.sync.transports.shared_memory_wire import SharedMemoryTicket, read_ticket

pytestmark = pytest.mark.usefixtures("nothing_stays")


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
