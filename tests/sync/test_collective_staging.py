"""Chunks from live regions and tensors from chunks, without a network: cuts, duplicates, what is missing or altered."""

import numpy as np
import pytest
import torch
from tests.sync.collective_peers import cut_source
from tests.sync.parts import assert_same_bits, make_model

from weightcast.sync.errors import ModelMismatch, SourceError, WireError
from weightcast.sync.transports.collective import CollectiveReceiver, broadcast_version, receive_version
from weightcast.sync.transports.collective_backend import BroadcastGroup
from weightcast.sync.transports.collective_layout import CollectiveLayout, make_layout, make_offer
from weightcast.sync.transports.collective_staging import RegionPacker, TensorAssembler

Chunks = dict[tuple[int, int], tuple[bytes, np.ndarray]]


def lay_out(tensors: dict[str, torch.Tensor], num_sources: int) -> tuple[CollectiveLayout, list[RegionPacker]]:
    """Sources that hold rows of each tensor, and their packers."""
    sources = [cut_source(tensors, rank, num_sources) for rank in range(num_sources)]
    layout = make_layout({source.rank: make_offer(source, 4096, 8192, 1) for source in sources})
    packers = [RegionPacker(layout.regions[s.rank], s.held(), layout.dtypes, layout.chunks[s.rank]) for s in sources]
    return layout, packers


def pack_all(layout: CollectiveLayout, packers: list[RegionPacker]) -> tuple[Chunks, dict[int, bytes]]:
    """Every chunk and seal; buffers hold noise before they are packed."""
    packed: Chunks = {}
    for rank, packer in enumerate(packers):
        packer.begin()
        for chunk in layout.chunks[rank]:
            buffer = np.full(chunk.num_bytes, 0xAB, np.uint8)
            packed[rank, chunk.index] = (packer.pack(chunk.index, buffer), buffer)
    return packed, {rank: packer.digests() for rank, packer in enumerate(packers)}


@pytest.mark.parametrize("num_sources", [1, 2, 3])
def test_any_order_and_duplicates_give_the_same_bits_version_after_version(num_sources: int) -> None:
    tensors = make_model(1, rows=300)
    layout, packers = lay_out(tensors, num_sources)
    assembler = TensorAssembler(layout)
    into: dict[str, torch.Tensor] | None = None
    for seed in (2, 3):
        for name, tensor in make_model(seed, rows=300).items():
            tensors[name].copy_(tensor)
        packed, seals = pack_all(layout, packers)
        assembler.begin(into)
        for (rank, index), (value, buffer) in list(reversed(packed.items())) + list(packed.items()):
            assembler.take(rank, index, value, buffer)
        assert assembler.missing == () and assembler.num_bytes == sum(len(buffer) for _, buffer in packed.values())
        got = assembler.finish(seals)
        assert_same_bits(got, tensors)
        into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}


def test_gaps_are_the_same_every_time() -> None:
    layout, packers = lay_out(make_model(1), 1)
    first, _ = pack_all(layout, packers)
    second, _ = pack_all(layout, packers)
    assert [value for value, _ in first.values()] == [value for value, _ in second.values()]


def test_what_is_missing_is_named() -> None:
    layout, packers = lay_out(make_model(4, rows=300), 2)
    packed, seals = pack_all(layout, packers)
    assembler = TensorAssembler(layout)
    assembler.begin()
    for (rank, index), (value, buffer) in packed.items():
        if (rank, index) != (1, 0):
            assembler.take(rank, index, value, buffer)
    assert assembler.missing == ((1, 0),)
    with pytest.raises(WireError, match="the first is chunk 0 of source rank 1; the version is refused"):
        assembler.finish(seals)


@pytest.mark.parametrize("bad_seal", [b"", bytes(7), bytes(8)])
def test_seals_of_another_length_are_refused(bad_seal: bytes) -> None:
    layout, packers = lay_out(make_model(5), 1)
    packed, _ = pack_all(layout, packers)
    assembler = TensorAssembler(layout)
    assembler.begin()
    for (rank, index), (value, buffer) in packed.items():
        assembler.take(rank, index, value, buffer)
    with pytest.raises(WireError, match="bytes of digests for 8 regions"):
        assembler.finish({0: bad_seal})


def test_a_live_view_that_changed_its_shape_and_targets_that_do_not_fit() -> None:
    tensors = make_model(6)
    source = cut_source(tensors, 0, 1)
    layout = make_layout({0: make_offer(source, 4096, 8192, 1)})
    held = source.held()
    held[1] = type(held[1])(held[1].region, lambda: torch.zeros(2))
    packer = RegionPacker(layout.regions[0], held, layout.dtypes, layout.chunks[0])
    packer.begin()
    with pytest.raises(SourceError, match="make the source after the model is wrapped"):
        for chunk in layout.chunks[0]:
            packer.pack(chunk.index, np.zeros(chunk.num_bytes, np.uint8))
    with pytest.raises(ModelMismatch, match=r"embed\.weight is .* none was given"):
        TensorAssembler(layout).begin({})


def test_sources_that_disagree_are_refused() -> None:
    tensors = make_model(7)
    offers = {rank: make_offer(cut_source(tensors, rank, 2), 4096, 8192, 1) for rank in (0, 1)}
    other = make_offer(cut_source(tensors, 1, 2), 8192, 8192, 1)
    with pytest.raises(ModelMismatch, match=r"source rank 1 has the model .* start all with the same"):
        make_layout({0: offers[0], 1: other})
    with pytest.raises(SourceError, match="do not make a whole model"):
        make_layout({0: offers[0]})


def test_one_call_a_side_moves_a_version() -> None:
    import socket
    import threading

    tensors = make_model(8, rows=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    got: dict[str, torch.Tensor] = {}
    thread = threading.Thread(target=lambda: got.update(receive_version(address, "engine-0", timeout_s=60.0).tensors))
    thread.start()
    report = broadcast_version(cut_source(tensors, 0, 1), address, 5, engines=("engine-0",), timeout_s=60.0)
    thread.join(60)
    assert report.version.number == 5 and not thread.is_alive()
    assert_same_bits(got, tensors)
    assert CollectiveReceiver.__doc__


class EndsLate:
    """A broadcast whose wait runs out in the very moment in which it ends."""

    def __init__(self, failure: str = "") -> None:
        self._failure = failure
        self._waits = 0

    def wait(self, timeout: object = None) -> None:
        """Times out once."""
        self._waits += 1
        if self._waits == 1:
            raise RuntimeError("Operation timed out!")
        if self._failure:
            raise RuntimeError(self._failure)

    def is_completed(self) -> bool:
        """By now it is."""
        return True


class NoBackend:
    """In place of torch's, of which no operation ends at a wished moment."""

    def rank(self) -> int:
        """The sender's."""
        return 0

    def size(self) -> int:
        """Of two."""
        return 2


def test_a_wait_that_runs_out_as_the_broadcast_ends_is_no_failure() -> None:
    group = BroadcastGroup(NoBackend(), "gloo", torch.device("cpu"))
    group.wait(EndsLate(), 1e12, lambda: None)
    with pytest.raises(ConnectionError, match="a broadcast failed: Connection reset"):
        group.wait(EndsLate("Connection reset"), 1e12, lambda: None)
