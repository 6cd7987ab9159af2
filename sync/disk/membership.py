"""An engine that agrees says how it is doing: one small file in the store, written at every change and every beat.

The beats come from a thread of their own, so that an engine which reads a large version for minutes is not taken for
dead. A clean end removes the file, and with it the engine from the fleet.
"""

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from weightcast.sync.disk.fleet_records import Member, member_file
from weightcast.sync.disk.naming import ENGINES
from weightcast.sync.disk.records import Hashing, seal
from weightcast.sync.disk.store import Store
from weightcast.sync.fleet import Role
from weightcast.sync.records import Span
from weightcast.sync.version import Version

logger = logging.getLogger(__name__)

BEAT_S = 2.0  # until the publisher's own pace is known
_MIN_BEAT_S, _MAX_BEAT_S = 0.02, 60.0
_BEATS_BEFORE_LOST = 4  # how many may be missed before a publisher takes the engine for lost
_MAX_TEXT = 1000


class Membership:
    """See the module. Nothing is written before `join`; methods may be called from any thread."""

    def __init__(self, store: Store, hashing: Hashing, engine: str, role: Role, serving: Version | None) -> None:
        self._store, self._hashing = store, hashing
        self._lock = threading.Condition()
        self._beat_s = BEAT_S
        self._has_changed = self._is_closed = False
        self._told = ""
        life = secrets.token_hex(8)
        self._member = Member(engine[:_MAX_TEXT], life, role, 0, serving, None, None, "", 0.0, 0.0, 0, 0, (), 0.0)
        self._thread: threading.Thread | None = None

    @property
    def has_joined(self) -> bool:
        """Whether the engine is in the fleet."""
        return self._thread is not None

    def join(self, lost_after_s: float | None = None) -> None:
        """Enter the fleet, or take on the pace of another publisher."""
        if lost_after_s is not None:
            with self._lock:
                self._beat_s = max(_MIN_BEAT_S, min(_MAX_BEAT_S, lost_after_s / _BEATS_BEFORE_LOST))
                self._lock.notify_all()  # the beat that it waits for may be too late
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"weightcast-member-{self._member.engine}", daemon=True
            )
            self._thread.start()

    def note_staged(self, version: Version, stage_s: float, num_bytes: int, checksums_checked: int) -> None:
        """The engine holds all of `version`, checked."""
        self._change(
            staged=version,
            refused=None,
            reason="",
            stage_s=stage_s,
            pause_s=0.0,
            num_bytes=num_bytes,
            checksums_checked=checksums_checked,
            spans=(),
        )

    def note_refused(self, version: Version, reason: str) -> None:
        """The engine cannot take `version`, and goes on with the one that it has."""
        self._change(refused=version, reason=reason.replace("\0", " ")[:_MAX_TEXT])

    def note_serving(self, version: Version, pause_s: float, spans: Sequence[Span]) -> None:
        """The engine serves `version`, for which it answered nobody for `pause_s`."""
        self._change(serving=version, reason="", pause_s=max(0.0, pause_s), spans=tuple(spans))

    def _change(self, **fields: Any) -> None:
        with self._lock:
            self._member = replace(self._member, **fields)
            self._has_changed = True
            self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_closed:
                    return
                self._member = member = replace(self._member, beat=self._member.beat + 1, at_s=time.time())
                self._has_changed = False
            self._write(member)
            with self._lock:
                if not self._has_changed and not self._is_closed:
                    self._lock.wait(self._beat_s)

    def _write(self, member: Member) -> None:
        try:
            self._store.write(ENGINES, member_file(member.engine), [seal(member, self._hashing)])
            self._told = ""
        except Exception as error:  # the thread must outlive a disk that is full for a while
            if str(error) != self._told:
                logger.warning("%s cannot tell the fleet how it is doing: %s", member.engine, error)
            self._told = str(error)

    def close(self) -> None:
        """Leave the fleet."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            with suppress(OSError):  # then the publisher waits until it is taken for lost
                self._store.remove(ENGINES, [member_file(self._member.engine)])
