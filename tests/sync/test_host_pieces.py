"""Weights in host memory that are read where they lie: what is handed out at the door, and found in it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.in_place_parts import draw_rows
from tests.sync.parts import PROPERTY, is_shared, wait_until

from weightcast.sync import schema
from weightcast.sync.errors import PeerLost, ReachError, WireError
from weightcast.sync.host.doors import Open, host_name, knock
from weightcast.sync.host.packets import Connection
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.transports import shared_memory_live
from weightcast.sync.transports.cuda_ipc_table import Scattered
from weightcast.sync.transports.shared_memory import reach
from weightcast.sync.transports.shared_memory_live import ExposedPieces, expose_live, share_storages
from weightcast.sync.transports.shared_memory_wire import KIND, Ask, Storage, read_ticket

# Pieces in memory that is mapped


@PROPERTY
@given(st.data())
def test_pieces_are_found_where_they_lie_and_gathered_as_they_would_be_packed(data: st.DataObject) -> None:
    memory = np.random.default_rng(1).integers(0, 256, 4096, np.uint8)
    memories = [memory[:1000], memory[1000:]]
    table, wanted = draw_rows(data, memories)
    pieces = HostPieces(len(wanted), table, memories)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(wanted))] * 2)))
    got = np.full(end - start, 9, np.uint8)
    pieces.gather(start, got)
    assert np.array_equal(got, wanted[start:end])
    for begin, num_rows, row_bytes, number, first, step in table.tolist():
        assert pieces.locate(begin, num_rows, row_bytes) == (memories[number].ctypes.data + first, step)
        assert pieces.locate(begin, num_rows, row_bytes + 1) is None
        assert pieces.locate(begin, num_rows + 1, row_bytes) is None
    assert pieces.locate(len(wanted) + 1, 1, 1) is None
    with pytest.raises(WireError, match="outside the source's"):
        pieces.gather(len(wanted), np.zeros(1, np.uint8))


def test_a_table_that_reaches_outside_is_refused() -> None:
    with pytest.raises(WireError, match="lies outside of its memory"):
        HostPieces(100, np.array([(0, 3, 10, 0, 41, 40)], np.int64), [np.zeros(130, np.uint8)])


# At the door


@pytest.fixture
def exposed(base: Path) -> Iterator[ExposedPieces]:
    """Two storages of 64 bytes, read in rows."""
    tensors = [torch.arange(64, dtype=torch.uint8), torch.arange(100, 164, dtype=torch.uint8)]
    rows = np.array([(0, 2, 8, 0, 4, 16), (16, 1, 16, 1, 0, 16)], np.int64)
    made = expose_live(rows, 32, [tensor.untyped_storage() for tensor in tensors], base=base)
    tensors[1][3] = 7  # what the trainer writes, its engines see
    yield made
    made.close()
    assert not list(base.iterdir())


def test_an_engine_reads_the_trainers_storages(exposed: ExposedPieces) -> None:
    reached = reach(exposed.ticket, 10)
    got = np.zeros(32, np.uint8)
    reached.read(0, got)
    assert got.tolist() == [*range(4, 12), *range(20, 28), 100, 101, 102, 7, *range(104, 116)]
    assert reached.view(0, 8) is None and reached.num_bytes == 32
    reached.close()
    exposed.close()
    with pytest.raises(ReachError):
        reach(exposed.ticket, 10)


def test_a_source_of_another_size_than_its_ticket_says_leaves_nothing_open(exposed: ExposedPieces) -> None:
    ticket = schema.pack(KIND, replace(read_ticket(exposed.ticket), num_bytes=33))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReachError, match="has 32 bytes, its ticket 33"):
        reach(ticket, 10)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


def enter(exposed: ExposedPieces, token: bytes | None = None) -> Connection:
    """A connection at the door, whose first word was said."""
    ticket = read_ticket(exposed.ticket)
    connection = knock(Path(ticket.path), host_name(), frozenset({os.geteuid()}), 5)
    if token is not None:
        connection.send("open", Open(token))
    return connection


def test_nothing_is_handed_out_to_who_does_not_know_the_token(exposed: ExposedPieces) -> None:
    for connection in (enter(exposed), enter(exposed, bytes(32))):
        with pytest.raises(PeerLost):
            connection.send("ask", Ask(0))
            connection.receive({"storage": Storage, "scattered": Scattered}, 5)
        connection.close()


def test_descriptors_are_for_reading_and_none_is_there_but_those_of_the_table(exposed: ExposedPieces) -> None:
    connection = enter(exposed, read_ticket(exposed.ticket).token)
    _, table = connection.receive({"scattered": Scattered}, 5)
    connection.send("ask", Ask(1))
    answer, handed = connection.receive({"storage": Storage}, 5)
    assert answer == Storage(64) and handed is not None and table is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(handed, b"x")
    os.close(handed)
    os.close(table)
    connection.send("ask", Ask(2))
    with pytest.raises(PeerLost):
        connection.receive({"storage": Storage}, 5)
    connection.close()


def test_storages_that_find_no_room_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(1 << 20)
    info = SimpleNamespace(f_bavail=shared_memory_live._ROOM_BYTES // 4096 + 100, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: info)
    with pytest.raises(ReachError, match=r"docker run --shm-size"):
        share_storages([tensor.untyped_storage()])
    assert not is_shared(tensor)
    monkeypatch.setattr(shared_memory_live, "MAX_STORAGES", 1)
    with pytest.raises(ReachError, match="2 storages; at most 1"):
        share_storages([tensor.untyped_storage()] * 2)
