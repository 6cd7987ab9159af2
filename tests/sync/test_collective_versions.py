"""Whole versions by broadcast, between real processes over gloo: many sources, many engines, and what goes wrong."""

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sync.collective_parts import ROWS, change, engines_of, making_source, small_source
from tests.sync.collective_peers import (
    PATIENCE_S,
    be_engine,
    cut_source,
    name_bits,
    peers,
)
from tests.sync.parts import make_model, random_bits

from weightcast.sync.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineError,
    ModelMismatch,
    PeerLost,
    VersionError,
)
from weightcast.sync.transports.collective_target import CollectiveReceiver


@pytest.mark.parametrize("num_engines", [1, 3])
def test_versions_arrive_whole_on_every_engine(num_engines: int) -> None:
    tensors = make_model(1, ROWS)
    with making_source(tensors, num_engines) as source, engines_of(source, num_engines, 3) as engines:
        for number in (1, 2, 7):
            change(tensors, number)
            report = source.broadcast(number)
            assert [outcome.error for outcome in report.engines] == [""] * num_engines
            assert report.version.number == number and report.num_buckets > 3
            for engine in engines:
                assert engine.hear() == {"version": number, "bits": name_bits(tensors)}
        with pytest.raises(VersionError, match="only rise"):
            source.broadcast(7)


def test_many_sources_broadcast_at_once() -> None:
    tensors = make_model(2, ROWS)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with (
        making_source(tensors, 2, world_size=3) as source,
        engines_of(source, 2, 2) as engines,
        peers(*((small_source, source.address, tensors, rank, 3, [1, 2]) for rank in (1, 2))) as others,
    ):
        for number in (1, 2):
            report = source.broadcast(number)
            shares = [report.num_bytes, *(peer.hear()["num_bytes"] for peer in others)]
            assert total <= sum(shares) <= total + 4096 and min(shares) > total / 4
            assert {engine.hear()["bits"] for engine in engines} == {name_bits(tensors)}


def test_the_trainers_default_group_is_neither_needed_nor_touched() -> None:
    tensors = make_model(3, ROWS)
    assert not dist.is_initialized()
    with making_source(tensors, 1) as source, engines_of(source, 1, 1) as (engine,):
        source.broadcast(1)
        assert engine.hear()["bits"] == name_bits(tensors)
    assert not dist.is_initialized() and not dist.distributed_c10d._world.pg_map


def test_waiting_for_a_version_that_does_not_begin_breaks_nothing() -> None:
    tensors = make_model(9, ROWS)
    with making_source(tensors, 1) as source:
        errors: list[BaseException] = []

        def engine() -> None:
            try:
                with CollectiveReceiver(source.address, "engine-0", timeout_s=PATIENCE_S) as receiver:
                    receiver.connect()
                    for _ in range(3):
                        with pytest.raises(DeadlineExceeded, match="none began"):
                            receiver.receive(timeout_s=0.2)
                    assert name_bits(receiver.receive().tensors) == name_bits(tensors)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=engine)
        thread.start()
        source.connect()
        time.sleep(1.0)
        source.broadcast(1)
        thread.join(PATIENCE_S)
        assert not thread.is_alive() and errors == []


def test_a_slow_engine_slows_the_source_and_costs_no_memory_and_has_a_deadline() -> None:
    tensors = {f"t{index}": random_bits(torch.uint8, (4 << 20,), index) for index in range(32)}
    with (
        making_source(tensors, 1, chunk_bytes=1 << 20, bucket_bytes=4 << 20) as source,
        peers((_slow_engine, source.address, 0.05)) as (engine,),
    ):
        source.connect()
        before_bytes = _resident_bytes()
        start_s = time.monotonic()
        source.broadcast(1)
        assert time.monotonic() - start_s > 30 * 0.05
        assert _resident_bytes() - before_bytes < (16 << 20), "two buckets of 4 MiB, and some"
        assert engine.hear()["bits"] == name_bits(tensors)
        with pytest.raises(DeadlineExceeded, match="all members are alive"):
            source.broadcast(2, timeout_s=0.5)
        assert "error" in engine.hear()


