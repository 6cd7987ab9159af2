"""Weights in host memory that are read, sent and digested where they lie, by engines of the host and over the wire."""

import logging
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from tests.sync.in_place_parts import copy_of, land, landing
from tests.sync.packed import make_packed
from tests.sync.parts import (
    PATIENT,
    WAIT_S,
    Engine,
    assert_same_bits,
    is_shared,
    make_model,
    make_specs,
    publishers,
    running,
    wait_until,
)

from weightcast.sync import (
    FleetPolicy,
    HeldRegion,
    Region,
    TensorSpec,
    Version,
    WeightPublisher,
    WeightSubscriber,
)
from weightcast.sync.chunks import lay_out_chunks
from weightcast.sync.errors import DeadlineExceeded, EngineError, ReachError
from weightcast.sync.host_landing import HostLanding
from weightcast.sync.host_live import HostLivePacker
from weightcast.sync.host_passes import has_passes
from weightcast.sync.host_pieces import HostPieces
from weightcast.sync.messages import ChunkRequest, encode
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.transports import shared_memory_live
from weightcast.sync.transports.zmq_chunks import ZmqChunkServer

pytestmark = pytest.mark.skipif(not has_passes(), reason="the loops in C were not built: no C compiler at install")
CHUNK_BYTES = 8192
TCP = "tcp://127.0.0.1:0"
IN_PLACE = {"delta": "off", "in_place": True, "timeout_s": WAIT_S, "chunk_bytes": CHUNK_BYTES}


