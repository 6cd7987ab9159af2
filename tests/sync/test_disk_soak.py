"""A store over a long life: publishes, restarts, damage, slow and new engines, in any order.

Whatever happens, an engine only ever takes versions that were published, bit for bit, and only newer ones.
"""

import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.sync.disk_parts import QUICK, clone, read_manifest, step
from tests.sync.parts import TensorSource, assert_same_bits, make_model

from weightcast.sync import DiskPublisher, DiskSubscriber, Version
from weightcast.sync.errors import DamagedVersion, DeadlineExceeded

QUIET_S = 0.15


class StoreLife(RuleBasedStateMachine):
    """The model: what each version held, and the newest that each engine took."""

    @initialize(delta=st.sampled_from(["auto", "zstd"]))
    def begin(self, delta: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.delta = delta
        self.tensors = make_model(1, 8)
        self.published: dict[Version, dict[str, torch.Tensor]] = {}
        self.number = 0
        self.publisher = self.make_publisher()
        self.engines: list[DiskSubscriber] = []

    def make_publisher(self) -> DiskPublisher:
        return DiskPublisher(TensorSource(self.tensors), self.root, delta=self.delta, anchor_every=4, keep=3)  # type: ignore[arg-type]

    @rule(every=st.sampled_from([1, 13, 97]))
    def publish(self, every: int) -> None:
        self.number += 1
        step(self.tensors, self.number, every)
        report = self.publisher.publish(self.number)
        self.published[report.version] = clone(self.tensors)

    @rule()
    def restart_the_trainer(self) -> None:
        self.publisher.close()
        self.publisher = self.make_publisher()

    @rule()
    def start_an_engine(self) -> None:
        if len(self.engines) < 3:
            self.engines.append(DiskSubscriber(self.root, limits=QUICK))

    @rule(which=st.integers(0, 2), refuse=st.booleans())
    def take(self, which: int, refuse: bool) -> None:
        if which >= len(self.engines):
            return
        engine = self.engines[which]
        before = engine.serving
        try:
            update = engine.wait(QUIET_S)
        except (DeadlineExceeded, DamagedVersion):
            return
        assert before is None or update.version > before
        assert_same_bits(dict(update), self.published[update.version])
        if refuse:
            update.reject("asked to")
        else:
            update.commit()

    @rule(back=st.integers(0, 5), place=st.integers(0), which=st.integers(0, 3))
    def damage(self, back: int, place: int, which: int) -> None:
        whole = sorted(path.parent for path in self.root.glob("*/manifest.weightcast"))
        if not whole:
            return
        folder = whole[-1 - back % len(whole)]
        files = sorted(path for path in folder.iterdir() if path.stat().st_size)
        path = files[which % len(files)]
        raw = bytearray(path.read_bytes())
        raw[place % len(raw)] ^= 16
        path.write_bytes(bytes(raw))

    @invariant()
    def serving_is_something_published(self) -> None:
        for engine in getattr(self, "engines", ()):
            assert engine.serving is None or engine.serving in self.published

    def teardown(self) -> None:
        if not hasattr(self, "engines"):
            return
        self.publisher.close()
        self.publisher = self.make_publisher()  # an anchor heals everything
        self.publish(97)
        for engine in self.engines:
            while engine.serving != max(self.published):
                try:
                    update = engine.wait(20)
                except DamagedVersion:
                    continue
                assert_same_bits(dict(update), self.published[update.version])
                update.commit()
            engine.close()
        newest = max(self.root.glob("*/manifest.weightcast"))
        assert read_manifest(newest.parent).version == max(self.published)
        self.publisher.close()
        self.folder.cleanup()


StoreLife.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None, derandomize=True)
TestStoreLife = StoreLife.TestCase
