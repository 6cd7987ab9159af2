"""Who shares a copy, and what they want together. Pure.

    members = Members(specs, terms)
    members.join(holder, wanted, now_s)         # None: all of the model
    members.first_wait_s(now_s)                 # before the first version: others may be about to come
    members.unite(held, now_s)                  # what the next version is received for

A union grows with whoever is there, and shrinks once nobody has come or gone for a while: while some are on their way
back (after the receiver's death, say) what they want goes on being received.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not

from weightcast.sync.regions import TensorSpec
from weightcast.sync.union import unite_wanted
from weightcast.sync.wanted import WantedRegions


@dataclass(frozen=True, slots=True)
class ShareTerms:
    """What the workers of a host agree on: see `HostShare`. Those of the one that receives count."""

    lease_s: float
    workers: int | None
    gather_s: float


class Members:
    """See the module. A holder is any number of the caller's choice."""

    def __init__(self, specs: Sequence[TensorSpec], terms: ShareTerms) -> None:
        self._specs = specs
        self._terms = terms
        self._wants: dict[int, WantedRegions | None] = {}
        self._changed_s = 0.0
        self._united: list[WantedRegions | None] = []
        self._union: WantedRegions | None = unite_wanted(specs, ())

    def join(self, holder: int, wanted: WantedRegions | None, now_s: float) -> None:
        """A worker is here."""
        self._wants[holder] = wanted
        self._changed_s = now_s

    def leave(self, holder: int, now_s: float) -> None:
        """A worker is gone."""
        del self._wants[holder]
        self._changed_s = now_s

    def first_wait_s(self, now_s: float) -> float:
        """Seconds to wait for others before there is a first union; 0 when nobody could change it."""
        wants_all = any(wanted is None for wanted in self._wants.values())
        return 0.0 if wants_all else self._settled_after_s(now_s)

    def unite(self, held: Sequence[WantedRegions | None], now_s: float) -> WantedRegions | None:
        """What all want, and, while some may still come, what is `held` now (nothing, or one union)."""
        kept = held if self._settled_after_s(now_s) > 0 else ()
        wants = [*self._wants.values(), *kept]
        if len(wants) != len(self._united) or any(map(is_not, wants, self._united)):
            # Of many tensors it takes a while, and most versions are for whom the ones before were.
            self._union, self._united = unite_wanted(self._specs, wants), wants
        return self._union

    def _settled_after_s(self, now_s: float) -> float:
        if self._terms.workers is not None and len(self._wants) >= self._terms.workers:
            return 0.0
        return max(0.0, self._changed_s + self._terms.gather_s - now_s)
