"""An engine in a process of its own that shares its host's copy, driven by lines of JSON, that a test may stop or kill.

python -m tests.sync.share_peer ADDRESS NAME BASE [RANK WORKERS]

With RANK it wants the slices of that one of four ranks, of a model of `slice_wants`, and WORKERS are to come.

Each command is {"do": NAME, ...}; the answer is what the function of that name returns, or {"error": ..., "text": ...}.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.ranks import ROOT
from tests.sync.parts import LIMITS, WAIT_S
from tests.sync.peer import Peer
from tests.sync.slice_wants import slices_of

from weightcast.sync import HostShare, Update, WeightSubscriber
from weightcast.sync.digest import region_digest
from weightcast.sync.errors import WeightcastError

GROUP = "engine"
LEASE_S = 30.0
NUM_RANKS = 4


class SharePeer(Peer):
    """The parent's handle of such a process."""

    def __init__(self, address: str, name: str, base: Path, rank: int | None = None, workers: int = 1) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.sync.share_peer", address, name, str(base)]
        command += [] if rank is None else [str(rank), str(workers)]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )

    def __enter__(self) -> "SharePeer":
        return self

    def do(self, name: str, **arguments: Any) -> Any:
        """The answer to a command."""
        return self.ask(do=name, **arguments)

    def kill(self) -> None:
        """kill -9, and wait for it."""
        self.process.kill()
        self.process.wait()


class Commands:
    """What the process can do; it keeps what it took."""

    def __init__(self, subscriber: WeightSubscriber) -> None:
        self._subscriber = subscriber
        self._update: Update | None = None

    def take(self, timeout_s: float = WAIT_S) -> list[Any]:
        """The next version's number, the digest of each tensor or wanted box, and the transport."""
        update = self._update = self._subscriber.wait(timeout_s)
        specs = {spec.name: spec for spec in update.specs}
        if update.wanted is None:
            digests = [region_digest(tensor, specs[name].whole()) for name, tensor in update]
        else:
            parts = (part for name in update.wanted for part in update.wanted.parts(name))
            digests = [region_digest(tensor, box) for box, tensor in parts]
        return [update.version.number, digests, update.stats.transport]

    def commit(self) -> None:
        assert self._update is not None
        self._update.commit()

    def serve(self, count: int) -> list[Any]:
        """Take and commit so many versions; the last one's line."""
        for _ in range(count):
            line = self.take()
            self.commit()
        return line

    def memory(self) -> dict[str, int]:
        """Bytes by kind, of all that this process has mapped."""
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        return {name: int(size) * 1024 for name, size, _ in (line.replace(":", "").split() for line in lines)}


def main(address: str, name: str, base: str, rank: str = "", workers: str = "1") -> None:
    """Do what the lines say."""
    share = HostShare(GROUP, lease_s=LEASE_S, base=Path(base), workers=int(workers))
    want = slices_of(int(rank), NUM_RANKS) if rank else None
    with WeightSubscriber(address, engine=name, limits=LIMITS, share=share, want=want) as subscriber:
        commands = Commands(subscriber)
        for line in sys.stdin:
            arguments = json.loads(line)
            try:
                answer = getattr(commands, arguments.pop("do"))(**arguments)
            except WeightcastError as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
