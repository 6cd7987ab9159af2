"""Publishing issues no collective: trainers and engines are never tied together by one."""

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tests.sync.parts import WAIT_S, Engine, TensorSource, assert_same_bits, make_model, running

from weightcast.sync import WeightPublisher

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv"),
    *("batch_isend_irecv", "monitored_barrier", "new_group"),
)


def refuse(*args: object, **kwargs: object) -> None:
    """In place of a collective."""
    raise AssertionError("a collective was issued")


@pytest.fixture
def no_collectives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gloo group of one, whose collectives all raise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    with monkeypatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, refuse)
            patch.setattr(dist.distributed_c10d, name, refuse)
        yield
    dist.destroy_process_group()


def test_publishing_issues_no_collective(no_collectives: None) -> None:
    for name in COLLECTIVES:
        with pytest.raises(AssertionError, match="a collective was issued"):
            getattr(dist, name)(torch.zeros(1))
    tensors = make_model(41)
    with WeightPublisher(TensorSource(tensors), "tcp://127.0.0.1:0", timeout_s=WAIT_S) as publisher:
        engine = Engine("engine-0", publisher.address)
        with running(engine):
            publisher.wait_for_subscribers(1)
            for number in (1, 2):
                assert publisher.publish(number).serving == ("engine-0",)
    assert_same_bits(engine.tensors, tensors)
    assert engine.errors == []
