"""Workers of one host that come, take some versions and go, while versions follow one another in haste."""

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tests.sync.parts import LIMITS, WAIT_S, TensorSource
from tests.sync.slice_wants import WantOf

from weightcast.sync import FleetPolicy, HostShare, Update, WeightPublisher, WeightSubscriber

NUM_WORKERS = 4
NUM_VERSIONS = 60
# How many versions must have been taken out of the shared copy, and by those who received.
MORE_THAN = 10

Make = Callable[[int], Mapping[str, torch.Tensor]]
"""The model as a version has it."""
Draw = Callable[[random.Random], tuple[dict[str, Any], WantOf | None]]
"""The settings of a worker's share, and what it wants, as long as it stays."""
Check = Callable[[Update, WantOf | None], None]
"""`AssertionError` for an update that is not as it should be."""


def check_haste(base: Path, make: Make, draw: Draw, check: Check, **settings: Any) -> None:
    """Publish again and again, to workers each of which loads slowly at times, and is another one after a while.

    It goes on beyond `NUM_VERSIONS` until each way was gone often enough, so as not to count on the machine's pace.
    """
    stop, taken, faults = threading.Event(), Counter[str](), list[str]()
    tensors = {name: tensor.clone() for name, tensor in make(0).items()}

    def load(update: Update, engine: str, want: WantOf | None) -> None:
        try:
            check(update, want)
        except AssertionError:
            faults.append(f"{engine}, version {update.version}, {want}: {traceback.format_exc()}")
        taken[update.stats.transport] += 1
        update.commit()

    def follow(address: str, engine: str, dice: random.Random) -> None:
        while not stop.is_set():
            terms, want = draw(dice)
            share = HostShare("engine", base=base, **terms)
            with WeightSubscriber(address, engine=engine, limits=LIMITS, share=share, want=want) as subscriber:
                for _ in range(dice.randrange(2, 9)):
                    try:
                        update = subscriber.wait(0.5)
                    except TimeoutError:
                        continue
                    if stop.wait(dice.choice([0.0, 0.0, 0.02])):
                        return
                    load(update, engine, want)

    source, policy = TensorSource(tensors), FleetPolicy.quorum(1)
    with WeightPublisher(source, "tcp://127.0.0.1:0", policy=policy, delta="on", timeout_s=60, **settings) as publisher:
        threads = [
            threading.Thread(target=follow, args=(publisher.address, f"engine-{seed}", random.Random(seed)))
            for seed in range(NUM_WORKERS)
        ]
        for thread in threads:
            thread.start()
        _publish(publisher, tensors, make, lambda: min(taken["host"], taken["shared_memory"]) > MORE_THAN)
        stop.set()
        for thread in threads:
            thread.join(2 * WAIT_S)
            assert not thread.is_alive()
    assert not faults, faults
    assert taken["host"] > MORE_THAN and taken["shared_memory"] > MORE_THAN, taken


def _publish(
    publisher: WeightPublisher, tensors: dict[str, torch.Tensor], make: Make, is_enough: Callable[[], bool]
) -> None:
    end_s, number = time.monotonic() + 4 * WAIT_S, 0
    while number < NUM_VERSIONS or (not is_enough() and time.monotonic() < end_s):
        number += 1
        for name, tensor in make(number).items():
            tensors[name].copy_(tensor)
        publisher.publish(number)
