"""Bytes that lie here and there in allocations: a table of them, written, checked and read."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.sync.host_driver import HostDriver
from tests.sync.in_place_parts import draw_rows
from tests.sync.parts import PROPERTY

from weightcast.sync.errors import ReachError, WireError
from weightcast.sync.pass_plan import Int64Array
from weightcast.sync.scattered import ScatteredBytes, check_table
from weightcast.sync.transports.cuda_ipc_table import (
    MAX_ALLOCATIONS,
    ReachedScattered,
    Scattered,
    open_table,
    write_table,
)


@PROPERTY
@given(st.data())
def test_pieces_are_found_where_they_lie_and_gathered_as_they_would_be_packed(data: st.DataObject) -> None:
    memory = torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    allocations = [memory[:1000], memory[1000:]]
    table, wanted = draw_rows(data, [memory.numpy() for memory in allocations])
    scattered = ScatteredBytes(len(wanted), table, allocations)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(wanted))] * 2)))
    assert np.array_equal(scattered.gather(start, end - start).numpy(), wanted[start:end])
    addresses, lanes = scattered.locate(table[:, 0], table[:, 1], table[:, 2]).T
    for row, address, stride in zip(table.tolist(), addresses, lanes, strict=True):
        is_even = row[5] % 8 == 0
        assert (address, stride) == ((allocations[row[3]].data_ptr() + row[4], row[5] // 8) if is_even else (0, 0))
    assert not scattered.locate(table[:, 0] + 1, table[:, 1], table[:, 2]).any()
    assert not scattered.locate(table[:, 0], table[:, 1] + 1, table[:, 2]).any()


SOUND = (16, 3, 10, 1, 20, 40)  # bytes 20 to 110 of an allocation


@pytest.mark.parametrize(
    "row",
    [
        (16, 3, 10, 1, 41, 40),
        (16, 3, 10, 1, 20, 51),
        (16, 3, 10, 2, 20, 40),
        (16, 3, 10, -1, 20, 40),
        (16, 3, 10, 1, -1, 40),
        (16, 3, 10, 1, 20, -1),
        (16, 0, 10, 1, 20, 40),
        (16, 3, 0, 1, 20, 40),
        (71, 3, 10, 1, 20, 40),
        (-1, 3, 10, 1, 20, 40),
        (9, 3, 10, 1, 20, 40),
        (16, 1 << 62, 10, 1, 20, 0),
        (16, 3, 1 << 62, 1, 20, 0),
        (16, 3, 10, 1, 1 << 62, 40),
        (16, 3, 10, 1, 20, 1 << 62),
    ],
)
def test_a_table_that_reaches_outside_is_refused(row: tuple[int, ...]) -> None:
    first = (0, 1, 10, 0, 0, 0)
    check_table(100, np.array([first, SOUND], np.int64), [10, 130])
    with pytest.raises(WireError, match=r"piece [01] of a source's table lies outside"):
        check_table(100, np.array([first, row], np.int64), [10, 130])


@pytest.mark.parametrize("shape", [(0, 6), (2, 5), (6,)])
def test_a_table_of_another_form_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="says not where"):
        check_table(100, np.zeros(shape, np.int64), [10])


def open_written(rows: Int64Array, sizes: list[int], driver: HostDriver, num_bytes: int = 100) -> ReachedScattered:
    class Nobody:
        def close(self) -> None:
            pass

    memories = [driver.allocate(10, torch.device("cpu")), driver.allocate(130, torch.device("cpu"))]
    message, arena = write_table(num_bytes, rows, [memory.handle for memory in memories], sizes)
    return open_table(
        message,
        os.dup(arena.descriptor),
        lambda handle, size: driver.open(handle, size, torch.device("cpu")),
        Nobody(),  # type: ignore[arg-type]
        5,
    )


def test_allocations_that_are_smaller_than_was_said_leave_nothing_open() -> None:
    driver, rows = HostDriver(), np.array([(0, 1, 10, 0, 0, 0), SOUND], np.int64)
    reached = open_written(rows, [10, 130], driver)
    assert reached.num_bytes == 100 and reached.device_view(0, 46).shape == (46,)
    with pytest.raises(WireError, match="outside the source's 100 bytes"):
        reached.device_view(60, 41)
    reached.close()
    assert driver.closed == 2
    with pytest.raises(ReachError):
        open_written(rows, [10, 131], driver)
    with pytest.raises(WireError, match="lies outside"):
        open_written(rows, [10, 109], driver)
    assert driver.closed == 2 + 1 + 2


def test_a_table_of_too_many_allocations_is_no_message() -> None:
    check = Scattered.__dataclass_fields__["num_allocations"].metadata["check"]
    assert check(MAX_ALLOCATIONS) == MAX_ALLOCATIONS
    with pytest.raises(WireError):
        check(MAX_ALLOCATIONS + 1)
