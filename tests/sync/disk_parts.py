"""Parts that the tests of stores of versions share."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tests.sync.parts import WAIT_S, TensorSource, assert_same_bits, bits

from weightcast.sync import DiskLimits, DiskPublisher, DiskSubscriber, Region, Version
from weightcast.sync.disk.naming import version_folder
from weightcast.sync.disk.records import Hashing, VersionManifest, seal, unseal
from weightcast.sync.errors import WeightcastError

QUICK = DiskLimits(poll_s=0.01)


def step(tensors: Mapping[str, torch.Tensor], number: int, every: int = 97) -> None:
    """Change one byte in `every` of each tensor, as an optimizer step might; tensors of 1 byte elements stay."""
    for index, tensor in enumerate(tensors.values()):
        if tensor.dtype is not torch.bool:
            raw = bits(tensor)
            raw[(number + index) % every :: every] ^= 1
            tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that does not change with the model."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def take(subscriber: DiskSubscriber, wanted: Mapping[str, torch.Tensor], number: int) -> None:
    """Wait for version `number`, compare its bits, commit it."""
    update = subscriber.wait(WAIT_S)
    assert update.version.number == number
    assert_same_bits(dict(update), wanted)
    update.commit()


def folder_of(root: Path, number: int) -> Path:
    """The folder of version `number`."""
    (found,) = (path for path in root.iterdir() if path.name.endswith(f"-{number:08d}"))
    return found


def read_manifest(folder: Path) -> VersionManifest:
    """The manifest of a version's folder."""
    return unseal((folder / "manifest.weightcast").read_bytes(), VersionManifest, Hashing())


def write_manifest(folder: Path, manifest: VersionManifest) -> None:
    """Replace it by another, soundly sealed."""
    (folder / "manifest.weightcast").write_bytes(seal(manifest, Hashing()))


@contextmanager
def disk_publishers(
    tensors: Mapping[str, torch.Tensor], shares: Sequence[Sequence[Region]], root: Path, **kwargs: object
) -> Iterator[list[DiskPublisher]]:
    """One publisher a rank, in this process; `shares` are the regions that each holds."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                DiskPublisher(TensorSource(tensors, rank, len(shares), regions), root, **kwargs)  # type: ignore[arg-type]
            )
            for rank, regions in enumerate(shares)
        ]


def publish_all(made: Sequence[DiskPublisher], number: int, **kwargs: float) -> list[object]:
    """What `publish` returns or raises on each rank, called at once."""
    results: list[object] = [None] * len(made)

    def run(rank: int) -> None:
        try:
            results[rank] = made[rank].publish(number, **kwargs)
        except WeightcastError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    return results


def name_of(epoch: int, number: int) -> str:
    """The folder's name of a version."""
    return version_folder(Version(epoch, number))
