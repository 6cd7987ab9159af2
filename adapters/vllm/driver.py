"""Drives released versions into a vLLM server: start, pause, load, finish, resume.

The bytes go from the publisher, or a store of versions, straight to the server's workers; this process only watches, as
an observer of the fleet, and calls the server's routes when a version may be served. `VLLMEngine` is an `Engine` like
any other, so the loop around it is `EngineFollower`.

    python -m weightcast.adapters.vllm.driver --engine http://127.0.0.1:8000 --publisher tcp://127.0.0.1:5600
"""

import argparse
import logging
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from weightcast.adapters.engine import Completion, PauseMode, check_pause_mode, parse_label, version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.keys import read_engine_keys, read_store_key
from weightcast.adapters.vllm import NOT_CONNECTED, NOT_STAGED
from weightcast.adapters.vllm.client import VLLMClient
from weightcast.sync import CurveKeys, DiskObserver, Version, follow, kind_of
from weightcast.sync.errors import DeadlineExceeded, PeerLost, WeightcastError
from weightcast.sync.regions import TensorSpec

logger = logging.getLogger(__name__)

_STORE_LOOK_S = 0.5  # how long a worker that reads a store holds the server up in one look
_RETRY_S = 0.5
_ALREADY_ACTIVE = "already active"  # vLLM's words in v1/worker/gpu_worker.py, _start_weight_update


class VLLMEngine:
    """A running vLLM server with the backend `weightcast` as an `Engine`.

    `publisher` is the address that the workers join; `staging_timeout_s` bounds how long a worker may make the
    server wait in `start_weight_update` for bytes that have not come.

    A store's workers read a version beside each other, and each in its time: they are asked again, and the server
    serves on, until all have it, for `patience_s` at most or until `stop` is set. That all have the same one is asked
    before any of them loads it.
    """

    def __init__(
        self,
        client: VLLMClient,
        publisher: str,
        *,
        name: str = "vllm",
        staging_timeout_s: float = 30.0,
        patience_s: float = 600.0,
        stop: threading.Event | None = None,
    ) -> None:
        self._client = client
        self._name = name
        self._reads_store = kind_of(publisher) == "store"
        self._patience_s = patience_s
        self._stop = threading.Event() if stop is None else stop
        staging_timeout_s = min(staging_timeout_s, _STORE_LOOK_S) if self._reads_store else staging_timeout_s
        self._init_info = {"publisher": publisher, "engine": name, "timeout_s": staging_timeout_s}
        self._was_paused = False
        self._is_connected = False

    @property
    def name(self) -> str:
        """The name under which the fleet knows this engine."""
        return self._name

    def connect(self) -> None:
        """Let the server's workers join the publisher. Raises `EngineError` with a worker's reason."""
        self._client.init_weight_transfer(self._init_info)
        self._is_connected = True

    def keep_connected(self) -> bool:
        """Connect when the server has come up, also after a restart; quiet while it is away. Whether it did so now.

        Without this a restarted server would not be in the fleet, and a policy that waits for it would wait on.
        """
        if not self._client.is_healthy():
            self._is_connected = False
        elif not self._is_connected:
            try:
                self.connect()
                return True
            except (DeadlineExceeded, PeerLost) as error:
                logger.warning("%s is not connected yet: %s", self._name, error)
        return False

    def prepare(self, version: Version, specs: Sequence[TensorSpec]) -> None:
        """Open a session: every worker has a version staged and checked. Ends one that a dead driver left open."""
        if not self._reads_store:
            self._start()
            return
        deadline_s = time.monotonic() + self._patience_s
        while True:
            try:
                self._start()
                self._client.update_weights({"version": version_label(version), "check": True})
                return
            except WeightcastError as error:
                may_come = isinstance(error, PeerLost) or NOT_STAGED in str(error)
                if not may_come or time.monotonic() > deadline_s or self._stop.wait(_RETRY_S):
                    raise

    def _start(self) -> None:
        try:
            self._client.start_weight_update()
        except WeightcastError as error:
            if _ALREADY_ACTIVE in str(error):
                self._abandon("keep")
            elif NOT_CONNECTED in str(error):
                self.connect()  # the server was restarted since
            else:
                # Of several workers, those that did start would refuse the next start.
                self._abandon("keep" if NOT_STAGED in str(error) else "drop")
                raise
            self._client.start_weight_update()

    def _abandon(self, what: str) -> None:
        """End the session in every worker; vLLM does so when `update_weights` raises, and ours raises on request."""
        try:
            self._client.update_weights({"abandon": what})
        except WeightcastError as error:
            logger.debug("session ended: %s", error)

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Pause, and remember whether somebody else had done so before."""
        self._was_paused = self._client.is_paused()
        try:
            self._client.pause(mode, timeout_s)
        except WeightcastError:
            self.resume()
            self._abandon("drop")
            raise

    def load(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load what the workers have staged and publish its label; `tensors` is empty, the bytes are there."""
        label = version_label(version)
        self._client.update_weights({"version": label})
        self._client.finish_weight_update(label)

    def resume(self) -> None:
        """Resume, unless the server was paused before the update."""
        if not self._was_paused:
            self._client.resume()

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Completion:
        """Greedy tokens after a prompt."""
        return self._client.complete(prompt_token_ids, max_tokens)


def drive(
    url: str,
    publisher: str,
    stop: threading.Event,
    *,
    name: str = "vllm",
    pause_mode: PauseMode = "wait",
    events: Path | None = None,
    keys: CurveKeys | None = None,
    key: bytes | None = None,
) -> None:
    """Keep the server at `url` in step until `stop` is set; it may come up later, go away and come back.

    `publisher` is an address or a store's folder or URL, with `keys` for the one and `key` for the other.

    Raises `EngineError` when its weights are undefined, or when its workers may not follow `publisher`.
    """
    observer_name = f"{name}/driver"
    with (
        VLLMClient(url) as client,
        follow(publisher, engine=observer_name, role="observer", keys=keys, key=key) as observer,
    ):
        engine = VLLMEngine(client, publisher, name=name, stop=stop)

        def keep_connected() -> None:
            if engine.keep_connected() and isinstance(observer, DiskObserver):
                observer.resume_from(parse_label(client.weight_version()))  # a store does not know what it was given

        keep_connected()
        follower = EngineFollower(engine, observer, pause_mode=pause_mode, events=events, process="driver")
        follower.run(stop, when_idle=keep_connected)


def main(arguments: Sequence[str] | None = None) -> None:
    """Drive until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m weightcast.adapters.vllm.driver", description=__doc__)
    parser.add_argument("--engine", required=True, help="the server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--publisher", required=True, help="tcp://HOST:PORT, or a store's folder or URL")
    parser.add_argument("--name", default="vllm", help="the engine's name in the fleet")
    parser.add_argument("--pause-mode", default="wait", help="running requests at an update: abort, wait or keep")
    parser.add_argument("--events", type=Path, help="file that gets one JSON line for each phase of an update")
    parser.add_argument("--keys", type=Path, help="key file, for a publisher beyond this host")
    parser.add_argument("--key-file", type=Path, help="file with the key that a store's versions are sealed with")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    drive(
        args.engine,
        args.publisher,
        stop,
        name=args.name,
        pause_mode=check_pause_mode(args.pause_mode),
        events=args.events,
        keys=read_engine_keys(args.keys),
        key=read_store_key(args.key_file),
    )


if __name__ == "__main__":
    main()
