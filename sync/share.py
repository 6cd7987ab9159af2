"""A rank's share of the model: its live regions, and the memory that they are packed into.

share = Share(source, history=4, expose=("shared_memory",))
packer = share.prepare(regions, chunk_bytes, is_read=False)     # regions as rank 0 assigned them
share.tickets                                                   # how engines may read that memory by themselves
"""

from collections.abc import Sequence

from weightcast.sync.chunks import Chunk, lay_out_chunks
from weightcast.sync.device_packer import DevicePacker
from weightcast.sync.device_room import find_room
from weightcast.sync.packer import Packer
from weightcast.sync.records import Ticket
from weightcast.sync.regions import Region, check_unique_names
from weightcast.sync.snapshot import allocate_arena
from weightcast.sync.source import WeightSource
from weightcast.sync.transports.reaches import Arena, check_kinds, make_arena


class Share:
    """See the module. Raises `SourceError` when tensor names repeat, `ConfigError` for an unknown kind of memory.

    With `keeps_bits_on_device` the last bits of weights on a GPU are kept there as well, where it has room for them.
    """

    def __init__(
        self, source: WeightSource, history: int, expose: Sequence[str], *, keeps_bits_on_device: bool = False
    ) -> None:
        self.rank = source.rank
        self.specs = tuple(source.specs())
        check_unique_names(self.specs)
        self.held = {held.region: held for held in source.held()}
        self._specs_by_name = {spec.name: spec for spec in self.specs}
        self._history = history
        self._expose = check_kinds(expose)
        self._keeps_bits_on_device = keeps_bits_on_device
        self._laid_out: tuple[tuple[Region, ...], int] | None = None
        self._packer: Packer | None = None
        self._arena: Arena | None = None

    def prepare(self, regions: tuple[Region, ...], chunk_bytes: int, *, is_read: bool) -> Packer:
        """The packer of `regions`. With `is_read`, somebody still reads what was packed last: it goes on elsewhere."""
        if self._packer is None or self._laid_out != (regions, chunk_bytes):
            dtypes = {spec.name: spec.dtype for spec in self.specs}
            chunks = lay_out_chunks(regions, dtypes, chunk_bytes)
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
        if self._arena is None:
            return ()
        return tuple(Ticket(self.rank, kind, data) for kind, data in self._arena.tickets)

    def close(self) -> None:
        """Give out no more tickets."""
        if self._arena is not None:
            self._arena.close()
