"""Mooncake's transfer engine, the real one: bytes pulled out of another process, and every way in which that fails.

It is an extra whose libraries pip does not bring, so the tests that need it do not run where it cannot be loaded;
pytest's closing lines then say which, and what to install.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcast.sync.errors import ConfigError, ReachError, WireError
from weightcast.sync.transports import mooncake
from weightcast.sync.transports.mooncake import ExposedMemory, MooncakeReach, expose, parse_ticket, reach

REASON = mooncake.unavailable_reason()
needs_mooncake = pytest.mark.skipif(bool(REASON), reason=REASON)
NUM_BYTES = 5 * mooncake.PIECE_BYTES + 12_345  # more pieces than there are buffers for, the last one short
GOOD = {"kind": "mooncake", "protocol": "tcp", "session": "127.0.0.1:15000", "address": 1 << 40, "num_bytes": 100}

# A source in a process of its own: prints its ticket, and closes its memory when it is told to.
SOURCE = """
import sys
import numpy as np
from weightcast.sync.transports.mooncake import expose
exposed = expose(int(sys.argv[1]))
exposed.memory[:] = np.random.default_rng(7).integers(0, 256, exposed.memory.size, dtype=np.uint8)
print(exposed.ticket.hex(), flush=True)
sys.stdin.readline()
exposed.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"session": "127.0.0.1"}, "the host:port of a transfer engine was expected, got '127.0.0.1'"),
        ({"session": "127.0.0.1:0"}, "the host:port"),
        ({"session": "127.0.0.1:99999"}, "the host:port"),
        ({"session": "host name:1500"}, "the host:port"),
        ({"session": "a\n:1500"}, "the host:port"),
        ({"session": 17}, "the host:port"),
        ({"protocol": "nvlink"}, "one of ('tcp', 'rdma') was expected"),
        ({"num_bytes": 0}, "0 bytes at 1099511627776, which is no range of addresses"),
        ({"num_bytes": 1 << 60}, "num_bytes: an integer from 0 to"),
        ({"address": (1 << 64) - 50}, "no range of addresses"),
        ({"address": -1}, "an integer from 0 to"),
        ({"kind": "shared_memory"}, "unknown kind of message 'shared_memory'; known are ['mooncake']"),
        ({"more": 1}, "exactly ['address', 'num_bytes', 'protocol', 'session'] are allowed"),
        ({"session": "x" * 2000}, "at most 1024 are allowed"),
    ],
)
def test_malformed_tickets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(WireError) as raised:
        parse_ticket(msgpack.packb(GOOD | changes))
    assert message in str(raised.value)


@given(st.binary(max_size=200))
def test_no_bytes_are_a_ticket_by_chance(raw: bytes) -> None:
    with pytest.raises(WireError):
        reach(raw, 1.0)


@pytest.mark.parametrize("session", ["127.0.0.1:15000", "[fe80::1]:1", "node-1.cluster_a:65535"])
def test_good_tickets_are_read(session: str) -> None:
    ticket = parse_ticket(msgpack.packb(GOOD | {"session": session}))
    assert (ticket.session, ticket.num_bytes, ticket.protocol) == (session, 100, "tcp")


WITHOUT_MOONCAKE = """
import sys
sys.modules["mooncake"] = None  # what an import finds where the package is not installed
from weightcast.sync.errors import ConfigError, ReachError
from weightcast.sync.transports.mooncake import expose, reach
for call, error in ((lambda: expose(10), ConfigError), (lambda: reach(bytes.fromhex(sys.argv[1]), 1.0), ReachError)):
    try:
        call()
    except error as raised:
        print(raised)
"""


def test_the_extra_and_its_libraries_are_named_where_they_are_missing() -> None:
    ticket = msgpack.packb(GOOD).hex()
    done = subprocess.run([sys.executable, "-c", WITHOUT_MOONCAKE, ticket], capture_output=True, text=True, timeout=120)
    source, receiver = done.stdout.splitlines()
    assert "pip install 'weightcast[mooncake]'" in source and "apt install libibverbs1" in source
    assert receiver.startswith("cannot read the source at 127.0.0.1:15000: mooncake's transfer engine cannot be loaded")


@pytest.fixture(scope="module")
def exposed() -> Iterator[ExposedMemory]:
    made = expose(NUM_BYTES)
    made.memory[:] = np.random.default_rng(1).integers(0, 256, NUM_BYTES, dtype=np.uint8)
    yield made
    made.close()


@pytest.fixture
def reached(exposed: ExposedMemory) -> Iterator[MooncakeReach]:
    with reach(exposed.ticket, 30.0) as made:
        yield made


@needs_mooncake
def test_what_is_exposed_is_read_bit_for_bit(exposed: ExposedMemory, reached: MooncakeReach) -> None:
    assert (reached.kind, reached.num_bytes, reached.view(0, 10)) == ("mooncake", NUM_BYTES, None)
    assert exposed.memory.ctypes.data % 4096 == 0 and len(exposed.ticket) <= mooncake.MAX_TICKET_BYTES
    into = np.zeros(NUM_BYTES, np.uint8)
    reached.read(0, into)
    assert np.array_equal(into, exposed.memory)
    exposed.memory[:1000] ^= 255
    reached.read(0, into)
    assert np.array_equal(into, exposed.memory)


