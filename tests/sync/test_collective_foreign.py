"""The other end made by torch's own helper, as SGLang's workers make it; and the store that gives vLLM its NCCL id."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.sync.collective_peers import PATIENCE_S, peers
from tests.sync.parts import WAIT_S
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from weightcast.sync.errors import ConfigError, DeadlineExceeded, ModelMismatch
from weightcast.sync.regions import TensorSpec
from weightcast.sync.transports.collective_backend import listen_store
from weightcast.sync.transports.collective_foreign import NamedSender, meet_sglang
from weightcast.sync.transports.collective_roster import assign_rank_offsets
from weightcast.sync.transports.collective_rules import plan_sglang_buckets, plan_singles
from weightcast.sync.transports.collective_vllm import NCCL_ID_BYTES, IdStore, meet_vllm

SPECS = [
    TensorSpec("a", torch.bfloat16, (3, 5)),
    TensorSpec("b", torch.float32, ()),
    TensorSpec("c", torch.uint8, (9,)),
]


def find(name: str) -> torch.Tensor:
    """The tensors that are sent."""
    torch.manual_seed(ord(name))
    spec = next(spec for spec in SPECS if spec.name == name)
    return torch.randint(0, 100, spec.shape).to(spec.dtype)


def be_worker(pipe: Any, port: int, offset: int, tp_rank: int, world_size: int) -> None:
    """A worker with a default group of its own, that joins as SGLang's `init_custom_process_group` does."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    limit = timedelta(seconds=PATIENCE_S)
    rank = offset + tp_rank
    store, rank, size = next(rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=limit))
    helper: Any = c10d._new_process_group_helper
    group, _ = helper(
        size, rank, [], c10d.Backend("gloo"), PrefixStore("weights", store), group_name="weights", timeout=limit
    )
    c10d._world.pg_group_ranks[group] = {member: member for member in range(size)}
    flat = torch.empty(sum(spec.num_bytes for spec in SPECS), dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=group)
    got = [bytes(flat.numpy())]
    for spec in SPECS:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        dist.broadcast(tensor, src=0, group=group)
        got.append(bytes(tensor.reshape(-1).view(torch.uint8).numpy()))
    pipe.send(got)


def test_workers_of_several_engines_receive_over_torchs_own_group() -> None:
    offsets, size = assign_rank_offsets({"one": 2, "two": 1})
    store = listen_store("127.0.0.1", 0, PATIENCE_S)
    workers = [(offsets["one"], 0), (offsets["one"], 1), (offsets["two"], 0)]
    with peers(*((be_worker, store.port, offset, tp_rank, size) for offset, tp_rank in workers)) as made:
        sender = NamedSender(meet_sglang(store, "weights", "gloo", size, PATIENCE_S, "127.0.0.1"))
        deadline = time.monotonic() + PATIENCE_S
        (bucket,) = plan_sglang_buckets(SPECS)
        sender.broadcast(bucket, sender.pack(bucket, find), deadline, lambda: None)
        assert sender.send_all(plan_singles(SPECS), find, deadline, lambda: None) == 43
        single = [bytes(find(spec.name).reshape(-1).view(torch.uint8).numpy()) for spec in SPECS]
        flat = b"".join(single[index] for index in (1, 0, 2))
        for worker in made:
            assert worker.hear() == [flat, *single]
        assert not dist.is_initialized(), "the trainer's side has no default group"
        sender.close()


def test_a_trainer_waits_for_workers_no_longer_than_told() -> None:
    store = listen_store("127.0.0.1", 0, WAIT_S)
    start_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not meet the other ranks"):
        meet_sglang(store, "weights", "gloo", 2, 0.5, "127.0.0.1")
    assert time.monotonic() - start_s < 5.0


def test_tensors_must_be_what_was_announced() -> None:
    class Alone:
        rank, kind, device = 0, "gloo", torch.device("cpu")

    sender = NamedSender(Alone())  # type: ignore[arg-type]
    (bucket,) = plan_sglang_buckets(SPECS)
    with pytest.raises(ModelMismatch, match="announce what is sent"):
        sender.pack(bucket, lambda name: find(name).to(torch.float64))


def test_the_store_hands_on_an_id_and_nothing_else() -> None:
    store = IdStore()
    through_torch = PrefixStore("cuda/", store)
    with pytest.raises(DeadlineExceeded, match="made no id within"):
        store.await_id(0.05)
    nccl_id = bytes(range(NCCL_ID_BYTES))
    heard: list[bytes] = []
    thread = threading.Thread(target=lambda: heard.append(store.await_id(WAIT_S)))
    thread.start()
    through_torch.set("note", "something else")
    through_torch.set("0", nccl_id.decode("latin1").encode("latin1").hex())  # twice as long: no id
    store.set("cuda//0", nccl_id)
    thread.join(WAIT_S)
    assert heard == [nccl_id]
    assert through_torch.get("note") == b"something else"
    assert [through_torch.add("n", 2), through_torch.add("n", 3)] == [2, 5]
    assert through_torch.check(["note"]) and not through_torch.check(["nothing"])


def test_a_backend_can_be_made_on_that_store() -> None:
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=WAIT_S)
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    store = IdStore()
    group = gloo(PrefixStore("x", store), 0, 1, options)
    assert group.size() == 1


def test_vllm_is_met_on_gpus_only() -> None:
    if torch.cuda.is_available() and dist.is_nccl_available():
        for size in (1, 129):
            with pytest.raises(ConfigError, match="2 to 128"):
                meet_vllm(size, 1.0, lambda nccl_id: None)
    else:
        with pytest.raises(ConfigError, match="needs a GPU"):
            meet_vllm(2, 1.0, lambda nccl_id: None)
