"""Parts that the tests of sync share: sources of tensors, engines in threads, and comparisons of bits."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from hypothesis import settings

from weightcast.sync import HeldRegion, Limits, Region, TensorSpec, WeightPublisher, WeightSubscriber
from weightcast.sync.errors import WeightcastError
from weightcast.sync.records import Span

# Patient enough for a busy machine, and quick to notice the dead.
LIMITS = Limits(chunk_timeout_s=0.5, lost_after_s=4.0)
WAIT_S = 20.0
# Where nothing is lost, and a repeat would be a fault: however long the machine is busy elsewhere, a chunk is not asked
# for twice, nor a source's memory given up.
PATIENT = Limits(chunk_timeout_s=WAIT_S, lost_after_s=WAIT_S)
# Time on a busy machine says nothing; the same examples every time, and few, keep the suite quick.
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


class TensorSource:
    """Tensors of a dictionary as a source; `cut` says which region of each a rank holds (all of it by default)."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        rank: int = 0,
        world_size: int = 1,
        regions: Sequence[Region] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        self.rank = rank
        self.world_size = world_size
        self._regions = regions

    def specs(self) -> list[TensorSpec]:
        """One spec a tensor."""
        return make_specs(self.tensors)

    def held(self) -> list[HeldRegion]:
        """The regions given, or every tensor whole."""
        regions = [spec.whole() for spec in self.specs()] if self._regions is None else self._regions
        return [HeldRegion(region, partial(self._view, region)) for region in regions]

    def _view(self, region: Region) -> torch.Tensor:
        return self.tensors[region.name][region.slices]


def make_specs(tensors: Mapping[str, torch.Tensor]) -> list[TensorSpec]:
    """A spec for each tensor."""
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bits: NaNs with payloads, infinities and denormals are among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    num_bytes = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def make_model(seed: int, rows: int = 64) -> dict[str, torch.Tensor]:
    """A small model with a tensor of each awkward kind."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "embed.weight": (torch.bfloat16, (rows, 48)),
        "layer.0.weight": (torch.float32, (rows, 17)),
        "layer.0.scale": (torch.float32, ()),
        "layer.0.codes": (torch.int8, (3, 5, 7)),
        "layer.0.mask": (torch.bool, (13,)),
        "layer.0.blocks": (torch.float8_e4m3fn, (9, 3)),
        "layer.0.none": (torch.bfloat16, (0, 4)),
        "norm.weight": (torch.bfloat16, (5,)),
    }
    return {
        name: random_bits(dtype, shape, seed * 100 + index)
        for index, (name, (dtype, shape)) in enumerate(shapes.items())
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaNs compare."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Same names in the same order, same dtypes, shapes and bits."""
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype is tensor.dtype and got[name].shape == tensor.shape, name
        assert torch.equal(bits(got[name]), bits(tensor)), name


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether its storage is in shared memory."""
    return bool(tensor.untyped_storage().is_shared())


def wait_until(is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Fails the test when it does not come true."""
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s, f"waited {timeout_s:g} s"
        time.sleep(0.01)


@dataclass
class Engine:
    """An engine in a thread: takes what comes, keeps clones of the last version, and the errors that it met."""

    name: str
    address: str
    make: Callable[..., WeightSubscriber] = WeightSubscriber
    kwargs: dict[str, object] = field(default_factory=dict)
    refuse: str = ""
    limits: Limits = LIMITS
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    errors: list[WeightcastError] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop`."""
        with self.make(self.address, engine=self.name, limits=self.limits, **self.kwargs) as subscriber:
            while not stop.is_set():
                try:
                    update = subscriber.wait(0.1)
                except TimeoutError:
                    continue
                except WeightcastError as error:
                    self.errors.append(error)
                    stop.wait(0.05)
                    continue
                if self.refuse:
                    update.reject(self.refuse)
                    continue
                self.tensors = {name: tensor.clone() for name, tensor in update}
                self.numbers.append(update.version.number)
                update.commit(pause_s=0.25, spans=[Span("swap", 1.0, 2.0)])


@contextmanager
def running(*engines: Engine) -> Iterator[None]:
    """Run the engines in threads for as long as the block lasts."""
    stop = threading.Event()
    threads = [threading.Thread(target=engine.run, args=(stop,), name=engine.name) for engine in engines]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)


def split_rows(spec: TensorSpec, parts: int) -> list[Region]:
    """The regions of a tensor cut along its first dimension; a scalar belongs to all."""
    if not spec.shape or spec.shape[0] < parts:
        return [spec.whole()] * parts
    size = -(-spec.shape[0] // parts)
    return [
        Region(
            spec.name,
            (index * size, *(0 for _ in spec.shape[1:])),
            (min(size, spec.shape[0] - index * size), *spec.shape[1:]),
        )
        for index in range(parts)
    ]


@contextmanager
def publishers(
    tensors: Mapping[str, torch.Tensor], world_size: int, address: str, **kwargs: object
) -> Iterator[list[WeightPublisher]]:
    """One publisher a rank, rank 0 first; `tensors` are cut by rows among them."""
    rows = {spec.name: split_rows(spec, world_size) for spec in make_specs(tensors)}
    with ExitStack() as stack:
        made: list[WeightPublisher] = []
        for rank in range(world_size):
            regions = [rows[name][rank] for name in tensors]
            source = TensorSource(tensors, rank, world_size, regions)
            made.append(stack.enter_context(WeightPublisher(source, address, **kwargs)))  # type: ignore[arg-type]
            address = made[0].address
        yield made


def on_all(made: Sequence[WeightPublisher], call: Callable[[WeightPublisher], object]) -> list[object]:
    """What `call` returns or raises on each publisher, called in threads at once as ranks would."""
    results: list[object] = [None] * len(made)

    def run(rank: int) -> None:
        try:
            results[rank] = call(made[rank])
        except WeightcastError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT_S)
    return results
