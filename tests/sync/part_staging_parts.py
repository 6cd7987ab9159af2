"""A packed model of which a receiver keeps some boxes, and how it is sent."""

import torch
from tests.sync.packed import Packed, answer
from tests.sync.parts import bits, random_bits

from weightcast.sync import Region
from weightcast.sync.part_plan import PartPlan, plan_parts
from weightcast.sync.part_staging import PartStaging, make_part_staging
from weightcast.sync.shadow import Shadow
from weightcast.sync.snapshot import Snapshot
from weightcast.sync.wanted import WantedRegions, merge_boxes
from weightcast.sync.wanted_tensors import WantedTensors

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.float64)
SHAPES = {"rows": (64, 96), "columns": (64, 96), "norm": (96,), "scalar": (), "none": (0, 4), "unused": (40, 40)}
# The second of two tensor-parallel workers.
WANTED: WantedRegions = {
    "rows": (Region("rows", (32, 0), (32, 96)),),
    "columns": (Region("columns", (0, 48), (64, 48)),),
    "norm": (Region("norm", (0,), (96,)),),
    "scalar": (Region("scalar", (), ()),),
    "none": (Region("none", (0, 0), (0, 4)),),
    "unused": (),
}


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    """A tensor of each shape, of random bits."""
    return {
        name: random_bits(DTYPES[number % 2], shape, seed * 10 + number)
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def change(tensors: dict[str, torch.Tensor], seed: int, share: float = 0.02) -> None:
    """Change a few elements of each tensor, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        raw = bits(tensor)
        assert raw.data_ptr() == tensor.data_ptr() or not raw.numel()
        raw[torch.rand(raw.shape, generator=generator) < share] += 1


def plan_of(packed: Packed, wanted: WantedRegions) -> PartPlan:
    """What a receiver does with the chunks of a source."""
    return plan_parts(packed.layouts, packed.specs, wanted)


def open_staging(packed: Packed, snapshot: Snapshot, plan: PartPlan, shadow: Shadow) -> PartStaging:
    """Before anything came."""
    return make_part_staging(snapshot.version, packed.specs, packed.layouts, shadow, plan)


def send(packed: Packed, snapshot: Snapshot, plan: PartPlan, shadow: Shadow) -> tuple[WantedTensors, dict[int, str]]:
    """Everything, as the receiver asks for it: what it keeps, and each chunk's encoding."""
    staging = open_staging(packed, snapshot, plan, shadow)
    encodings = {}
    for index in staging.order[0]:
        header, body = answer(snapshot, index, staging.base(0, index))
        staging.land(0, header, body)
        encodings[index] = header.encoding
    assert not staging.num_missing and not staging.is_whole
    staging.seal(packed.digests())
    assert staging.num_missing == len(plan.pages)
    for _, index in staging.late_keys:
        staging.land(0, *answer(snapshot, index))
    assert staging.take_wrong() == [] and staging.is_whole
    return staging.finish(), encodings


def assert_kept(found: WantedTensors, wanted: WantedRegions, tensors: dict[str, torch.Tensor]) -> None:
    """Just the wanted boxes, with the tensors' bits."""
    assert list(found) == list(tensors) and len(found) == len(tensors)
    for name, tensor in tensors.items():
        parts = found.parts(name)
        assert merge_boxes(box for box, _ in parts if box.numel) == merge_boxes(wanted[name] if tensor.numel() else ())
        full = found[name]
        assert full.shape == tensor.shape and full.dtype is tensor.dtype
        for box, part in parts:
            assert torch.equal(bits(part), bits(tensor[box.slices])), name
            assert torch.equal(bits(full[box.slices]), bits(tensor[box.slices])), name
    kept = sum(box.numel * tensors[name].element_size() for name, boxes in wanted.items() for box in boxes)
    assert found.num_bytes == kept
