"""One pass over a device's memory: the bits of a copy and the digests of torch, and how fast it is."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from tests.gpu.codecs import DTYPES
from tests.gpu.table import Scale, require
from tests.sync.parts import bits, random_bits

from weightcast.sync import Region
from weightcast.sync.chunks import Chunk, Piece
from weightcast.sync.device_passes import ChunkPasses, RunningPass, find_runner, is_right, place_of
from weightcast.sync.digest import BLOCK_LANES
from weightcast.sync.digest_torch import as_digests, region_sum
from weightcast.sync.pass_plan import NARROW, TILES, WIDE, PieceShape, Tile

ROUNDS = 7
# Others than those that are taken: to see whether they are faster on this device.
OTHER_TILES = (
    Tile(lanes=256, rows=8, warps=8),
    Tile(lanes=256, rows=4, warps=4),
    Tile(lanes=512, rows=4, warps=4),
    Tile(lanes=256, rows=16, warps=8),
    Tile(lanes=256, rows=8, warps=4, item_bytes=1 << 20),
    Tile(lanes=256, rows=8, warps=4, item_bytes=64 << 10),
)


class Pieces:
    """Pieces on a device, each with a source and a target, as one chunk."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.regions: list[Region] = []
        self.sources: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []

    def add(self, region: Region, source: torch.Tensor, target: torch.Tensor | None = None) -> None:
        """A piece; by default into memory of its own."""
        self.regions.append(region)
        self.sources.append(source)
        empty = torch.zeros(region.shape, dtype=source.dtype, device=self.device)
        self.targets.append(empty if target is None else target)

    def open(self, tiles: Sequence[Tile] = TILES) -> Callable[[bool], RunningPass]:
        """What launches the pass, with a copy or without."""
        pairs = zip(self.regions, self.sources, strict=True)
        shapes = [PieceShape(region, source.element_size()) for region, source in pairs]
        pieces = tuple(Piece(shape.region, 0, shape.region.numel * shape.itemsize) for shape in shapes)
        chunk = Chunk(0, sum(piece.num_bytes for piece in pieces), pieces)
        dtypes = {region.name: source.dtype for region, source in zip(self.regions, self.sources, strict=True)}
        passes = ChunkPasses((chunk,), dtypes, self.device, tiles=tiles)
        both = zip(self.sources, self.targets, strict=True)
        places = np.array([(*place_of(source), *place_of(target)) for source, target in both], np.int64)
        sources, targets = self.sources.__getitem__, self.targets.__getitem__
        return lambda copies: passes.launch(0, 1, places, sources, targets if copies else None)

    def check(self, where: str) -> int:
        """Both ways, against torch; how many pieces the kernel took."""
        sums = [region_sum(source, region) for region, source in zip(self.regions, self.sources, strict=True)]
        wanted, launch = as_digests(sums), self.open()
        taken = 0
        for copies in (False, True):
            run = launch(copies)
            taken = run.taken
            wrong = [str(self.regions[n]) for n, found in enumerate(run.digests()) if found != wanted[n]]
            require(not wrong, f"{where}: other digests of {len(wrong)} pieces, the first {wrong[:3]}")
        pairs = enumerate(zip(self.sources, self.targets, strict=True))
        wrong = [str(self.regions[n]) for n, (source, target) in pairs if not torch.equal(bits(source), bits(target))]
        require(not wrong, f"{where}: other bits in {len(wrong)} pieces, the first {wrong[:3]}")
        return taken


