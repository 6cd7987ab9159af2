"""What a worker and its host's receiver say when it joins: what is wanted, and where that will lie.

ask_to_join(connection, specs, wanted)                              # the worker
answer_join(peer, specs, pool, offered)                             # the receiver, of a worker of the same model
pool, offered = hear_joined(connection, specs, left_s, deadline_s)  # the worker
"""

import os
import time

from weightcast.sync.errors import ModelMismatch, WireError
from weightcast.sync.host.box_files import open_boxes, read_boxes
from weightcast.sync.host.packets import Connection
from weightcast.sync.host.pool import SharedPool, Staged
from weightcast.sync.host.share_messages import KINDS, TO_FOLLOWER, Boxes, Join, Joined, OtherModel
from weightcast.sync.part_plan import list_staged_specs
from weightcast.sync.regions import TensorSpec
from weightcast.sync.version import fingerprint
from weightcast.sync.wanted import WantedRegions


def ask_to_join(connection: Connection, specs: tuple[TensorSpec, ...], wanted: WantedRegions | None) -> None:
    """A worker's first word: its model, and the boxes that it wants, where it is not all of that."""
    join = Join(fingerprint(specs))
    if wanted is None:
        return connection.send(KINDS[Join], join)
    with open_boxes(specs, wanted) as boxes:
        connection.send(KINDS[Join], join, boxes)


def answer_join(
    peer: Connection, specs: tuple[TensorSpec, ...], pool: SharedPool | None, offered: Staged | None
) -> None:
    """The receiver's memory, if there is any yet, the boxes that lie in it, and what is on offer."""
    if pool is None:
        return peer.send(KINDS[Joined], Joined(0, None))
    if pool.wanted is not None:
        with open_boxes(specs, pool.wanted) as boxes:
            peer.send(KINDS[Boxes], Boxes(), boxes)
    peer.send(KINDS[Joined], Joined(pool.num_bytes, offered), pool.descriptor)


def hear_joined(
    connection: Connection, specs: tuple[TensorSpec, ...], left_s: float, deadline_s: float
) -> tuple[SharedPool | None, Staged | None]:
    """The receiver's memory, mapped, if it has some, and what is on offer there.

    Raises `ModelMismatch` when it has another model, `ReachError`, `WireError`, `PeerLost` and `DeadlineExceeded`.
    """
    wanted: WantedRegions | None = None
    answer, descriptor = connection.receive(TO_FOLLOWER, left_s)
    try:
        if isinstance(answer, Boxes) and descriptor is not None:
            wanted = read_boxes(descriptor, specs)
            os.close(descriptor)
            descriptor = None
            answer, descriptor = connection.receive(TO_FOLLOWER, left_s)
        if isinstance(answer, OtherModel):
            raise ModelMismatch(
                f"process {connection.pid}, which receives for this host and group, has the model {answer.model}, "
                f"this worker {fingerprint(specs)}: give workers of different models different groups"
            )
        if isinstance(answer, Joined) and descriptor is None and not answer.num_bytes:
            return None, None
        if not isinstance(answer, Joined) or descriptor is None:
            raise WireError(f"process {connection.pid} answered {type(answer).__name__} without memory")
        staged_specs = list_staged_specs(specs, wanted)
        return SharedPool.attach(staged_specs, descriptor, deadline_s - time.monotonic(), wanted), answer.offered
    finally:
        if descriptor is not None:
            os.close(descriptor)
