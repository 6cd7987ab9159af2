"""In place: a subscription whose versions land in the engine's own tensors, with no staged copy.

    with WeightSubscriber(address, into=dict(model.named_parameters())) as subscriber:
        engine.pause()                                  # it does not serve
        update = subscriber.wait(timeout_s=600)         # the parameters have the version's bits
        engine.resume()
        update.commit()

    idle -> announced -> (the engine lends its memory: `wait`) -> landing -> staged -> ready -> taken -> serving

Nothing is written unless the engine has lent its memory, which says that it does not serve from it: a version that is
announced before waits. The memory is given back whenever `wait` ends, and the engine may do with it what it wants. So a
version that was not taken by then is begun anew by the next `wait`: what has landed of it is not fetched again, but it
is digested again, as all of it is.

From the first byte that is written until a version is taken the tensors are *torn*: not to be served, for they hold
bits of several versions, or of one that the fleet has not released.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from weightcast.sync.arrival import Arrival
from weightcast.sync.effects import Effect
from weightcast.sync.engine_tensors import EngineTensors
from weightcast.sync.errors import SourceError, WireError
from weightcast.sync.ledger import ChunkKey
from weightcast.sync.limits import Limits
from weightcast.sync.shadow import Shadow
from weightcast.sync.subscription import Subscription
from weightcast.sync.version import Version

_REMEDY = (
    "do not serve from them; wait() again, which lands the next version whole over them, or load weights from elsewhere"
)


@dataclass(frozen=True, slots=True)
class Held:
    """What lies in an engine's own tensors, as far as versions landed there.

    `version` is there whole, checked and released; None before the first, where the engine has what it loaded itself,
    and when the tensors are torn.
    """

    version: Version | None = None
    is_torn: bool = False


class InPlaceShadow(Shadow):
    """A shadow that is the engine's memory: it knows of which version each chunk is, and whether one is there whole."""

    def __init__(self, memory: EngineTensors) -> None:
        super().__init__(memory, device=memory.device)
        self.held = Held()

    def forget(self, keys: Iterable[ChunkKey]) -> None:
        """See `Shadow`; it comes before whatever is written."""
        listed = list(keys)
        super().forget(listed)
        if listed:
            self.held = Held(is_torn=True)

    def settle(self, version: Version) -> None:
        """`version` is whole, and the engine may serve it."""
        self.held = Held(version)

    def describe_engine(self, serving: Version | None) -> str:
        """See `Shadow`."""
        return "may not serve the tensors it landed in" if self.held.is_torn else super().describe_engine(serving)


class InPlaceSubscription(Subscription):
    """See the module. Pure, as the one it extends; of a receiver."""

    def __init__(self, engine: str, memory: EngineTensors, limits: Limits, wall_offset_s: float) -> None:
        super().__init__(engine, "receiver", memory.specs, limits, wall_offset_s)
        self.memory = memory
        self.shadow = self._place = InPlaceShadow(memory)
        self._is_lent = False

    @property
    def held(self) -> Held:
        """What lies in the engine's tensors."""
        return self._place.held

    @property
    def announced(self) -> Version | None:
        """The version that waits for the engine's memory, or lands in it."""
        waiting = self._waiting if self.arrival is None else self.arrival.announce
        return None if waiting is None else waiting.version

    def _must_wait(self, version: Version) -> bool:
        return super()._must_wait(version) or not self._is_lent

    def describe(self) -> str:
        """In one sentence, where this subscription is."""
        if self._waiting is not None and self.taken is None:
            return f"version {self._waiting.version} was announced, and lands once the engine waits for it"
        return super().describe()

    def describe_torn(self) -> str:
        """What is to be said of torn tensors; nothing where they are whole."""
        if not self.held.is_torn:
            return ""
        arrival = self.arrival
        if arrival is not None and arrival.is_staged:
            what = f"hold version {arrival.version}, which is whole and was not released"
        else:
            what = "are torn: they hold bits of several versions"
        return f"the tensors of engine {self.engine!r} {what}; {_REMEDY}"

    def tell_staged(self) -> list[Effect]:
        """See `Subscription`; not of a version that has other bits for weights which are tied here."""
        arrival = self.arrival
        if arrival is not None and arrival.is_staged and (tie := self.memory.find_broken_tie()):
            what = f"{tie[0]} and {tie[1]} are one tensor in engine {self.engine!r}, and version {arrival.version}"
            remedy = "publish a model whose configuration ties them, or give each a tensor of its own"
            return self._refuse(arrival.version, SourceError(f"{what} has different values for them; {remedy}"))
        return super().tell_staged()

    def give_up(self, reason: str) -> list[Effect]:
        """See `Subscription`; also of a version that waits for the engine's memory."""
        if self.arrival is not None or self._waiting is None or self.taken is not None:
            return super().give_up(reason)
        version, self._waiting = self._waiting.version, None
        return self._refuse(version, WireError(reason))

    # What the engine does

    def lend(self, now_s: float) -> list[Effect]:
        """The engine does not serve: its memory may be written until `take_back`."""
        self._is_lent = True
        waiting, self._waiting = self._waiting, None
        # Sources may have gone on since: nothing is written before they were asked.
        return [] if waiting is None else self._announced(replace(waiting, ready=()), now_s)

    def take_back(self) -> None:
        """From now on nothing is written; what was not taken is begun anew when the memory is lent again."""
        self._is_lent = False
        if self.arrival is not None:
            self._waiting, self.arrival = self.arrival.announce, None

    def take(self) -> Arrival:
        """See `Subscription`; the tensors are whole now, and those that the engine gave."""
        taken = super().take()
        assert taken.tensors is not None
        taken.tensors = self.memory.present(taken.tensors)
        self._place.settle(taken.version)
        return taken
