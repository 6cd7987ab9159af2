"""A worker of the stand-in for SGLang: receives weights exactly as SGLang 0.5.23 does, and does nothing else with them.

It joins a group with torch's `_new_process_group_helper` on a `PrefixStore` of the group's name at rank `rank_offset +
tp_rank`, receives tensor by tensor or as a `flattened_bucket`, refuses what SGLang refuses in the same words, and keeps
the tensors by name. Commands come as JSON lines on stdin, answers go to stdout: `{"success": ..., "message": ...}`.

Run by `conformance_server`; its process has a default process group of its own, as a worker of SGLang has.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

Answer = dict[str, Any]
_GROUP_TIMEOUT = timedelta(minutes=5)


class Worker:
    """One tensor-parallel rank. Its model is whatever tensors it was given: by name, of any shape."""

    def __init__(self, tp_rank: int, tp_size: int, seed: int) -> None:
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.model: dict[str, torch.Tensor] = {"seed": torch.tensor([seed])}
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._in_session = False
        self.commands: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "init_weights_update_group": self.init_group,
            "destroy_weights_update_group": self.destroy_group,
            "begin_weight_update": self.begin,
            "update_weights_from_distributed": self.update,
            "end_weight_update": self.end,
            "weights_checker": self.checksum,
        }

    def init_group(self, body: dict[str, Any]) -> Answer:
        """What `init_custom_process_group` does: rendezvous, a prefix of the name, torch's helper."""
        rank = body["rank_offset"] + self.tp_rank
        url = f"tcp://{body['master_address']}:{body['master_port']}"
        try:
            store, rank, size = next(rendezvous(url, rank, body["world_size"], timeout=_GROUP_TIMEOUT))
            store.set_timeout(_GROUP_TIMEOUT)
            name = body["group_name"]
            group, _ = c10d._new_process_group_helper(
                size,
                rank,
                [],
                c10d.Backend(body["backend"]),
                PrefixStore(name, store),
                group_name=name,
                backend_options=None,
                timeout=_GROUP_TIMEOUT,
            )
            c10d._world.pg_group_ranks[group] = {member: member for member in range(size)}
            self._groups[name] = group
        except Exception as error:
            return _no(f"Failed to initialize custom process group: {error}.")
        return _yes("Succeeded to initialize custom process group.")

    def destroy_group(self, body: dict[str, Any]) -> Answer:
        """Leave a group."""
        group = self._groups.pop(body["group_name"], None)
        if group is None:
            return _no("The group to be destroyed does not exist.")
        dist.destroy_process_group(group)
        return _yes("Succeeded to destroy custom process group.")

    def begin(self, body: dict[str, Any]) -> Answer:
        """Open a session."""
        if self._in_session:
            return _no("a weight-update session is already open; call end_weight_update() first")
        self._in_session = True
        return _yes("Success")

    def end(self, body: dict[str, Any]) -> Answer:
        """Close the session."""
        if not self._in_session:
            return _no("no weight-update session is open; call begin_weight_update() first")
        self._in_session = False
        return _yes("Success")

    def update(self, body: dict[str, Any]) -> Answer:
        """Receive one call's tensors and keep them."""
        if not self._in_session:
            return _no("update_weights_from_distributed must run between begin_weight_update() and end_weight_update()")
        try:
            group = self._groups[body["group_name"]]
            specs = list(zip(body["names"], body["dtypes"], body["shapes"], strict=True))
            receive = self._receive_bucket if body.get("load_format") == "flattened_bucket" else self._receive_singles
            self.model |= receive(specs, group)
        except Exception as error:
            return _no(f"Failed to receive weights: {error}")
        self.model.pop("seed", None)
        return _yes("Succeeded to update parameter online.")

    def _receive_singles(self, specs: list[Any], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
        tensors, works = {}, []
        for name, dtype, shape in specs:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            works.append(dist.broadcast(tensors[name], src=0, group=group, async_op=True))
        for work in works:
            work.wait()
        return tensors

    def _receive_bucket(self, specs: list[Any], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
        places, at = [], 0
        for name, dtype_name, shape in specs:
            dtype = getattr(torch, dtype_name)
            if at % dtype.itemsize:
                raise ValueError(f"Unaligned received tensor {name}: byte offset {at}, dtype {dtype}")
            end = at + torch.Size(shape).numel() * dtype.itemsize
            places.append((name, dtype, shape, at, end))
            at = end
        if not places:
            raise ValueError("Cannot create empty tensor bucket")
        flat = torch.empty(at, dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=group)
        return {name: flat[start:end].view(dtype).reshape(shape) for name, dtype, shape, start, end in places}

    def checksum(self, body: dict[str, Any]) -> Answer:
        """The bits of every tensor, as hex digits; SGLang's own checksums are of another kind."""
        sums = {
            name: xxhash.xxh3_128_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for name, tensor in sorted(self.model.items())
        }
        return _yes("Success") | {"checksums": sums}


def _yes(message: str) -> Answer:
    return {"success": True, "message": message}


def _no(message: str) -> Answer:
    return {"success": False, "message": message}


def main() -> None:
    """`conformance_worker TP_RANK TP_SIZE PORT SEED`: answer commands until stdin ends."""
    tp_rank, tp_size, port, seed = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=tp_rank, world_size=tp_size)
    worker = Worker(tp_rank, tp_size, seed)
    answers = sys.stdout
    print(json.dumps(_yes("ready")), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = worker.commands[command["command"]](command["body"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
