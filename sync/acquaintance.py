"""Whether an engine and its publisher know each other: greetings, pings, silence, goodbyes. Pure; of the engine's side.

known = Acquaintance(limits)
known.hear(message, now_s)                 # any message of the coordinator
known.is_ping_due(now_s); known.is_lost(now_s)
known.awaits_goodbye                       # whether somebody is there who answers a goodbye
"""

from weightcast.sync.errors import WireError
from weightcast.sync.limits import Limits
from weightcast.sync.messages import Goodbye, Message, Pong, Welcome, decode


class Acquaintance:
    """See the module. `now_s` is a monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self.is_met = False
        """Whether a publisher has answered, and was not lost since."""
        self.is_dismissed = False
        """Whether this engine need not come back."""
        self._limits = limits
        self._heard_s: float | None = None
        self._pinged_s = self._greeted_s = -1e9

    def hear(self, message: Message, now_s: float) -> None:
        """A message of the coordinator, whatever it says."""
        self._heard_s = now_s
        if isinstance(message, Welcome):
            self.is_met = True
        elif isinstance(message, Goodbye):
            self.is_met = False
            # Two engines of one name would otherwise put each other out for ever.
            self.is_dismissed = message.final

    @property
    def awaits_goodbye(self) -> bool:
        """Whether the coordinator knows this engine: it answers its `Bye`, and so says that all before it came too."""
        return self.is_met

    def must_greet(self, pong: Pong, now_s: float) -> bool:
        """Whether to greet again after a pong of somebody who does not know this engine, or whom it does not know.

        Every ping that queued up while nobody was there gets its pong; one greeting answers them all.
        """
        if (pong.known and self.is_met) or now_s - self._greeted_s < self._limits.ping_every_s:
            return False
        self._greeted_s = now_s
        return True

    def is_ping_due(self, now_s: float) -> bool:
        """Whether it is time for a ping, which is then sent."""
        if now_s - self._pinged_s < self._limits.ping_every_s:
            return False
        self._pinged_s = now_s
        return True

    def is_lost(self, now_s: float) -> bool:
        """Whether the coordinator fell silent since this was asked last."""
        if self._heard_s is None or now_s - self._heard_s <= self._limits.lost_after_s:
            return False
        self._heard_s = None
        # What was dropped must be announced again, even by a publisher that did not miss this engine.
        self.is_met = False
        return True


def is_farewell(frames: list[bytes]) -> bool:
    """Whether what came is the coordinator's word that it knows this engine no more."""
    try:
        message = decode(frames[0]) if len(frames) == 1 else None
    except WireError:
        return False
    return isinstance(message, Goodbye) or (isinstance(message, Pong) and not message.known)
