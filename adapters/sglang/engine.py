"""One SGLang server as an `Engine`: versions are staged and checked in this process, then broadcast to its workers.

    python -m weightcast.adapters.sglang.engine --engine http://127.0.0.1:30000 --publisher tcp://127.0.0.1:5600

`--publisher` takes a store's folder or URL as well. SGLang has no place for a second copy of its weights, so this
process holds it. It runs on the trainer's side or beside the server; with `--backend nccl` it needs a GPU of its own,
with `gloo` none.
"""

import argparse
import logging
import signal
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from weightcast.adapters.engine import Completion, PauseMode, check_offer, check_pause_mode, specs_of, version_label
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.keys import read_engine_keys, read_store_key
from weightcast.adapters.sglang.client import PauseKind, SGLangClient
from weightcast.adapters.sglang.updater import SGLangTarget, SGLangUpdater
from weightcast.sync import CurveKeys, Version, kind_of
from weightcast.sync import follow as follow_versions
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, PeerLost
from weightcast.sync.regions import TensorSpec
from weightcast.sync.transports.collective_rules import SGLANG_BUCKET_BYTES

logger = logging.getLogger(__name__)

_RETRY_S = 0.5

# SGLang cannot let running requests finish first and keep new ones out; frozen ones would go on with an old cache.
_PAUSES: dict[PauseMode, PauseKind] = {"abort": "abort", "keep": "retract"}


class SGLangEngine:
    """A running SGLang server with `num_workers` workers as an `Engine`.

    Pause modes are `abort` and `keep`: a kept request begins again under the new weights. `expect` are the tensors of
    the checkpoint that the server was started on; with them an incomplete or a foreign set is refused beforehand, which
    SGLang itself would load.
    """

    def __init__(
        self,
        updater: SGLangUpdater,
        client: SGLangClient,
        *,
        name: str = "sglang",
        expect: Sequence[TensorSpec] | None = None,
    ) -> None:
        self._updater = updater
        self._client = client
        self._name = name
        self._expect = expect

    @property
    def name(self) -> str:
        """The name under which the fleet knows this engine."""
        return self._name

    def keep_connected(self) -> None:
        """Meet the workers when the server has come up; quiet while it is away."""
        if not self._client.is_healthy():
            self._updater.disconnect()
        elif not self._updater.is_connected:
            try:
                self._updater.connect()
            except (DeadlineExceeded, PeerLost) as error:
                logger.warning("%s is not connected yet: %s", self._name, error)

    def prepare(self, version: Version, specs: Sequence[TensorSpec]) -> None:
        """See that the set is the expected one, and that there is a group. The server goes on serving."""
        if self._expect is not None:
            check_offer(self._expect, specs)
        if not self._updater.is_connected:
            self._updater.connect()

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Stop generating. Raises `ConfigError` for `wait`, which SGLang has not."""
        kind = _PAUSES.get(mode)
        if kind is None:
            raise ConfigError(f"SGLang has no pause mode {mode!r}; choose one of {', '.join(_PAUSES)}")
        try:
            self._client.pause(kind, timeout_s)
        except BaseException:
            self.resume()
            raise

    def load(self, version: Version, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Broadcast all tensors and take on the version's label."""
        held = dict(tensors)
        self._updater.update(version_label(version), specs_of(held.items()), held.__getitem__)

    def resume(self) -> None:
        """Generate again."""
        self._client.resume()

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> Completion:
        """Greedy tokens after a prompt."""
        answer = self._client.generate(prompt_token_ids, max_tokens)
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        if reason not in ("stop", "length", "abort"):
            raise EngineError(f"{self._name} ended a request with {reason!r}: {meta['finish_reason']}")
        label = meta.get("weight_version") or self._client.weight_version()
        return Completion(tuple(answer["output_ids"]), label, reason)


def follow(
    url: str,
    publisher: str,
    stop: threading.Event,
    *,
    name: str = "sglang",
    num_workers: int = 1,
    host: str = "127.0.0.1",
    backend: str = "nccl",
    bucket_bytes: int = SGLANG_BUCKET_BYTES,
    pause_mode: PauseMode = "keep",
    admin_key: str | None = None,
    model: Path | None = None,
    events: Path | None = None,
    keys: CurveKeys | None = None,
    key: bytes | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Keep the server at `url` in step until `stop` is set; it may come up later, go away and come back.

    `publisher` is an address or a store's folder or URL, with `keys` for the one and `key` for the other.

    `model` is the HF folder that the server was started on, whose tensors every version must have.
    """
    expect = None if model is None else open_checkpoint(model).specs
    with (
        SGLangClient(url, admin_key=admin_key, timeout_s=timeout_s) as client,
        SGLangUpdater(
            [SGLangTarget(name, client, num_workers)],
            host=host,
            backend=backend,
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        ) as updater,
        follow_versions(publisher, engine=name, keys=keys, key=key) as subscriber,
    ):
        engine = SGLangEngine(updater, client, name=name, expect=expect)
        engine.keep_connected()
        # What a store has is offered once, at the start; a publisher's fleet waits for nobody who is not there yet.
        while kind_of(publisher) == "store" and not updater.is_connected and not stop.wait(_RETRY_S):
            engine.keep_connected()
        follower = EngineFollower(engine, subscriber, pause_mode=pause_mode, events=events, process="engine")
        follower.run(stop, when_idle=engine.keep_connected)


def main(arguments: Sequence[str] | None = None) -> None:
    """Follow until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m weightcast.adapters.sglang.engine", description=__doc__)
    parser.add_argument("--engine", required=True, help="the server, e.g. http://127.0.0.1:30000")
    parser.add_argument("--publisher", required=True, help="tcp://HOST:PORT, or a store's folder or URL")
    parser.add_argument("--model", type=Path, help="the HF folder of the server's model: other sets are refused")
    parser.add_argument("--name", default="sglang", help="the engine's name in the fleet")
    parser.add_argument(
        "--workers", type=int, default=1, help="the server's --tp-size (it must have no pipeline stages)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address at which the workers reach this process")
    parser.add_argument("--backend", default="nccl", choices=("nccl", "gloo"), help="of the process group")
    parser.add_argument("--bucket-bytes", type=int, default=SGLANG_BUCKET_BYTES, help="of one broadcast")
    parser.add_argument("--pause-mode", default="keep", help="running requests at an update: abort, or keep")
    parser.add_argument("--admin-key-file", type=Path, help="file with the server's --admin-api-key")
    parser.add_argument("--events", type=Path, help="file that gets one JSON line for each phase of an update")
    parser.add_argument("--keys", type=Path, help="key file, for a publisher beyond this host")
    parser.add_argument("--key-file", type=Path, help="file with the key that a store's versions are sealed with")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    follow(
        args.engine,
        args.publisher,
        stop,
        name=args.name,
        num_workers=args.workers,
        host=args.host,
        backend=args.backend,
        bucket_bytes=args.bucket_bytes,
        pause_mode=check_pause_mode(args.pause_mode),
        admin_key=args.admin_key_file.read_text().strip() if args.admin_key_file else None,
        model=args.model,
        events=args.events,
        keys=read_engine_keys(args.keys),
        key=read_store_key(args.key_file),
    )


if __name__ == "__main__":
    main()
