"""What broadcasts may bring of a version that an engine fetches: not asked for until they are over, or too late. Pure.

    offer = BroadcastOffer.take(reached, patience_s=10, now_s=now_s)   # the ranks whose kind is `KIND` leave `reached`
    offer.hear(rank, now_s)                                            # a chunk of an offered rank came
    offer.list_late(now_s)                                             # ranks that are to be asked after all
    offer.end(rank, num_missing)                                       # nothing more is waited for from there

A broadcast holds a version up by `patience_s` at most, from its beginning or from the last chunk that it brought.
"""

from collections.abc import Mapping, MutableMapping, Sequence, Sized
from dataclasses import dataclass, field

KIND = "collective"


@dataclass(slots=True)
class BroadcastOffer:
    """See the module. Of one version on its way."""

    patience_s: float = 0.0
    _heard_s: dict[int, float] = field(default_factory=dict)
    _brought: set[int] = field(default_factory=set)
    _only: set[int] = field(default_factory=set)
    """Ranks from which nothing came in any other way."""

    @classmethod
    def take(cls, reached: MutableMapping[int, str], patience_s: float, now_s: float) -> "BroadcastOffer":
        """The offers among the ways to each source rank, which are taken out of them."""
        ranks = [rank for rank, kind in reached.items() if kind == KIND]
        for rank in ranks:
            del reached[rank]
        return cls(patience_s, dict.fromkeys(ranks, now_s), _only=set(ranks))

    def holds(self, rank: int) -> bool:
        """Whether what a source serves may still come by broadcast, and is not asked for."""
        return rank in self._heard_s

    def hear(self, rank: int, now_s: float) -> None:
        """A chunk came; of a rank that was asked for none it was broadcast."""
        if rank in self._heard_s:
            self._heard_s[rank] = now_s
            self._brought.add(rank)

    def list_late(self, now_s: float) -> list[int]:
        """Ranks whose broadcast is not waited for any longer."""
        return [rank for rank, heard_s in self._heard_s.items() if now_s - heard_s > self.patience_s]

    def end(self, rank: int, num_missing: int) -> bool:
        """A rank's broadcast is over, with so many chunks missing: whether these are now to be asked for."""
        if self._heard_s.pop(rank, None) is None or not num_missing:
            return False
        self._only.discard(rank)
        return True

    def has_brought(self, rank: int) -> bool:
        """Whether some chunk of the rank was broadcast."""
        return rank in self._brought

    def describe_waiting(self) -> str:
        """For whose broadcast is waited, in words; empty where for nobody's."""
        ranks = sorted(self._heard_s)
        return f" or to be broadcast by {ranks}" if ranks else ""

    def name_transport(self, order: Mapping[int, Sequence[int] | Sized], reached: Mapping[int, str]) -> str:
        """How chunks came from the sources that have some: a kind, or several."""
        kinds = {reached.get(rank, "zmq") for rank, indices in order.items() if len(indices) and rank not in self._only}
        if self._brought or any(len(order.get(rank, ())) for rank in self._only):
            kinds.add(KIND)
        return "+".join(sorted(kinds)) or "zmq"
