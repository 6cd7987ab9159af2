"""Our packing against vLLM's own: its producer makes the same bytes, and its consumer reads ours over a real group.

vLLM's functions ask for CUDA streams; on a CPU these are replaced by ones that do nothing, and nothing else is.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import PrefixStore

from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import DTYPES, TensorSpec
from weightcast.sync.transports.collective_backend import BroadcastGroup, connect_store, listen_store
from weightcast.sync.transports.collective_foreign import NamedSender
from weightcast.sync.transports.collective_rules import (
    plan_singles,
    plan_vllm_packed,
    sort_by_itemsize,
    vllm_init_info,
    vllm_update_info,
)

pytestmark = pytest.mark.vllm

WAIT_S = 30.0
Tensors = dict[str, torch.Tensor]


class NoStream:
    """In place of a CUDA stream: everything is done when it returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


@pytest.fixture
def vllm_packing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module, without the need for a GPU."""
    from vllm.distributed.weight_transfer import packed_tensor

    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: (NoStream(),) * count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return packed_tensor


ROWS = st.lists(
    st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 7), max_size=3)), min_size=1, max_size=25
)


def make_tensors(rows: list[tuple[torch.dtype, list[int]]]) -> Tensors:
    """Random bits."""
    torch.manual_seed(0)
    tensors = {}
    for index, (dtype, shape) in enumerate(rows):
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (torch.Size(shape).numel() * dtype.itemsize,))
        tensors[f"t{index}"] = raw.to(torch.uint8).view(dtype).view(shape)
    return tensors


def specs_of(tensors: Tensors) -> list[TensorSpec]:
    """What they are."""
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Recorder:
    """In place of a group: keeps what is broadcast."""

    rank, kind, device = 0, "gloo", torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """vLLM's way."""
        assert src == 0
        self.sent.append(bits(tensor))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, buffer_bytes=st.integers(1, 600), num_buffers=st.integers(1, 3))
@pytest.mark.filterwarnings("ignore:Tensor '.*' has size")
def test_vllms_producer_makes_the_same_broadcasts(
    vllm_packing: Any, rows: list[Any], buffer_bytes: int, num_buffers: int
) -> None:
    tensors = make_tensors(sorted(rows, key=lambda row: -row[0].itemsize))
    group = Recorder()
    vllm_packing.packed_nccl_broadcast_producer(
        iter(tensors.items()), group, 0, lambda item: item[1], buffer_bytes, num_buffers
    )
    sender = NamedSender(group)  # type: ignore[arg-type]
    buckets = plan_vllm_packed(specs_of(tensors), buffer_bytes)
    assert [bits(sender.pack(bucket, tensors.__getitem__)) for bucket in buckets] == group.sent


@contextlib.contextmanager
def gloo_pair() -> Iterator[list[BroadcastGroup]]:
    """Two members of one group."""
    stores = [listen_store("127.0.0.1", 0, WAIT_S)]
    stores.append(connect_store("127.0.0.1", stores[0].port, time.monotonic() + WAIT_S))
    groups: list[Any] = [None, None]

    def build(rank: int) -> None:
        groups[rank] = BroadcastGroup.build("gloo", PrefixStore("a", stores[rank]), rank, 2, WAIT_S, "127.0.0.1")

    threads = [threading.Thread(target=build, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    yield groups
    for group in groups:
        group.close()


class WorkersGroup:
    """A worker's end with the one method that vLLM's receiving code calls."""

    def __init__(self, group: BroadcastGroup) -> None:
        self._group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        """Receive into `tensor`."""
        deadline = time.monotonic() + WAIT_S
        self._group.wait(self._group.broadcast(tensor, deadline), deadline, lambda: None)


MODEL: list[tuple[torch.dtype, list[int]]] = [
    (torch.bfloat16, [64, 33]),
    (torch.uint8, [7]),
    (torch.float32, []),
    (torch.float8_e4m3fn, [5, 3]),
    (torch.float32, [100]),
    (torch.bfloat16, [0, 4]),
    (torch.int64, [3]),
]


@pytest.mark.parametrize("buffer_bytes", [1, 400, 4096, 1 << 30])
@pytest.mark.filterwarnings("ignore:Tensor '.*' has size")
def test_vllms_consumer_reads_what_we_send(vllm_packing: Any, buffer_bytes: int) -> None:
    tensors = make_tensors(MODEL)
    specs = sort_by_itemsize(specs_of(tensors))
    info = vllm_update_info(specs)
    got: Tensors = {}

    def receive(group: BroadcastGroup) -> None:
        rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
        vllm_packing.packed_nccl_broadcast_consumer(
            iterator=((name, (shape, getattr(torch, dtype))) for name, dtype, shape in rows),
            group=WorkersGroup(group),
            src=0,
            post_unpack_func=lambda items: got.update({name: tensor.clone() for name, tensor in items}),
            buffer_size_bytes=buffer_bytes,
            num_buffers=2,
            device="cpu",
        )

    with gloo_pair() as groups:
        thread = threading.Thread(target=receive, args=(groups[1],))
        thread.start()
        sender = NamedSender(groups[0])
        buckets = plan_vllm_packed(specs, buffer_bytes)
        sender.send_all(buckets, tensors.__getitem__, time.monotonic() + WAIT_S, lambda: None)
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert list(got) == [spec.name for spec in specs]
    for name, tensor in tensors.items():
        assert got[name].dtype is tensor.dtype and got[name].shape == tensor.shape and bits(got[name]) == bits(tensor)


def test_what_vllm_cannot_view_is_refused_here(vllm_packing: Any) -> None:
    specs = specs_of(make_tensors(MODEL))
    names, dtypes = [spec.name for spec in specs], [spec.dtype for spec in specs]
    sizes = [spec.num_bytes for spec in specs]
    with pytest.raises(RuntimeError, match="divisible"):
        vllm_packing.unpack_tensor(
            torch.empty(sum(sizes), dtype=torch.uint8), names, [s.shape for s in specs], dtypes, sizes
        )
    with pytest.raises(ConfigError, match=r"t2 \(float32\) would begin at byte 4231"):
        plan_vllm_packed(specs)


def test_one_tensor_a_broadcast_comes_in_the_order_of_the_names() -> None:
    tensors = make_tensors(MODEL)
    specs = specs_of(tensors)
    got: list[bytes] = []

    def receive(group: BroadcastGroup) -> None:
        for spec in specs:
            into = torch.empty(spec.num_bytes, dtype=torch.uint8)
            WorkersGroup(group).broadcast(into, src=0)
            got.append(bits(into))

    with gloo_pair() as groups:
        thread = threading.Thread(target=receive, args=(groups[1],))
        thread.start()
        sender = NamedSender(groups[0])
        sender.send_all(plan_singles(specs), tensors.__getitem__, time.monotonic() + WAIT_S, lambda: None)
        thread.join(WAIT_S)
    assert got == [bits(tensor) for tensor in tensors.values()]


def test_vllm_takes_our_payloads() -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

    specs = specs_of(make_tensors(MODEL))
    update = NCCLWeightTransferUpdateInfo(**vllm_update_info(specs))
    assert [getattr(torch, name) for name in update.dtype_names] == [spec.dtype for spec in specs]
    info = NCCLWeightTransferInitInfo(**vllm_init_info(rank_offset=3, world_size=5, master=("10.0.0.1", 1234)))
    assert (info.rank_offset, info.world_size, info.packed, info.nccl_unique_id_bytes) == (3, 5, True, None)
