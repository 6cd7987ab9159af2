"""Passes over many pieces have the bits of a copy and the digests of `region_sum`, whoever takes which piece."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.ranks import ROOT
from tests.sync.parts import PROPERTY, bits, random_bits
from tests.sync.table_runner import run_by_numpy

from weightcast.sync import Region
from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.device_passes import ChunkPasses, Runner, find_runner, is_right, place_of
from weightcast.sync.digest import BLOCK_LANES, region_digest
from weightcast.sync.pass_plan import NARROW, TILES, WIDE, PieceShape, find_stride, plan_passes

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.bool, torch.int64)
Box = tuple[Region, torch.dtype]


def run_pass(
    boxes: Sequence[Box], sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor] | None, runner: Runner
) -> int:
    """One chunk of all boxes; bits and digests must be right. How many pieces the runner took."""
    pieces = tuple(Piece(region, 0, region.numel * dtype.itemsize) for region, dtype in boxes)
    chunk = Chunk(0, sum(piece.num_bytes for piece in pieces), pieces)
    passes = ChunkPasses((chunk,), dict.fromkeys([region.name for region, _ in boxes], torch.uint8), CPU, runner)
    passes.shapes = [PieceShape(region, dtype.itemsize) for region, dtype in boxes]
    places = np.array(
        [
            (*place_of(source), *((0, 0) if targets is None else place_of(targets[n])))
            for n, source in enumerate(sources)
        ]
    )
    run = passes.launch(0, 1, places, sources.__getitem__, None if targets is None else targets.__getitem__)
    for (region, _), source, digest in zip(boxes, sources, run.digests(), strict=True):
        assert digest == region_digest(source.contiguous(), region), region
    if targets is not None:
        for target, source in zip(targets, sources, strict=True):
            assert torch.equal(bits(target), bits(source))
    return run.taken


def inside(dtype: torch.dtype, region: Region, margin: Sequence[int], seed: int) -> torch.Tensor:
    """A box of a larger tensor: its rows lie apart."""
    whole = random_bits(dtype, tuple(size + extra for size, extra in zip(region.shape, margin, strict=True)), seed)
    return whole[tuple(slice(extra // 2, extra // 2 + size) for size, extra in zip(region.shape, margin, strict=True))]


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[Box], list[tuple[int, ...]], int]:
    """Boxes of every dtype, often of rows that a kernel takes, and the margins of the tensors around them."""
    found, margins = [], []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        unit = 16 // dtype.itemsize if draw(st.booleans()) else 1
        lead = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=3))
        last = (draw(st.integers(0, 40)) * unit, draw(st.integers(1, 70)) * unit)
        dims = [*lead, last] if draw(st.integers(0, 9)) else []
        found.append((Region("w", tuple(start for start, _ in dims), tuple(size for _, size in dims)), dtype))
        margins.append(tuple(draw(st.sampled_from([0, 2, 32])) for _ in dims))
    return found, margins, draw(st.integers(0, 1000))


@PROPERTY
@given(boxes(), st.booleans())
def test_any_pieces_have_the_bits_and_digests_of_torch(
    drawn: tuple[list[Box], list[tuple[int, ...]], int], copies: bool
) -> None:
    found, margins, seed = drawn
    sources = [inside(dtype, region, margin, seed) for (region, dtype), margin in zip(found, margins, strict=True)]
    targets = [
        inside(dtype, region, margin[::-1], seed + 1) for (region, dtype), margin in zip(found, margins, strict=True)
    ]
    run_pass(found, sources, targets if copies else None, run_by_numpy)


@pytest.mark.parametrize("start", [0, 16, BLOCK_LANES - 2, 3 * BLOCK_LANES])
def test_rows_of_many_blocks(start: int) -> None:
    found = [(Region("w", (7, start), (2, 2 * BLOCK_LANES + 100)), torch.int64)]
    data = random_bits(torch.int64, found[0][0].shape, start)
    assert run_pass(found, [data], [torch.zeros_like(data)], run_by_numpy) == 1


def test_what_the_runner_takes_and_what_is_left_to_torch() -> None:
    whole = random_bits(torch.bfloat16, (40, 64), 0)
    region = Region("w", (0, 8), (16, 32))
    cases = [
        (whole[3:19, 8:40], True),
        (whole[3:19, 3:35], False),  # begins at an odd byte
        (whole[0:32:2, :32], True),
        (whole[:16, 0:64:2], False),  # elements lie apart
        (whole.view(64, 40)[:16, :32], True),
        (random_bits(torch.bfloat16, (40, 33), 0)[:16, :32], False),  # rows begin at odd bytes
        (random_bits(torch.bfloat16, (32, 16), 0).t()[:16], False),
    ]
    for data, is_taken in cases:
        target = torch.zeros(region.shape, dtype=torch.bfloat16)
        assert run_pass([(region, torch.bfloat16)], [data], [target], run_by_numpy) == is_taken, data.stride()
        assert run_pass([(region, torch.bfloat16)], [data], None, run_by_numpy) == is_taken, data.stride()
    shifted = Region("w", (0, 3), (16, 32))
    assert run_pass([(shifted, torch.bfloat16)], [whole[:16, :32]], None, run_by_numpy) == 0


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), max_size=4),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 3),
)
def test_a_stride_leads_from_row_to_row(dims: list[tuple[int, int]], itemsize: int, margin: int) -> None:
    shape = tuple(size for size, _ in dims)
    whole = torch.arange(int(np.prod([size * 2 + margin for size in shape])) or 1).view(
        [size * 2 + margin for size in shape]
    )
    data = whole[tuple(slice(0, size * (1 + cut % 2), 1 + cut % 2) for size, cut in dims[:-1])]
    stride = find_stride(data.shape, data.stride(), itemsize)
    if stride is None or not shape:
        return
    rows = data.reshape(-1, data.shape[-1])[:, 0].tolist()
    assert rows == [int(data.flatten()[0]) + row * stride * 8 // itemsize for row in range(len(rows))]


def test_items_are_of_one_tile_and_within_their_pieces() -> None:
    shapes = [PieceShape(Region("w", (0, 0), shape), 2) for shape in ((3000, 4096), (5, 128), (1, 8), (4, 3), (0, 8))]
    shapes += [PieceShape(Region("w", (), ()), 8), PieceShape(Region("b", (0,), (1000,)), 2)]
    plan = plan_passes(shapes)
    assert [shape.is_taken for shape in shapes] == [True, True, True, False, False, False, True]
    bytes_of = dict.fromkeys(range(len(shapes)), 0)
    for tile in TILES:
        for piece, first_row, num_rows, first_lane, num_lanes, *_ in plan.tiles[tile].tolist():
            shape = shapes[piece]
            assert first_row + num_rows <= shape.num_rows and 8 * (first_lane + num_lanes) <= shape.row_bytes
            assert num_lanes <= tile.lanes and num_rows <= tile.item_rows
            bytes_of[piece] += num_rows * num_lanes * 8
    assert all(bytes_of[n] == (s.num_rows * s.row_bytes if s.is_taken else 0) for n, s in enumerate(shapes))
    assert set(plan.tiles[WIDE][:, 0]) == {0, 6} and plan.span(NARROW, 1, 3) == (0, 2)


def test_a_runner_that_is_wrong_is_found_out() -> None:
    def wrong(*tables: object, copies: bool) -> None:
        run_by_numpy(*tables, copies=copies)  # type: ignore[arg-type]
        tables[-1][0] += 1  # type: ignore[index]

    def lazy(*tables: object, copies: bool) -> None:
        run_by_numpy(*tables, copies=False)  # type: ignore[arg-type]

    runners: list[tuple[Callable[..., None], bool]] = [(run_by_numpy, True), (wrong, False), (lazy, False)]
    assert [is_right(runner, CPU) for runner, _ in runners] == [right for _, right in runners]
    assert find_runner(CPU) is None


PROGRAM = """
import torch
from tests.sync.test_device_passes import *
from weightcast.sync.pass_kernel import run_items
assert is_right(run_items, CPU)
found, sources = [], []
for number, dtype in enumerate(DTYPES):
    unit = 16 // dtype.itemsize
    for offset, shape, margin in (
        ((5,), (37,), (0,)), ((0, 7), (9, 3), (2, 2)),
        ((1, 2, 0), (2, 11, 4), (0, 0, 2)), ((2, 300), (70, 133), (1, 0)),
    ):
        region = Region("w", (*offset[:-1], offset[-1] * unit), (*shape[:-1], shape[-1] * unit))
        found.append((region, dtype))
        sources.append(inside(dtype, region, (*margin[:-1], margin[-1] * unit), number))
    found.append((Region("w", (1, 1), (3, 5)), dtype))
    sources.append(random_bits(dtype, (3, 5), number))
long = Region("w", (7, BLOCK_LANES - 2), (2, BLOCK_LANES + 300))
found.append((long, torch.int64)); sources.append(random_bits(torch.int64, long.shape, 9))
targets = [torch.zeros(region.shape, dtype=dtype) for region, dtype in found]
for into in (targets, None):
    taken = run_pass(found, sources, into, run_items)
    assert taken == 4 * len(DTYPES) + 1, taken
print("right")
"""


def test_the_kernel_itself_in_tritons_interpreter(tmp_path: Path) -> None:
    """It has no GPU to run on here, and interprets the kernel instead, program by program."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("right\n"), done.stderr
