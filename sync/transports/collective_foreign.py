"""Groups whose other end is an engine's own receiver, and the sender for them.

SGLang's workers make their end by torch's `_new_process_group_helper` on a `PrefixStore` of the group's name. That
helper needs no default group either, but enters the group into torch's registry, and splits it off the default group
where that is bound to a device; here the same keys are used and nothing else is touched. (`init_process_group` meets on
other keys, and hangs.) A worker's ranks begin at the engine's offset, and rank 0 sends.

    store = listen_store("10.0.0.1", 0, timeout_s=60)
    group = meet_sglang(store, "weights", "nccl", size=1 + num_workers, timeout_s=60)
    sender = NamedSender(group)
    sender.send(bucket, tensors.__getitem__, deadline, watch)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d as c10d

from weightcast.sync.errors import ConfigError, ModelMismatch
from weightcast.sync.regions import TensorSpec
from weightcast.sync.transports.collective_backend import BroadcastGroup, Watch, check_backend
from weightcast.sync.transports.collective_rules import NamedBucket

NUM_BUFFERS = 2
Find = Callable[[str], torch.Tensor]
"""The tensor of a name, whole, of its spec's shape; on any device."""


def meet_sglang(
    store: Store, group_name: str, kind: str, size: int, timeout_s: float, interface: str = ""
) -> BroadcastGroup:
    """Rank 0's end of a group of SGLang's workers. Blocks until all have come, `DeadlineExceeded` when they do not.

    Where one backend serves all kinds of devices, torch makes one alone, under the name of the first kind.
    """
    check_backend(kind)
    first_device = next(iter(c10d.BackendConfig(c10d.Backend(kind)).get_device_backend_map()))
    prefixed = PrefixStore(f"{first_device}/", PrefixStore(f"{group_name}/", PrefixStore(group_name, store)))
    return BroadcastGroup.build(kind, prefixed, 0, size, timeout_s, interface)


class NamedSender:
    """Sends named tensors over a group, in buckets as the other side cuts them. For one thread.

    Two buffers, so that the next bucket may be packed while the other side still loads the one before.
    """

    def __init__(self, group: BroadcastGroup) -> None:
        if group.rank != 0:
            raise ConfigError(f"engines receive from rank 0 of a group, this is rank {group.rank}")
        self._group = group
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(NUM_BUFFERS)]
        self._next = 0

    def pack(self, bucket: NamedBucket, find: Find) -> torch.Tensor:
        """The bytes of a bucket, on the group's device; valid until the one after the next is packed.

        Raises `ModelMismatch` when a tensor is not what its spec says.
        """
        tensors = [_checked(spec, find(spec.name)) for spec in bucket.specs]
        buffer = self._take_buffer(bucket.num_bytes)
        at = 0
        for spec, tensor in zip(bucket.specs, tensors, strict=True):
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            buffer[at : at + spec.num_bytes].copy_(raw)
            at += spec.num_bytes
        assert at == bucket.num_bytes
        return buffer

    def _take_buffer(self, num_bytes: int) -> torch.Tensor:
        index, self._next = self._next, (self._next + 1) % NUM_BUFFERS
        if len(self._buffers[index]) < num_bytes:
            self._buffers[index] = torch.empty(num_bytes, dtype=torch.uint8, device=self._group.device)
        return self._buffers[index][:num_bytes]

    def broadcast(self, bucket: NamedBucket, packed: torch.Tensor, deadline: float, watch: Watch) -> None:
        """Send packed bytes; returns when they have left. Errors as `BroadcastGroup.wait` and `watch` raise them."""
        if bucket.is_single and self._group.kind == "nccl":
            packed = packed.view(bucket.specs[0].dtype)  # NCCL is told a dtype, and both ends should say the same
        work = self._group.broadcast(packed, deadline)
        try:
            self._group.wait(work, deadline, watch)
        except BaseException:
            self._group.close()
            raise

    def send_all(self, buckets: Sequence[NamedBucket], find: Find, deadline: float, watch: Watch) -> int:
        """Pack and send bucket after bucket, the next packed while the one before is on its way; the bytes sent."""
        under_way: Any = None
        try:
            for bucket in buckets:
                packed = self.pack(bucket, find)
                if under_way is not None:
                    self._group.wait(under_way, deadline, watch)
                if bucket.is_single and self._group.kind == "nccl":
                    packed = packed.view(bucket.specs[0].dtype)
                under_way = self._group.broadcast(packed, deadline)
            if under_way is not None:
                self._group.wait(under_way, deadline, watch)
        except BaseException:
            self._group.close()
            raise
        return sum(bucket.num_bytes for bucket in buckets)

    def close(self) -> None:
        """Close the group."""
        self._group.close()


def _checked(spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        raise ModelMismatch(
            f"{spec.name} is {tensor.dtype} {list(tensor.shape)}, and {spec.dtype} {list(spec.shape)} was announced to "
            "the engine, which would read other bytes than were meant; announce what is sent"
        )
    return tensor