def check_passes(scale: Scale) -> dict[str, Any]:
    """Pieces of every dtype, even and odd, with strides, by the thousand, beyond 2**31 bytes; then their speed."""
    device, is_there = torch.device(scale.device), scale.device == "cuda"
    if is_there and find_runner(device) is None:
        from weightcast.sync.pass_kernel import run_items

        require(is_right(run_items, device), "the kernel's bits or digests are others than torch's")
    figures: dict[str, Any] = {"pieces": 0, "taken": 0}
    for number, dtype in enumerate(DTYPES):
        pieces = make_pieces(scale, dtype, number)
        figures["pieces"] += len(pieces.regions)
        figures["taken"] += pieces.check(str(dtype))
    require(not is_there or figures["taken"] > figures["pieces"] // 2, f"the kernel took few: {figures}")
    many = Pieces(scale.device)
    for number in range(scale.pick(200, 5000)):
        shape = (1 + number % 7, 8 * (1 + number % 90))
        many.add(Region(f"w{number}", (number, 0), shape), random_bits(torch.bfloat16, shape, number).to(scale.device))
    figures["taken_of_many"] = many.check("many pieces")
    figures["long_bytes"] = check_long(scale)
    return figures | measure_speed(scale)


def make_pieces(scale: Scale, dtype: torch.dtype, seed: int) -> Pieces:
    """Boxes of a tensor, even and odd, as they lie in it; rows of one lane and of several blocks."""
    pieces, unit = Pieces(scale.device), 16 // dtype.itemsize
    columns = scale.pick(40, 400) * unit
    whole = random_bits(dtype, (scale.pick(24, 300), columns + 3 * unit), seed).to(scale.device)
    rows = whole.shape[0]
    for first, start, count, width in (
        (0, 0, rows, columns), (3, unit, rows - 5, columns), (1, 5 * unit, 2, unit), (2, 1, rows - 3, columns - 1),
        (0, 3 * unit, 1, columns), (5, 2 * unit, rows - 5, 33 * unit), (5, unit, rows - 7, 7 * unit + 1),
    ):  # fmt: skip
        region = Region("w", (first, start), (count, width))
        pieces.add(region, whole[region.slices])
        there = torch.zeros_like(whole)
        pieces.add(region, whole[region.slices], there[region.slices])
    pieces.add(Region("w", (0, 0), (rows // 2, columns)), whole[0 : rows // 2 * 2 : 2, :columns])
    pieces.add(Region("w", (0, 0), (columns // 2, rows)), whole[:, : columns // 2].t())
    cube = random_bits(dtype, (4, 6, 5 * unit), seed).to(scale.device)
    pieces.add(Region("w", (7, 1, unit), tuple(cube.shape)), cube)
    pieces.add(Region("w", (7, 1, unit), (4, 3, 5 * unit)), cube[:, 1:4])
    flat = random_bits(dtype, (2 * BLOCK_LANES * 8 // dtype.itemsize + 6 * unit,), seed).to(scale.device)
    pieces.add(Region("w", (BLOCK_LANES * 8 // dtype.itemsize - unit,), tuple(flat.shape)), flat)
    pieces.add(Region("w", (), ()), random_bits(dtype, (), seed).to(scale.device))
    return pieces


def check_long(scale: Scale) -> int:
    """A piece whose offsets need more than 31 bits, of which the digest is added up part by part."""
    rows, columns = scale.pick(64, 300_000), 8192
    data = torch.empty((rows, columns), dtype=torch.int16, device=scale.device).random_(-(2**15), 2**15)
    region, pieces = Region("w", (5, 8), (rows, columns)), Pieces(scale.device)
    pieces.add(region, data)
    found = pieces.open()(True).digests()[0]
    cuts = [Region("w", (5 + at, 8), (min(20_000, rows - at), columns)) for at in range(0, rows, 20_000)]
    sums = [region_sum(data[cut.offset[0] - 5 :][: cut.shape[0]], cut) for cut in cuts]
    require(found == sum(as_digests(sums)) % 2**64, "a long piece: another digest")
    require(torch.equal(data, pieces.targets[0]), "a long piece: other bits")
    return data.nbytes


def measure_speed(scale: Scale) -> dict[str, Any]:
    """GB/s of the tensors of some layers, copied and digested, in one pass and others, interleaved."""
    pieces = Pieces(scale.device)
    for number in range(scale.pick(4, 160)):
        shape = (scale.pick(64, 4096), (4096, 12_288, 4096, 1024)[number % 4])
        data = torch.empty(shape, dtype=torch.int16, device=scale.device).random_(-(2**15), 2**15)
        pieces.add(Region(f"w{number}", (0, 0), shape), data)
    num_bytes = sum(source.nbytes for source in pieces.sources)

    def copy() -> None:
        for source, target in zip(pieces.sources, pieces.targets, strict=True):
            target.copy_(source)

    launch = pieces.open()
    calls: dict[str, Callable[[], object]] = {"copy": copy, "pass": lambda: launch(True).digests()}
    calls["digests_alone"] = lambda: launch(False).digests()
    for tile in OTHER_TILES if scale.device == "cuda" else ():
        other = pieces.open((tile, NARROW))
        calls[describe(tile)] = lambda go=other: go(True).digests()  # type: ignore[misc]
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            if scale.device == "cuda":
                torch.cuda.synchronize()
            if number:
                times_s[name].append(time.perf_counter() - start_s)
    gbps = {name: round(num_bytes / 1e9 / median(values), 1) for name, values in times_s.items()}
    return {"gb": round(num_bytes / 1e9, 2), "tile": describe(WIDE), "gbps": gbps}


def describe(tile: Tile) -> str:
    """In few words."""
    return f"{tile.rows}x{tile.lanes}, {tile.warps} warps, {tile.item_bytes >> 10} KiB"
