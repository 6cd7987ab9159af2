"""MXFP4 checkpoints: every code under every scale has the bits that transformers gives it, in any box of a matrix."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from weightcast.bridges.codecs import decode_checkpoint
from weightcast.bridges.codecs_mxfp4 import VALUES, decode, stored_regions
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region

EXPERTS, INPUTS, OUTPUTS = 3, 96, 5
GENERATOR = torch.Generator().manual_seed(9)
BLOCKS = torch.randint(0, 256, (EXPERTS, OUTPUTS, INPUTS // 32, 16), generator=GENERATOR, dtype=torch.uint8)
SCALES = torch.randint(100, 140, (EXPERTS, OUTPUTS, INPUTS // 32), generator=GENERATOR, dtype=torch.uint8)
WHOLE = convert_moe_packed_tensors(BLOCKS, SCALES)  # [experts, in, out]


def test_every_code_under_every_scale_has_the_bits_of_transformers() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    blocks = every_byte.expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    ours, theirs = decode(blocks, scales, torch.bfloat16).mT, convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(ours.contiguous().view(torch.int16), theirs.view(torch.int16))


@given(code=st.integers(0, 15), other=st.integers(0, 15), exponent=st.integers(-120, 120))
def test_a_weight_is_its_code_times_a_power_of_two(code: int, other: int, exponent: int) -> None:
    low_first = torch.tensor([[code | other << 4] * 16], dtype=torch.uint8)
    weights = decode(low_first, torch.tensor([exponent + 127], dtype=torch.uint8), torch.float32)
    assert weights.tolist() == [VALUES[code] * 2.0**exponent, VALUES[other] * 2.0**exponent] * 16


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bias = torch.ones(EXPERTS, OUTPUTS, dtype=torch.bfloat16)
    return write(tmp_path_factory.mktemp("mxfp4"), w_blocks=BLOCKS, w_scales=SCALES, w_bias=bias)


def test_a_checkpoint_of_codes_reads_as_one_of_weights(coded: Path) -> None:
    checkpoint = decode_checkpoint(open_checkpoint(coded), torch.bfloat16)
    kinds = {spec.name: (spec.dtype, spec.shape) for spec in checkpoint.specs}
    assert kinds == {
        "w": (torch.bfloat16, (EXPERTS, INPUTS, OUTPUTS)),
        "w_bias": (torch.bfloat16, (EXPERTS, OUTPUTS)),
    }
    with checkpoint.reader() as reader:
        assert torch.equal(reader.read(Region("w", (0, 0, 0), (EXPERTS, INPUTS, OUTPUTS))), WHOLE)
        assert reader.num_bytes == BLOCKS.numel() + SCALES.numel()


boxes = st.tuples(*[st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in (EXPERTS, INPUTS, OUTPUTS)])


@settings(max_examples=200, deadline=None)
@given(box=boxes)
def test_a_box_is_its_part_of_the_matrix_and_reads_the_blocks_that_it_touches(
    coded: Path, box: tuple[tuple[int, int], ...]
) -> None:
    sizes = (EXPERTS, INPUTS, OUTPUTS)
    offset = tuple(start for start, _ in box)
    shape = tuple(min(count, size - start) for (start, count), size in zip(box, sizes, strict=True))
    region = Region("w", offset, shape)
    with decode_checkpoint(open_checkpoint(coded), torch.bfloat16).reader() as reader:
        assert torch.equal(reader.read(region), WHOLE[region.slices])
        first, last = offset[1] // 32, (offset[1] + shape[1] - 1) // 32
        assert reader.num_bytes == shape[0] * shape[2] * (last - first + 1) * 17


def test_a_box_needs_its_columns_as_rows_of_blocks() -> None:
    blocks, scales = stored_regions(Region("w", (2, 64, 1), (1, 32, 3)))
    assert blocks == Region("w_blocks", (2, 1, 2, 0), (1, 3, 1, 16))
    assert scales == Region("w_scales", (2, 1, 2), (1, 3, 1))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w_blocks": BLOCKS}, "w_blocks is one half of an MXFP4 matrix, but there is no w_scales"),
        ({"w_scales": SCALES}, "w_scales is one half of an MXFP4 matrix, but there is no w_blocks"),
        ({"w_blocks": BLOCKS, "w_scales": SCALES[:1].clone()}, "has scales of torch.uint8 and shape"),
        ({"w_blocks": BLOCKS[..., :8].clone(), "w_scales": SCALES}, "are read: convert the checkpoint to bf16 first"),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        decode_checkpoint(open_checkpoint(write(tmp_path / "bad", **tensors)), torch.bfloat16)


def test_other_bytes_are_no_codes(tmp_path: Path) -> None:
    plain = open_checkpoint(write(tmp_path / "plain", mask=torch.ones(4, dtype=torch.uint8), w_scales=torch.ones(2)))
    assert decode_checkpoint(plain, torch.bfloat16) is plain
