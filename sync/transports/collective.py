"""Whole versions by broadcast, in one call a side: from N sources to M engines, staged and verified.

    report = broadcast_version(source, "tcp://10.0.0.1:5700", 1, engines=("engine-0", "engine-1"))   # on every source
    update = receive_version("tcp://10.0.0.1:5700", "engine-0")                                      # on every engine

Each call meets the others, moves one version and leaves. For more than one version keep a `CollectiveSource` and a
`CollectiveReceiver`, whose groups live on; an accelerator of another protocol uses `BucketSender` and `BucketReceiver`
on groups of its own.
"""

from typing import Any

from weightcast.sync.source import WeightSource
from weightcast.sync.transports.collective_source import CollectiveReport, CollectiveSource
from weightcast.sync.transports.collective_target import CollectiveReceiver, CollectiveUpdate

__all__ = [
    "CollectiveReceiver",
    "CollectiveReport",
    "CollectiveSource",
    "CollectiveUpdate",
    "broadcast_version",
    "receive_version",
]


def broadcast_version(source: WeightSource, address: str, version: int, **options: Any) -> CollectiveReport:
    """Send one version to all engines; every source of the model must call. `options` are `CollectiveSource`'s.

    Returns when every engine has verified it, and raises as `CollectiveSource.broadcast` does.
    """
    with CollectiveSource(source, address, **options) as sender:
        return sender.broadcast(version)


def receive_version(address: str, engine: str, **options: Any) -> CollectiveUpdate:
    """Receive one version, whole and verified, under a name that source rank 0 lists. `options` are the receiver's."""
    with CollectiveReceiver(address, engine, **options) as receiver:
        return receiver.receive()
