"""Serve a `transformers` model over HTTP and follow a publisher, or a store of versions.

    python -m weightcast.adapters.transformers.server --model path/to/hf --port 8000 --publisher tcp://127.0.0.1:5600

`--publisher` takes a store's folder or URL as well (`/shared/versions`, `s3://bucket/versions`). Without it the server
serves the checkpoint and takes no updates. Prints one line with its address when it is ready; `--port 0` picks a free
port.
"""

import argparse
import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
import uvicorn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weightcast.adapters.engine import PauseMode, check_pause_mode
from weightcast.adapters.follower import EngineFollower
from weightcast.adapters.in_place import InPlaceFollower
from weightcast.adapters.keys import read_engine_keys, read_store_key
from weightcast.adapters.lifecycle import FollowerState
from weightcast.adapters.transformers.app import make_app
from weightcast.adapters.transformers.engine import TransformersEngine
from weightcast.sync import CurveKeys, WeightSubscriber, follow, kind_of
from weightcast.sync.errors import AddressError, ConfigError, EngineError
from weightcast.sync.regions import DTYPES

logger = logging.getLogger(__name__)


class FollowerThread(AbstractContextManager["FollowerThread"]):
    """A subscriber and its follower in a thread of their own, for as long as the server runs.

    With `in_place` versions land in the engine's own tensors, for which it pauses: it has memory for one model.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        publisher: str,
        *,
        pause_mode: PauseMode,
        events: Path | None = None,
        keys: CurveKeys | None = None,
        key: bytes | None = None,
        in_place: bool = False,
    ) -> None:
        # A checkpoint that lists a tied tensor twice matches a publisher of either form: see `check_offer`.
        specs = engine.expected_specs()
        expect = None if in_place or engine.aliases.keys() & {spec.name for spec in specs} else specs
        into = engine.own_tensors() if in_place else None
        self._subscriber = follow(publisher, engine=engine.name, expect=expect, keys=keys, key=key, into=into)
        self._follower: EngineFollower
        if in_place:
            assert isinstance(self._subscriber, WeightSubscriber), "`into` is refused for a store"
            self._follower = InPlaceFollower(engine, self._subscriber, pause_mode=pause_mode, events=events)
        else:
            self._follower = EngineFollower(engine, self._subscriber, pause_mode=pause_mode, events=events)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightcast-follower", daemon=True)

    @property
    def state(self) -> FollowerState:
        """Where the engine stands."""
        return self._follower.state

    def _run(self) -> None:
        try:
            self._follower.run(self._stop)
        except EngineError as error:
            logger.error("no more updates are taken: %s", error)

    def __enter__(self) -> "FollowerThread":
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._subscriber.close()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or `None` when it has no tokenizer file."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one. Raises `AddressError` when the port is taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {host}:{port}: {error}; choose another port, or 0 for a free one"
        ) from None
    return listener


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m weightcast.adapters.transformers.server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="HF folder with safetensors files")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free port")
    parser.add_argument("--publisher", help="whom to follow: tcp://HOST:PORT, ipc://, a store's folder or URL")
    parser.add_argument("--engine", default="transformers", help="this engine's name in the fleet")
    parser.add_argument("--dtype", default="auto", help="element type in memory: auto, float32, bfloat16, float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pause-mode", default="wait", help="running requests at an update: abort, wait or keep")
    parser.add_argument(
        "--in-place", action="store_true", help="versions land in the model itself, paused meanwhile: no staged copy"
    )
    parser.add_argument("--events", type=Path, help="file that gets one JSON line for each phase of an update")
    parser.add_argument("--keys", type=Path, help="key file, for a publisher beyond this host")
    parser.add_argument("--key-file", type=Path, help="file with the key that a store's versions are sealed with")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if args.dtype != "auto" and args.dtype not in DTYPES:
        raise ConfigError(f"--dtype {args.dtype!r} is unknown; choose auto or one of {', '.join(DTYPES)}")
    mode = check_pause_mode(args.pause_mode)
    if args.in_place and (args.publisher is None or kind_of(args.publisher) == "store"):
        raise ConfigError(
            "--in-place: versions land in the model as a publisher's sources send them; give its address as "
            "--publisher (versions of a store are staged before they are loaded), or leave it out"
        )
    listener = bind(args.host, args.port)
    engine = TransformersEngine(args.model, name=args.engine, dtype=DTYPES.get(args.dtype), device=args.device)
    tokenizer = load_tokenizer(args.model)
    if args.publisher is None:
        serve(listener, engine, tokenizer, None)
        return
    keys, key = read_engine_keys(args.keys), read_store_key(args.key_file)
    with FollowerThread(
        engine, args.publisher, pause_mode=mode, events=args.events, keys=keys, key=key, in_place=args.in_place
    ) as follower:
        serve(listener, engine, tokenizer, follower)


def serve(
    listener: socket.socket,
    engine: TransformersEngine,
    tokenizer: PreTrainedTokenizerBase | None,
    follower: FollowerThread | None,
) -> None:
    """Answer requests on `listener` until the process is told to end."""
    app = make_app(engine, tokenizer, lambda: follower.state if follower is not None else None)
    host, port = listener.getsockname()[:2]
    print(f"serving {engine.name} on http://{host}:{port}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
