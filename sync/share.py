"""A rank's share of the model: its live regions, and the memory that they are packed into.

share = Share(source, history=4, expose=("shared_memory",))
packer = share.prepare(regions, chunk_bytes, is_read=False)     # regions as rank 0 assigned them
share.tickets                                                   # how engines may read that memory by themselves
"""

import logging
from collections.abc import Sequence
from typing import TypeAlias

from weightcast.sync.chunks import Chunk, lay_out_chunks
from weightcast.sync.delta_format import ByteArray
from weightcast.sync.device_packer import DevicePacker
from weightcast.sync.device_room import find_room
from weightcast.sync.errors import ConfigError, ReachError
from weightcast.sync.host_live import HostLivePacker
from weightcast.sync.live_packer import LivePacker
from weightcast.sync.packer import Packer
from weightcast.sync.records import Ticket
from weightcast.sync.regions import Region, check_unique_names
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.reaches import Arena, check_kinds, make_arena

AnyLivePacker: TypeAlias = LivePacker | HostLivePacker

logger = logging.getLogger(__name__)


def check_in_place(in_place: bool, delta: str) -> None:
    """`ConfigError` for what does not go with weights that are read where they lie."""
    if in_place and delta != "off":
        raise ConfigError(
            f"in_place=True with delta={delta!r}: the weights are read where they lie, and there is no former version "
            'to compare with; use delta="off", or leave out in_place'
        )


class Share:
    """See the module. Raises `SourceError` when tensor names repeat, `ConfigError` for an unknown kind of memory.

    With `keeps_bits_on_device` the last bits of weights on a GPU are kept there as well, where it has room for them.
    With `in_place` nothing is packed where engines can read the weights themselves (`live_packer`); a warning says once
    why they cannot.
    """

    def __init__(
        self,
        source: WeightSource,
        history: int,
        expose: Sequence[str],
        *,
        keeps_bits_on_device: bool = False,
        in_place: bool = False,
    ) -> None:
        self.rank = source.rank
        self.specs = tuple(source.specs())
        check_unique_names(self.specs)
        self.held = {held.region: held for held in source.held()}
        self._specs_by_name = {spec.name: spec for spec in self.specs}
        self._history = history
        self._expose = check_kinds(expose)
        self._keeps_bits_on_device = keeps_bits_on_device
        self._in_place = in_place
        self._live: AnyLivePacker | None = None
        self._laid_out: tuple[tuple[Region, ...], int] | None = None
        self._packer: Packer | None = None
        self._arena: Arena | None = None

    def prepare(self, regions: tuple[Region, ...], chunk_bytes: int, *, is_read: bool) -> Packer:
        """The packer of `regions`. With `is_read`, somebody still reads what was packed last: it goes on elsewhere."""
        if self._in_place and any(region.numel for region in regions):
            live = self._prepare_live(regions, chunk_bytes, is_read=is_read)
            if live is not None:
                return live
        if self._packer is None or self._laid_out != (regions, chunk_bytes):
            chunks = self._lay_out(regions, chunk_bytes)
            arena = self._renew_arena(sum(chunk.num_bytes for chunk in chunks))
            self._packer = self._make_packer(regions, chunks, arena)
            self._laid_out = (regions, chunk_bytes)
        elif is_read:
            assert self._arena is not None
            if self._arena.device_memory is not None:
                # Only host memory is being sent; what engines read on the device stays where it is.
                self._packer.move(allocate_arena(self._packer.num_bytes))
            else:
                self._packer.move(self._renew_arena(self._packer.num_bytes).memory)
        return self._packer

    def _lay_out(self, regions: tuple[Region, ...], chunk_bytes: int) -> tuple[Chunk, ...]:
        return lay_out_chunks(regions, {spec.name: spec.dtype for spec in self.specs}, chunk_bytes)

    def _prepare_live(self, regions: tuple[Region, ...], chunk_bytes: int, *, is_read: bool) -> AnyLivePacker | None:
        """As `prepare`, where engines can read the weights themselves; once they cannot None, and never again."""
        try:
            if self._live is None or self._laid_out != (regions, chunk_bytes):
                self.close()
                chunks = self._lay_out(regions, chunk_bytes)
                arena = allocate_arena(sum(chunk.num_bytes for chunk in chunks))
                self._live = self._make_live(regions, chunks, arena)
                self._laid_out = (regions, chunk_bytes)
            elif is_read:
                self._live.move(allocate_arena(self._live.num_bytes))
            self._live.look()
        except (OSError, ReachError) as error:
            logger.warning("in_place=True: the weights of source rank %d are packed as usual: %s", self.rank, error)
            self.close()
            self._in_place, self._live, self._laid_out = False, None, None
        return self._live

    def _make_live(self, regions: tuple[Region, ...], chunks: tuple[Chunk, ...], arena: ByteArray) -> AnyLivePacker:
        arguments = (self.held, self._specs_by_name, regions, chunks, arena)
        if "cuda_ipc" in self._expose:
            return LivePacker(*arguments)
        return HostLivePacker(*arguments, shares="shared_memory" in self._expose)

    def _make_packer(self, regions: tuple[Region, ...], chunks: tuple[Chunk, ...], arena: Arena) -> Packer:
        there = arena.device_memory
        if there is None and self._keeps_bits_on_device:
            there = find_room(regions, self.held, len(arena.memory))
        if there is None:
            return Packer(self.held, self._specs_by_name, regions, chunks, arena.memory, self._history)
        host_is_read = bool(arena.tickets) and arena.device_memory is None
        return DevicePacker(
            *(self.held, self._specs_by_name, regions, chunks, arena.memory, self._history, there),
            host_is_read=host_is_read,
        )

    def _renew_arena(self, num_bytes: int) -> Arena:
        self.close()
        self._arena = make_arena(self._expose, num_bytes)
        return self._arena

    @property
    def tickets(self) -> tuple[Ticket, ...]:
        """Tickets to the memory that is packed into."""
        if self._live is not None:
            return tuple(Ticket(self.rank, kind, data) for kind, data in self._live.tickets)
        if self._arena is None:
            return ()
        return tuple(Ticket(self.rank, kind, data) for kind, data in self._arena.tickets)

    def close(self) -> None:
        """Give out no more tickets."""
        if self._live is not None:
            self._live.close()
        if self._arena is not None:
            self._arena.close()
