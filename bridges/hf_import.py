"""Import: each rank reads its own regions from the files into its parameters, and nothing else.

What is read is checked first, so that a bad checkpoint leaves every parameter as it was. There is no collective and
no full tensor: a rank reads as many bytes as it holds.

    report = import_weights(plan, open_checkpoint(folder))
    print(report.num_bytes)
"""

from dataclasses import dataclass

import torch

from weightcast.bridges.plan import Plan
from weightcast.sync.checkpoint_files import CheckpointFiles, RegionReader
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one rank read."""

    num_bytes: int
    num_regions: int


@torch.no_grad()
def import_weights(plan: Plan, checkpoint: CheckpointFiles) -> ImportReport:
    """Fill this rank's parameters from `checkpoint`; values are cast to the parameters' dtype, padding becomes zero.

    Any rank may call it alone. The caller has checked names and shapes (`check_tensors`). Raises
    `CheckpointMismatch` when two copies of one tied tensor differ, before a parameter is written.
    """
    with checkpoint.reader() as reader:
        for held in plan.regions:
            if held.region.name in plan.copies:
                check_copy(reader, checkpoint, held.region, plan.copies[held.region.name])
        originals = [held for held in plan.regions if held.region.name not in plan.copies]
        for held in originals:
            held.live.write(reader.read(held.region))
        for padding in plan.padding:
            padding().zero_()
        return ImportReport(reader.num_bytes, len(originals))


def check_copy(reader: RegionReader, checkpoint: CheckpointFiles, copy: Region, original: str) -> None:
    """Raise `CheckpointMismatch` unless a region of a tied copy has the bits of the same region of its original."""
    ours = reader.read(copy).contiguous().view(torch.uint8)
    theirs = reader.read(Region(original, copy.offset, copy.shape)).contiguous().view(torch.uint8)
    if not torch.equal(ours, theirs):
        raise CheckpointMismatch(
            f"{copy.name} in {checkpoint.files[copy.name]} differs from {original}, although the model has but one of "
            "them (tie_word_embeddings, or a layer for multi-token prediction, which shares it); remove the copy from "
            "the checkpoint, or set tie_word_embeddings to false in config.json if they are not tied"
        )
