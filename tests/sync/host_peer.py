"""A process of this host that shares memory, driven by lines of JSON, that a test may stop or kill.

python -m tests.sync.host_peer

Each command is {"do": NAME, ...}; the answer is what the function of that name returns, or {"error": ..., "text": ...}.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tests.ranks import ROOT
from tests.sync.parts import make_specs, random_bits
from tests.sync.peer import Peer

from weightcast.sync import Version
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import WeightcastError
from weightcast.sync.host.leader import HostLeader
from weightcast.sync.host.lease import Lease
from weightcast.sync.host.share import join_host_share
from weightcast.sync.transports.shared_memory import ExposedMemory, ReachedMemory, expose, reach

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "matrix": ((33, 70), torch.bfloat16),
    "scalar": ((), torch.float32),
    "empty": ((0, 3), torch.float32),
    "flags": ((5,), torch.bool),
    "big": ((1 << 20,), torch.uint8),
}
NOBODY = 65534


class HostPeer(Peer):
    """The parent's handle of such a process."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.sync.host_peer"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )

    def __enter__(self) -> "HostPeer":
        return self

    def do(self, name: str, **arguments: Any) -> Any:
        """The answer to a command."""
        return self.ask(do=name, **arguments)

    def kill(self) -> None:
        """kill -9, and wait for it."""
        self.process.kill()
        self.process.wait()


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A small model whose bits follow from the seed."""
    return {name: random_bits(dtype, shape, seed) for name, (shape, dtype) in SHAPES.items()}


def digests_of(tensors: Any) -> list[int]:
    """Of each tensor of the small model."""
    return [region_digest(tensors[spec.name], spec.whole()) for spec in make_specs(make_tensors(0))]


class Commands:
    """What the process can do; it keeps what it has made."""

    def __init__(self) -> None:
        self.exposed: ExposedMemory | None = None
        self.reached: ReachedMemory | None = None
        self.member: Any = None
        self.lease: Lease | None = None

    def become(self, uid: int) -> None:
        """Another user, for good; what others may not read of this machine's Python was imported before."""
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

    def expose(self, num_bytes: int, base: str, byte: int, allowed: list[int]) -> str:
        self.exposed = expose(num_bytes, base=Path(base), allowed_uids=allowed)
        self.exposed.memory[:] = byte
        return self.exposed.ticket.hex()

    def fill(self, byte: int) -> None:
        assert self.exposed is not None
        self.exposed.memory[:] = byte

    def reach(self, ticket: str, allowed: list[int]) -> int:
        reached = reach(bytes.fromhex(ticket), 10, allowed_uids=allowed)
        assert isinstance(reached, ReachedMemory)
        self.reached = reached
        return self.reached.num_bytes

    def see(self) -> list[int]:
        """The least and greatest byte of the reached memory."""
        assert self.reached is not None
        view = self.reached.view(0, self.reached.num_bytes)
        return [int(view.min()), int(view.max())]

    def join(self, base: str, group: str, timeout_s: float, lease_s: float, again: bool) -> str:
        self.member = join_host_share(
            "tcp://trainer:1",
            group,
            make_specs(make_tensors(0)),
            timeout_s=timeout_s,
            lease_s=lease_s,
            base=Path(base),
            previous=self.member if again else None,
        )
        return "leader" if isinstance(self.member, HostLeader) else "follower"

    def begin(self, timeout_s: float) -> float:
        start_s = time.monotonic()
        self.member.begin_overwrite(timeout_s)
        return time.monotonic() - start_s

    def write(self, seed: int) -> None:
        for name, tensor in make_tensors(seed).items():
            self.member.pool.tensors[name].copy_(tensor)

    def finish(self, number: int) -> None:
        self.member.finish_overwrite(Version(1, number))

    def stage(self, number: int) -> None:
        """A whole version, whose number is its seed."""
        self.begin(20)
        self.write(number)
        self.finish(number)

    def version(self) -> int | None:
        return None if self.member.version is None else int(self.member.version.number)

    def followers(self) -> int:
        return int(self.member.num_followers)

    def wait(self, after: int | None, timeout_s: float) -> int:
        """Begin a lease."""
        self.lease = self.member.wait(None if after is None else Version(1, after), timeout_s=timeout_s)
        assert self.lease is not None
        return self.lease.version.number

    def digests(self) -> list[int]:
        return digests_of(self.member.pool.tensors)

    def release(self) -> None:
        assert self.lease is not None
        self.lease.release()

    def leave(self) -> None:
        self.member.close()

    def write_where_one_must_not(self) -> None:
        ctypes.memset(self.member.pool.tensors["big"].data_ptr(), 1, 1)

    def fork(self) -> int:
        """A child that does nothing, and outlives its parent."""
        pid = os.fork()
        if pid == 0:
            os.close(0)
            os.close(1)
            time.sleep(60)
            os._exit(0)
        return pid


def main() -> None:
    """Do what the lines say."""
    commands = Commands()
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(commands, arguments.pop("do"))(**arguments)
        except WeightcastError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