@needs_mooncake
@pytest.mark.parametrize(
    ("start", "size"),
    [
        (0, 0),
        (0, 1),
        (NUM_BYTES - 1, 1),
        (4097, mooncake.PIECE_BYTES),
        (mooncake.PIECE_BYTES - 1, mooncake.PIECE_BYTES + 2),
        (12, 4 * mooncake.PIECE_BYTES),
        (NUM_BYTES, 0),
    ],
)
def test_any_part_is_read_and_nothing_around_it_written(
    exposed: ExposedMemory, reached: MooncakeReach, start: int, size: int
) -> None:
    room = np.full(size + 16, 0xA5, np.uint8)
    reached.read(start, room[8 : 8 + size])
    assert np.array_equal(room[8 : 8 + size], exposed.memory[start : start + size])
    assert bool((room[:8] == 0xA5).all() and (room[8 + size :] == 0xA5).all())


@needs_mooncake
@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, NUM_BYTES + 1), (NUM_BYTES, 1), (NUM_BYTES + 5, 0)])
def test_reads_beyond_the_memory_are_refused(reached: MooncakeReach, start: int, size: int) -> None:
    with pytest.raises(ReachError, match=f"of a source's memory of {NUM_BYTES} bytes"):
        reached.read(start, np.zeros(size, np.uint8))
    reached.read(0, np.zeros(10, np.uint8))  # and it goes on


@needs_mooncake
def test_a_ticket_for_more_than_is_exposed_is_refused_by_the_source(exposed: ExposedMemory) -> None:
    honest = parse_ticket(exposed.ticket)
    fields = {"kind": "mooncake", "protocol": "tcp", "session": honest.session}
    beyond = msgpack.packb(fields | {"address": honest.address, "num_bytes": 2 * NUM_BYTES})
    with reach(beyond, 10.0) as reached, pytest.raises(ReachError, match=r"the transfer failed \(status -\d\)"):
        reached.read(NUM_BYTES, np.zeros(100, np.uint8))
    elsewhere = msgpack.packb(fields | {"address": 4096, "num_bytes": 4096})
    with pytest.raises(ReachError, match="has the source ended, or closed its memory"):
        reach(elsewhere, 10.0)


@needs_mooncake
def test_a_reach_that_was_closed_refuses(exposed: ExposedMemory) -> None:
    reached = reach(exposed.ticket, 10.0)
    reached.close()
    reached.close()
    with pytest.raises(ReachError, match="is closed, or was given up; open it anew"):
        reached.read(0, np.zeros(10, np.uint8))


@needs_mooncake
def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 byte or more"):
        expose(0)
    with pytest.raises(ConfigError, match="'nvlink'"):
        expose(10, protocol="nvlink")


@pytest.fixture
def source() -> Iterator[tuple["subprocess.Popen[str]", bytes]]:
    """A source in another process, with its ticket."""
    command = [sys.executable, "-c", SOURCE, str(NUM_BYTES)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield process, bytes.fromhex(process.stdout.readline())
        process.kill()


@needs_mooncake
def test_another_process_is_read_until_it_closes(source: tuple["subprocess.Popen[str]", bytes]) -> None:
    process, ticket = source
    assert process.stdin is not None and process.stdout is not None
    wanted = np.random.default_rng(7).integers(0, 256, NUM_BYTES, dtype=np.uint8)
    into = np.zeros(NUM_BYTES, np.uint8)
    with reach(ticket, 30.0) as reached:
        reached.read(0, into)
        assert np.array_equal(into, wanted)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "closed\n"
        with pytest.raises(ReachError, match="cannot read"):
            reached.read(0, into)
    with pytest.raises(ReachError, match="cannot read"):
        reach(ticket, 5.0)


@needs_mooncake
def test_a_source_that_is_gone_is_noticed(source: tuple["subprocess.Popen[str]", bytes]) -> None:
    process, ticket = source
    with reach(ticket, 30.0) as reached:
        process.kill()
        process.wait()
        with pytest.raises(ReachError, match="cannot read"):
            reached.read(0, np.zeros(10, np.uint8))
    with pytest.raises(ReachError, match="cannot read"):
        reach(ticket, 5.0)


@needs_mooncake
def test_a_source_that_stands_still_costs_the_deadline_and_writes_nothing_later(
    source: tuple["subprocess.Popen[str]", bytes],
) -> None:
    process, ticket = source
    reached = reach(ticket, 1.0)
    process.send_signal(signal.SIGSTOP)
    into = np.zeros(mooncake.PIECE_BYTES, np.uint8)
    started_s = time.monotonic()
    with pytest.raises(ReachError, match="did not answer within 1 s; is it running"):
        reached.read(0, into)
    assert time.monotonic() - started_s >= 1.0
    with pytest.raises(ReachError, match="given up; open it anew"):
        reached.read(0, into)
    process.send_signal(signal.SIGCONT)
    # Mooncake itself would write the answer into the memory that was asked for, once the source wakes up.
    with reach(ticket, 30.0) as again:
        again.read(0, np.zeros(NUM_BYTES, np.uint8))
    assert not into.any()
