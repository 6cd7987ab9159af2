"""The bench's side of peer processes: it starts them, tells them what to do, reads the clock, and compares bits.

with Link(mover="baselines.sockets", model="qwen3-0.6b") as link:
    move = link.move()                 # move.seconds; CaseError when the bits are not the source's
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import IO, Any

from records import CaseError

HERE = Path(__file__).parent
DEADLINE_S = 180.0
_CLOSE_S = 20.0
_TAIL_LINES = 15


class Peer:
    """One peer process. Every answer has a deadline; a peer that dies says why in the error."""

    def __init__(self, settings: dict[str, Any], namespace: str | None = None) -> None:
        self.name = f"{settings['mover']} {settings['role']}"
        command = [sys.executable, str(HERE / "peer_process.py"), json.dumps(settings)]
        if namespace is not None:
            command = ["ip", "netns", "exec", namespace, *command]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._lines: Queue[str] = Queue()
        assert self._process.stdout is not None
        self._pump = threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, do: str, **fields: Any) -> None:
        """Send a command; its answer is for `read`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CaseError(f"{self.name} has ended:\n{self._tail()}") from None

    def read(self) -> dict[str, Any]:
        """The next answer. Other libraries may print too; only lines with a JSON object are answers."""
        while True:
            try:
                line = self._lines.get(timeout=DEADLINE_S)
            except Empty:
                raise CaseError(f"{self.name} did not answer in {DEADLINE_S:g} s:\n{self._tail()}") from None
            if not line:
                raise CaseError(f"{self.name} has ended:\n{self._tail()}")
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a command and read its answer."""
        self.tell(do, **fields)
        return self.read()

    def _tail(self) -> str:
        self._errors.seek(0)
        return "\n".join(self._errors.read().splitlines()[-_TAIL_LINES:])

    def end(self) -> None:
        """Let it close by itself: its stdin ends. Others close at the same time, some libraries wait for each other."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Wait for its end, and kill it when that does not come."""
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pump.join(_CLOSE_S)
        self._errors.close()


def _pump(stream: IO[str], lines: "Queue[str]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put("")


@dataclass(frozen=True, slots=True)
class Move:
    """One version moved: from the first sender's start to the last receiver's end, and what the peers said."""

    seconds: float
    senders: list[dict[str, Any]]
    receivers: list[dict[str, Any]]


@dataclass
class Link:
    """Senders and receivers of one mover, each a process, and one model between them.

    `state` goes to `ModelState`, `options` to the mover; `sender_options` and `receiver_options` add to these for
    each one. Namespaces are where the processes run, this machine's own where there are none. The first sender's
    address is what all others are given.
    """

    mover: str
    model: str
    state: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sender_options: Sequence[Mapping[str, Any]] = ({},)
    receiver_options: Sequence[Mapping[str, Any]] = ({},)
    sender_namespaces: Sequence[str | None] = (None,)
    receiver_namespaces: Sequence[str | None] = (None,)
    number: int = 0

    def __enter__(self) -> "Link":
        self.senders: list[Peer] = []
        self.receivers: list[Peer] = []
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for peer in (*self.receivers, *self.senders):
            peer.end()
        for peer in (*self.receivers, *self.senders):
            peer.close()

    def _open(self) -> None:
        address = ""
        count = len(self.sender_options)
        for rank, (options, namespace) in enumerate(zip(self.sender_options, self.sender_namespaces, strict=True)):
            state = {**self.state, "rank": rank, "world_size": count}
            extra = {**options, **({"address": address} if rank else {}), "receivers": len(self.receiver_options)}
            self._start(self.senders, "sender", {**self.options, **extra}, namespace, state)
            address = address or self.senders[0].read()["address"]
        for sender in self.senders[1:]:
            sender.read()
        for options, namespace in zip(self.receiver_options, self.receiver_namespaces, strict=True):
            self._start(self.receivers, "receiver", {**self.options, **options}, namespace, {})
        for peer in (*self.receivers, *self.senders):
            peer.tell("open", address=address)
        for peer in (*self.receivers, *self.senders):
            peer.read()

    def _start(
        self, peers: list[Peer], role: str, options: dict[str, Any], namespace: str | None, state: dict[str, Any]
    ) -> None:
        settings = {"mover": self.mover, "role": role, "model": self.model, "options": options, "state": state}
        peers.append(Peer(settings, namespace))

    def move(self) -> Move:
        """Step the weights, move them, and compare the bits at every receiver with the source's."""
        for sender in self.senders:
            sender.tell("step")
        for sender in self.senders:
            sender.read()
        self.number += 1
        for receiver in self.receivers:
            receiver.ask("move", number=self.number)
        for sender in self.senders:
            sender.tell("move", number=self.number)
        received = [receiver.read() for receiver in self.receivers]
        sent = [sender.read() for sender in self.senders]
        self.check_bits()
        seconds = max(answer["end_s"] for answer in received) - min(answer["start_s"] for answer in sent)
        self.last = Move(seconds, sent, received)
        return self.last

    def check_bits(self) -> None:
        """`CaseError` unless every receiver holds the bits that the source holds."""
        peers = (*self.senders, *self.receivers)
        for peer in peers:
            peer.tell("hash")
        hashes = {peer.read()["hash"] for peer in peers}
        if len(hashes) != 1:
            raise CaseError(f"{self.mover}: the bits at the receivers are not the source's, version {self.number}")

    def transports(self) -> list[str]:
        """How the last version was carried, as weightcast's report says."""
        return sorted({engine["transport"] for engine in self.last.senders[0]["engines"].values()})

    def copy(self) -> float:
        """Seconds of a copy of the model within the first sender."""
        return float(self.senders[0].ask("copy")["copy_s"])