def _slow_engine(pipe: Any, address: str, pause_s: float) -> None:
    from weightcast.sync.transports import collective_staging

    take = collective_staging.TensorAssembler.take

    def slow_take(self: Any, rank: int, index: int, value: bytes, buffer: Any) -> None:
        time.sleep(pause_s if index % 4 == 0 else 0)
        take(self, rank, index, value, buffer)

    collective_staging.TensorAssembler.take = slow_take  # type: ignore[assignment,method-assign]
    be_engine(pipe, address, "engine-0", 2)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_an_engine_holds_one_copy_of_the_model_and_two_buckets() -> None:
    tensors = {f"t{index}": random_bits(torch.uint8, (4 << 20,), index) for index in range(64)}
    with (
        making_source(tensors, 1, chunk_bytes=1 << 20, bucket_bytes=4 << 20) as source,
        peers((_measuring_engine, source.address)) as (engine,),
    ):
        source.broadcast(1)
        said = engine.hear()
        assert said["bits"] == name_bits(tensors)
        model_bytes = 64 * (4 << 20)
        assert said["grown_bytes"] < model_bytes + (48 << 20), said


def _measuring_engine(pipe: Any, address: str) -> None:
    with CollectiveReceiver(address, "engine-0", timeout_s=PATIENCE_S) as receiver:
        receiver.connect()
        before_bytes = _resident_bytes()
        update = receiver.receive()
        grown_bytes = _resident_bytes() - before_bytes
        pipe.send({"bits": name_bits(update.tensors), "grown_bytes": grown_bytes})


def test_bytes_altered_on_the_way_are_refused_by_name_and_the_next_version_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from weightcast.sync.transports import collective_staging

    tensors = make_model(10, ROWS)
    pack = collective_staging.RegionPacker.pack

    def altered(self: Any, index: int, into: Any) -> bytes:
        value = pack(self, index, into)
        if index == 2:
            into[17] ^= 1
        return value

    with making_source(tensors, 2) as source, engines_of(source, 2, 1) as engines:
        with monkeypatch.context() as patch:
            patch.setattr(collective_staging.RegionPacker, "pack", altered)
            with pytest.raises(EngineError, match=r"engine-0: .*1 chunks came damaged.* chunk 2 of source rank 0"):
                source.broadcast(1)
        for engine in engines:
            assert engine.hear()["error"] == "WireError"
            engine.tell("stay")
        assert source.lost == ()


def test_digests_catch_what_the_hashes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.sync.transports import collective_staging

    tensors = make_model(11, ROWS)
    digests = collective_staging.RegionPacker.digests
    monkeypatch.setattr(
        collective_staging.RegionPacker, "digests", lambda self: bytes([digests(self)[0] ^ 1]) + digests(self)[1:]
    )
    with making_source(tensors, 1) as source, engines_of(source, 1, 1) as (engine,):
        with pytest.raises(EngineError, match=r"tensor 'embed\.weight' has the digest"):
            source.broadcast(1)
        assert engine.hear()["error"] == "WireError"


def test_an_engine_of_another_model_refuses_before_anything_is_sent() -> None:
    with making_source(make_model(12), 1) as source:
        found: list[BaseException] = []

        def engine() -> None:
            specs = cut_source(make_model(12, rows=65), 0, 1).specs()
            with CollectiveReceiver(source.address, "engine-0", expect=specs, timeout_s=PATIENCE_S) as receiver:
                try:
                    receiver.receive()
                except ModelMismatch as error:
                    found.append(error)

        thread = threading.Thread(target=engine)
        thread.start()
        with pytest.raises(DeadlineExceeded, match="engine-0"):
            source.broadcast(1, timeout_s=2.0)
        thread.join(PATIENCE_S)
        assert "embed.weight" in str(found[0])


def test_engines_may_join_at_a_rebuilding() -> None:
    tensors = make_model(13, ROWS)
    with making_source(tensors, 1) as source, engines_of(source, 2, 1) as engines:
        source.broadcast(1)
        assert engines[0].hear()["version"] == 1
        with pytest.raises(ConfigError, match="twice"):
            source.rebuild(engines=("engine-1", "engine-1"))
        assert source.rebuild(engines=("engine-1",)).generation == 2
        source.broadcast(2)
        assert engines[1].hear() == {"version": 2, "bits": name_bits(tensors)}


def test_an_engine_that_was_started_again_is_taken_in_at_the_next_generation() -> None:
    tensors = make_model(14, ROWS)
    with making_source(tensors, 2) as source, engines_of(source, 2, 2) as engines:
        source.broadcast(1)
        assert [engine.hear()["version"] for engine in engines] == [1, 1]
        engines[1].end()
        with peers((be_engine, source.address, "engine-1", 1)) as (again,):
            with pytest.raises(PeerLost, match="generation 1"):
                source.broadcast(2)
            assert engines[0].hear()["error"] == "PeerLost"
            engines[0].tell("rejoin")
            source.rebuild(engines=("engine-0", "engine-1"))
            source.broadcast(3)
            assert again.hear() == engines[0].hear() == {"version": 3, "bits": name_bits(tensors)}
