"""Who may read a shared copy, and when it may be overwritten: both sides' states, without sockets or clocks.

leases = LeaseBook(lease_s=60.0)           # the leader's
leases.stage(staged)                       # a version lies there
leases.take(holder, staged.state)          # True: it stays until the holder gives it back
leases.want_overwrite(now_s)               # from now on nobody gets a lease, and those who have one have 60 s more
leases.end_late(now_s)                     # those that were kept for too long
leases.begin_overwrite()                   # when leases.holders is empty
"""

import math
from collections.abc import Callable

from weightcast.sync.errors import WireError
from weightcast.sync.host.pool import Staged
from weightcast.sync.host.share_messages import Denied, Granted, Offered, Refused, Take, Withdrawn
from weightcast.sync.version import Version


class LeaseBook:
    """The leases of one shared copy. A holder is any number of the caller's choice; it has one lease at most."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.staged: Staged | None = None
        # When each lease is past its time; infinity while nobody wanted to overwrite it.
        self._ends_s: dict[int, float] = {}
        self._is_wanted = False

    @property
    def offered(self) -> Staged | None:
        """What leases are given for now."""
        return None if self._is_wanted else self.staged

    @property
    def holders(self) -> tuple[int, ...]:
        """Who has a lease."""
        return tuple(self._ends_s)

    @property
    def next_end_s(self) -> float | None:
        """When the next lease is past its time, in the clock of `want_overwrite`; None when none ever is."""
        return min((end_s for end_s in self._ends_s.values() if end_s < math.inf), default=None)

    def take(self, holder: int, state: int) -> bool:
        """Whether `holder` gets a lease on the copy in that state. One that it had before ends."""
        self._ends_s.pop(holder, None)
        if self.offered is None or self.offered.state != state:
            return False
        self._ends_s[holder] = math.inf
        return True

    def give_back(self, holder: int) -> None:
        """The holder no longer reads, or is gone."""
        self._ends_s.pop(holder, None)

    def want_overwrite(self, now_s: float) -> None:
        """No more leases, until `stage` or `cancel_overwrite`. Holders have `lease_s` more, from the first time on.

        Before, time is no reason to end a lease: a version may be staged, and read, long before the next one comes.
        """
        self._is_wanted = True
        for holder, end_s in self._ends_s.items():
            self._ends_s[holder] = min(end_s, now_s + self.lease_s)

    def end_late(self, now_s: float) -> tuple[int, ...]:
        """End the leases that are past their time, and say whose they were. Nobody else ends them."""
        assert self._is_wanted
        late = tuple(holder for holder, end_s in self._ends_s.items() if end_s <= now_s)
        for holder in late:
            del self._ends_s[holder]
        return late

    def cancel_overwrite(self) -> None:
        """Leases are given again for what lies there."""
        self._is_wanted = False

    def begin_overwrite(self) -> None:
        """Nothing is staged from now on."""
        assert not self._ends_s, "a staged version is not overwritten under its readers"
        self.staged, self._is_wanted = None, True

    def stage(self, staged: Staged) -> None:
        """`staged` lies there now."""
        assert self.staged is None and not self._ends_s
        self.staged, self._is_wanted = staged, False


class FollowerState:
    """What a follower knows of the leader's copy, and whether it has a lease."""

    def __init__(self, offered: Staged | None) -> None:
        self.offered = offered
        self.granted: Staged | None = None
        self.refused: Refused | None = None
        self._asked: Staged | None = None
        self._request = 0

    def hear(self, message: Offered | Withdrawn | Refused | Granted | Denied) -> None:
        """A message of the leader came. `WireError` when it makes no sense."""
        match message:
            case Offered():
                self.offered = message.staged
                if self.refused is not None and self.refused.version == message.staged.version:
                    self.refused = None
            case Withdrawn():
                self.offered = None
            case Refused():
                self.refused = message
            case _ if message.request > self._request:
                raise WireError(f"an answer to the request {message.request}, the last was {self._request}")
            case _ if message.request == self._request and self._asked is not None:
                # Answers to requests that were given up are passed over: their leases were given back.
                self.granted = self._asked if isinstance(message, Granted) else None
                self._asked = None

    def ask(self, is_wanted: Callable[[Version], bool]) -> Take | None:
        """What to send to get a lease on a version that is wanted; None when there is nothing to ask for."""
        if self._asked is not None or self.granted is not None:
            return None
        if self.offered is None or not is_wanted(self.offered.version):
            return None
        self._asked = self.offered
        self._request += 1
        return Take(self.offered.state, self._request)

    def give_up(self) -> bool:
        """Drop what was asked for or granted; True when the leader must be told."""
        was_open = self._asked is not None or self.granted is not None
        self._asked = self.granted = None
        return was_open
