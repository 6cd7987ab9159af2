"""A publisher or an engine in a process of its own, driven by lines of JSON, that a test may stop or kill.

python -m tests.sync.peer publish ADDRESS RANK WORLD_SIZE ROWS
python -m tests.sync.peer follow ADDRESS NAME
"""

import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

from tests.ranks import ROOT


class Peer:
    """The parent's handle of such a process."""

    def __init__(self, *args: object) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", "tests.sync.peer", *(str(arg) for arg in args)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
        )

    def tell(self, **command: Any) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        """The next line that it says."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, **command: Any) -> Any:
        """Send a command and read its answer."""
        self.tell(**command)
        return self.hear()

    def signal(self, number: int) -> None:
        """Stop, continue or kill it."""
        self.process.send_signal(number)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def _say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def _publish(address: str, rank: int, world_size: int, rows: int) -> None:
    from tests.sync.parts import TensorSource, make_model, make_specs, split_rows

    from weightcast.sync import WeightPublisher
    from weightcast.sync.errors import WeightcastError

    tensors = make_model(0, rows)
    regions = [split_rows(spec, world_size)[rank] for spec in make_specs(tensors)]
    with WeightPublisher(TensorSource(tensors, rank, world_size, regions), address, chunk_bytes=65536) as publisher:
        _say(publisher.address)
        for line in sys.stdin:
            command = json.loads(line)
            for name, tensor in make_model(command["version"], rows).items():
                tensors[name].copy_(tensor)
            try:
                publisher.wait_for_subscribers(command["engines"], 20)
                _say(publisher.publish(command["version"], timeout_s=20).serving)
            except WeightcastError as error:
                _say(repr(error))


def _follow(address: str, name: str) -> None:
    from tests.sync.parts import LIMITS

    from weightcast.sync import WeightSubscriber
    from weightcast.sync.digest import region_digest

    with WeightSubscriber(address, engine=name, limits=LIMITS) as subscriber:
        for _ in sys.stdin:
            update = subscriber.wait(20)
            specs = {spec.name: spec for spec in update.specs}
            digests = [region_digest(tensor, specs[key].whole()) for key, tensor in update]
            tensor = None  # noqa: F841
            update.commit()
            _say([update.version.number, digests])


if __name__ == "__main__":
    if sys.argv[1] == "publish":
        _publish(sys.argv[2], *(int(arg) for arg in sys.argv[3:]))
    else:
        _follow(sys.argv[2], sys.argv[3])
