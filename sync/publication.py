"""A version on its way: what `WeightPublisher.begin` returns.

publication = publisher.begin(version=3, hold=True)     # this rank's bits are copied in the background
run_forward_and_backward()                              # which leave the weights as they are
publication.packed()                                    # from here on the weights may be changed
optimizer.step()
report = publication.wait()                             # the fleet serves the version

Where engines read the weights themselves (`WeightPublisher(..., in_place=True)`) `packed` returns with the fleet.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from weightcast.sync.errors import DeadlineExceeded, EngineError
from weightcast.sync.records import Span
from weightcast.sync.report import PublishReport

# A copy of one's own memory ends by itself; this only bounds the wait for one that never does.
PACK_GRACE_S = 60.0


class Publication:
    """See the module. Unless it was begun with `hold`, the weights may be changed already.

    `pack` copies this rank's bits and hands them over, `finish` waits for the fleet; both are the publisher's. With
    `in_place` nothing was copied: the weights may be changed when the fleet serves the version, or has failed to.
    """

    def __init__(
        self,
        number: int,
        timeout_s: float,
        deadline_s: float,
        pack: Callable[[], Span],
        finish: "Callable[[Publication], PublishReport]",
        *,
        hold: bool,
        in_place: bool = False,
    ) -> None:
        self.number = number
        self.timeout_s = timeout_s
        self.deadline_s = deadline_s
        self._finish = finish
        self._in_place = in_place
        self._packed: Future[Span] = Future()
        self._report: PublishReport | None = None
        self._error: DeadlineExceeded | EngineError | None = None
        if hold:
            name = f"weightcast-packer-{number}"
            threading.Thread(target=self._pack, args=(pack,), name=name, daemon=True).start()
        else:
            self._pack(pack)
            self.packed()

    def _pack(self, pack: Callable[[], Span]) -> None:
        try:
            self._packed.set_result(pack())
        except BaseException as error:  # the trainer's thread raises it
            self._packed.set_exception(error)

    def packed(self) -> Span:
        """Wait until the weights may be changed; when this rank's bits were copied, or, in place, digested.

        Raises `SourceError` when they could not be copied, `PeerLost` when the publisher's connections ended.
        """
        span = self.copied()
        if self._in_place:
            with suppress(DeadlineExceeded, EngineError):  # `wait` raises it again, and nobody reads the weights now
                self.wait()
        return span

    def copied(self) -> Span:
        """Wait until this rank's bits are copied, or, in place, digested; raises as `packed` does."""
        try:
            return self._packed.result(max(0.0, self.deadline_s - time.monotonic()) + PACK_GRACE_S)
        except TimeoutError as error:
            if self._packed.done():
                raise
            raise DeadlineExceeded(
                f"version {self.number} was not copied within {self.timeout_s:g} s and {PACK_GRACE_S:g} s more; the "
                "weights must not be changed, so end this rank"
            ) from error

    def wait(self) -> PublishReport:
        """Wait until the fleet serves it; raises what `WeightPublisher.publish` raises. May be called again."""
        if self._error is not None:
            raise self._error
        if self._report is None:
            self.copied()
            try:
                self._report = self._finish(self)
            except (DeadlineExceeded, EngineError) as error:
                self._error = error
                raise
        return self._report

    def settle(self) -> None:
        """Wait until this process reads the weights no more, whatever became of the copy."""
        with suppress(Exception):
            self.copied()