class LiveSource:
    """Parameters of a trainer: views of one buffer, tensors of their own, and some that must be packed."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.buffer = torch.zeros(600, 40, dtype=torch.bfloat16)
        self.params = make_model(0, rows=300) | {
            "buffered.0": self.buffer[:250],
            "buffered.1": self.buffer[250:],
            "wide": torch.zeros(40, 96, dtype=torch.bfloat16),
            "cast": torch.zeros(30, 16),
            "turned": torch.zeros(16, 24),
        }

    def live(self, name: str) -> torch.Tensor:
        param = self.params[name]
        match name:
            case "wide":
                return param[:, 16:80]
            case "turned":
                return param.t()
            case "norm.weight":
                return param + 1
        return param

    def tensors(self) -> dict[str, torch.Tensor]:
        """As engines are to have them."""
        return {
            name: self.live(name).to(torch.bfloat16 if name == "cast" else self.params[name].dtype)
            for name in self.params
        }

    def specs(self) -> list[TensorSpec]:
        return make_specs(self.tensors())

    def held(self) -> list[HeldRegion]:
        cut = {"wide": [Region("wide", (0, 0), (40, 30)), Region("wide", (0, 30), (40, 34))]}
        return [
            HeldRegion(region, partial(self._part, region))
            for spec in self.specs()
            for region in cut.get(spec.name, [spec.whole()])
        ]

    def _part(self, region: Region) -> torch.Tensor:
        return self.live(region.name)[region.slices] if region.shape else self.live(region.name)

    def step(self, seed: int) -> None:
        """Change every parameter where it lies."""
        generator = torch.Generator().manual_seed(seed)
        for param in self.params.values():
            flat = param.view(-1).view(torch.uint8)
            limit = 2 if param.dtype is torch.bool else 256
            flat.copy_(torch.randint(0, limit, flat.shape, dtype=torch.uint8, generator=generator))


def test_versions_reach_engines_of_the_host_and_over_the_wire(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = LiveSource()
    kinds = {"near": "shared_memory", "auto": "auto", "link": "tcp", "wire": "zmq"}
    with WeightPublisher(source, TCP, expose=("shared_memory", "tcp"), **IN_PLACE) as publisher:  # type: ignore[arg-type]
        engines = [
            Engine(name, publisher.address, limits=PATIENT, kwargs={"transport": kind}) for name, kind in kinds.items()
        ]
        with running(*engines):
            publisher.wait_for_subscribers(len(engines))
            for number in range(1, 6):
                source.step(number)
                if number == 4:  # as distributed optimizers do
                    source.params["embed.weight"] = source.params["embed.weight"].clone()
                report = publisher.publish(number)
                for engine in engines:
                    assert_same_bits(engine.tensors, source.tensors())
                carried = {engine.engine: engine.transport for engine in report.engines}
                assert carried == kinds | {"auto": "shared_memory"}
                assert {engine.engine: engine.num_repeats for engine in report.engines} == dict.fromkeys(kinds, 0)
                assert "hold" in report.phases_s
        assert not any(engine.errors for engine in engines)
    assert is_shared(source.buffer) and is_shared(source.params["embed.weight"])
    assert not is_shared(source.params["cast"])
    said = [record.message for record in caplog.records if "bytes are packed" in record.message]
    assert len(said) == 2, "once, and once more when a parameter had moved"


def test_a_run_waits_for_what_is_packed_within_it(tmp_path: Path) -> None:
    source = LiveSource()
    specs = {spec.name: spec for spec in source.specs()}
    held = {one.region: one for one in source.held()}
    chunks = lay_out_chunks(list(held), {name: spec.dtype for name, spec in specs.items()}, CHUNK_BYTES)
    arena = allocate_arena(sum(chunk.num_bytes for chunk in chunks))
    packer = HostLivePacker(held, specs, list(held), chunks, arena, shares=False)
    packer.look()
    snapshot = packer.begin(Version(1, 1), "off")
    is_live = [snapshot.is_ready(index) for index in range(len(snapshot))]
    packed = is_live.index(False)
    live = is_live.index(True, packed)
    with zmq.Context() as context, context.socket(zmq.DEALER) as engine:
        server = ZmqChunkServer(context, f"ipc://{tmp_path}/s", None)
        server.hold(snapshot)
        engine.connect(server.address)
        engine.send(encode(ChunkRequest(snapshot.version, packed, None, True, live - packed + 1)))
        assert server.socket.poll(5000)
        server.answer()
        assert server.awaited_index == live and not engine.poll(100)
        while snapshot.num_ready < live:
            packer.pack_next(snapshot)
        server.answer()
        assert engine.poll(5000) and server.awaited_index is None
        server.close()
    packer.close()


def test_ranks_give_their_own_parts(tmp_path: Path) -> None:
    tensors, engine = make_model(3, rows=300), Engine("engine", f"ipc://{tmp_path}/p")
    with publishers(tensors, 2, engine.address, expose=("shared_memory",), **IN_PLACE) as made, running(engine):
        made[0].wait_for_subscribers(1)
        for number in (1, 2):
            for tensor in tensors.values():
                tensor.view(-1).view(torch.uint8).bitwise_xor_(1)
            begun = [publisher.begin(number, hold=True) for publisher in made]
            assert {publication.wait().engines[0].transport for publication in begun} == {"shared_memory"}
            assert_same_bits(engine.tensors, tensors)


def test_from_parameter_to_parameter_nothing_is_staged_or_packed(tmp_path: Path) -> None:
    tensors, address = make_model(1, rows=300), f"ipc://{tmp_path}/p"
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    engine = Engine("other", address)
    publishing = publishers(tensors, 1, address, expose=("shared_memory",), **IN_PLACE)
    with publishing as (publisher,), running(engine), landing(address, into, transport="shared_memory") as subscriber:
        publisher.wait_for_subscribers(2)
        for number in (1, 2):
            tensors["embed.weight"].view(torch.int16).add_(number)
            publication = publisher.begin(number, hold=True)
            assert land(subscriber, into, tensors)
            assert {engine.transport for engine in publication.wait().engines} == {"shared_memory"}
    assert_same_bits(copy_of(into), tensors)


def test_what_a_source_shared_is_not_kept_by_the_tables_that_were_made_for_it() -> None:
    packed = make_packed({"w": torch.arange(3000, dtype=torch.uint8)})
    snapshot = packed.pack(1, "off")
    staging = packed.stage(snapshot, Shadow())
    layout, tensors = staging.layouts[0], {"w": torch.zeros(3000, dtype=torch.uint8)}
    pieces = HostPieces(3000, np.array([(0, 1, 3000, 0, 0, 3000)], np.int64), [packed.packer.arena])
    of_pieces, of_bytes = HostLanding(layout, tensors, pieces), HostLanding(layout, tensors)
    assert of_pieces.is_of(pieces) and not of_pieces.is_of(None)
    assert of_bytes.is_of(None) and not of_bytes.is_of(pieces)
    seen = weakref.ref(pieces)
    del pieces
    assert seen() is None and not of_pieces.is_of(None)


def test_weights_that_change_while_they_are_read_are_never_served(tmp_path: Path) -> None:
    tensors, address = make_model(1, rows=300), f"ipc://{tmp_path}/p"
    engines = [
        Engine("near", address, kwargs={"transport": "shared_memory"}),
        Engine("wire", address, kwargs={"transport": "zmq"}),
    ]
    policy = FleetPolicy.all(minimum=len(engines))
    with publishers(tensors, 1, address, policy=policy, expose=("shared_memory",), **IN_PLACE) as (publisher,):
        publication = publisher.begin(1, hold=True)
        publication.copied()
        tensors["embed.weight"].view(torch.int16)[7, 7] += 1  # too early: nobody has read it yet
        with running(*engines):
            with pytest.raises(EngineError, match=r"embed\.weight"):
                publication.wait()
            publication.packed()
            assert not any(engine.tensors for engine in engines)
            publisher.publish(2)
            for engine in engines:
                assert_same_bits(engine.tensors, tensors)
                assert engine.numbers == [2]


def test_an_engine_that_comes_after_a_version_in_place_is_over_waits_for_the_next(tmp_path: Path) -> None:
    tensors, address = make_model(1, rows=300), f"ipc://{tmp_path}/p"
    publishing = publishers(tensors, 1, address, expose=("shared_memory",), **IN_PLACE)
    with publishing as (publisher,), running(Engine("first", address)):
        publisher.publish(1)
        with WeightSubscriber(address, engine="late", limits=PATIENT) as late:
            wait_until(lambda: "no longer" in late._subscription.describe())
            with pytest.raises(DeadlineExceeded, match=r"its sources had version 1 .* no longer, and no newer one was"):
                late.wait(0.1)
            publication = publisher.begin(2, hold=True)
            update = late.wait(WAIT_S)
            assert_same_bits(dict(update), tensors)
            update.commit()
            assert publication.wait().serving == ("first", "late")


def test_without_room_in_shared_memory_engines_of_the_host_are_sent_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(storages: object) -> list[int]:
        raise ReachError("there is no room")

    monkeypatch.setattr(shared_memory_live, "share_storages", refuse)
    tensors, engine = make_model(1, rows=300), Engine("engine", f"ipc://{tmp_path}/p")
    with publishers(tensors, 1, engine.address, expose=("shared_memory",), **IN_PLACE) as (publisher,), running(engine):
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            tensors["embed.weight"].view(torch.int16).add_(1)
            report = publisher.publish(number)
            assert_same_bits(engine.tensors, tensors)
            assert report.engines[0].transport == "zmq" and "hold" in report.phases_s
    said = [record.message for record in caplog.records if "there is no room" in record.message]
    assert len(said) == 1 and not is_shared(tensors["embed.weight"])


def test_where_nothing_lies_in_host_memory_all_is_packed_as_usual(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class MadeSource(LiveSource):
        def live(self, name: str) -> torch.Tensor:
            return super().live(name).clone()

    source, engine = MadeSource(), Engine("engine", f"ipc://{tmp_path}/p")
    with WeightPublisher(source, engine.address, **IN_PLACE) as publisher, running(engine):  # type: ignore[arg-type]
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            source.step(number)
            report = publisher.publish(number)
            assert_same_bits(engine.tensors, source.tensors())
            assert "hold" not in report.phases_s
    said = [record.message for record in caplog.records if "packed as usual" in record.message]
    assert len(said) == 1 and "none of the weights lies in host memory" in said[0]


def test_a_source_of_weights_in_place_writes_no_copy_of_them(tmp_path: Path) -> None:
    """The host's copy is room that was asked for and never touched, which takes no memory."""
    tensors = {"w": torch.zeros(1 << 20, dtype=torch.float32)}
    address, pattern = f"ipc://{tmp_path}/p", 0xA5
    publishing = publishers(tensors, 1, address, expose=("shared_memory",), **IN_PLACE)
    with publishing as (publisher,), WeightSubscriber(address, engine="e", transport="shared_memory") as subscriber:
        publisher.wait_for_subscribers(1)
        for number in (1, 2):
            tensors["w"].fill_(number)
            publication = publisher.begin(number, hold=True)
            update = subscriber.wait(WAIT_S)
            assert_same_bits(dict(update), tensors)
            update.commit()
            publication.wait()
            live = publisher._share._live
            assert live is not None
            assert number == 1 or bool((live.arena == pattern).all())
            live.arena[:] = pattern
