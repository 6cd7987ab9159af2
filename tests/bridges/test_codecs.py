"""FP8 checkpoints with a factor for each block: any box of a matrix decodes to the same weights as the whole matrix."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from weightcast.bridges.codecs import decode_checkpoint
from weightcast.bridges.codecs_fp8 import BLOCK, CODES, decode, encode, scale_region, scale_shape
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import CheckpointMismatch
from weightcast.sync.regions import Region

ROWS, COLUMNS = 300, 200


def random_weights() -> torch.Tensor:
    """Blocks whose factors differ a lot, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(ROWS, COLUMNS, generator=generator)
    row_blocks, column_blocks = torch.arange(ROWS) // BLOCK, torch.arange(COLUMNS) // BLOCK
    return weights * 10.0 ** (row_blocks[:, None] - 2 * column_blocks[None, :])


CODED, SCALES = encode(random_weights())


def decode_by_hand(row: int, column: int) -> float:
    return float(CODED[row, column].float() * SCALES[row // BLOCK, column // BLOCK])


def test_a_whole_matrix_is_code_times_factor() -> None:
    weights = decode(CODED, SCALES, (0, 0), torch.float32)
    places = [(0, 0), (127, 127), (128, 127), (127, 128), (255, 199), (256, 0), (299, 199)]
    assert [float(weights[place]) for place in places] == [decode_by_hand(*place) for place in places]


@settings(max_examples=200, deadline=None)
@given(rows=st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)), columns=st.tuples(*[st.integers(0, COLUMNS)] * 2))
def test_a_box_decodes_to_its_part_of_the_matrix(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    (top, bottom), (left, right) = sorted(rows), sorted(columns)
    if top == bottom or left == right:
        return
    region = Region("w", (top, left), (bottom - top, right - left))
    factors = SCALES[scale_region(region).slices]
    whole = decode(CODED, SCALES, (0, 0), torch.bfloat16)
    assert torch.equal(decode(CODED[region.slices], factors, region.offset, torch.bfloat16), whole[region.slices])


def test_a_box_needs_the_factors_of_the_blocks_that_it_touches() -> None:
    assert scale_region(Region("w", (127, 0), (2, 128))) == Region("w_scale_inv", (0, 0), (2, 1))
    assert scale_region(Region("w", (128, 130), (100, 1))) == Region("w_scale_inv", (1, 1), (1, 1))


def test_encoding_keeps_the_largest_entry_and_what_fp8_can_hold_of_the_others() -> None:
    weights = random_weights()
    back = decode(*encode(weights), (0, 0), torch.float32)
    assert (back - weights).abs().max() / weights.abs().max() <= 2**-4  # three bits of mantissa, rounded
    assert torch.allclose(back.abs().max(), weights.abs().max(), rtol=1e-6)
    assert torch.equal(decode(*encode(torch.zeros(3, 200)), (0, 0), torch.float32), torch.zeros(3, 200))


def write(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_checkpoint_of_codes_reads_as_one_of_weights(tmp_path: Path) -> None:
    norm = torch.ones(7, dtype=torch.bfloat16)
    folder = write(tmp_path / "coded", a__weight=CODED, a__weight_scale_inv=SCALES, norm__weight=norm)
    checkpoint = decode_checkpoint(open_checkpoint(folder), torch.bfloat16)
    kinds = {spec.name: (spec.dtype, spec.shape) for spec in checkpoint.specs}
    assert kinds == {"a.weight": (torch.bfloat16, (ROWS, COLUMNS)), "norm.weight": (torch.bfloat16, (7,))}
    region = Region("a.weight", (120, 3), (20, 130))
    with checkpoint.reader() as reader:
        part = reader.read(region)
        assert reader.num_bytes == 20 * 130 + 4 * 2 * 2
        assert torch.equal(reader.read(Region("norm.weight", (0,), (7,))), norm)
    assert torch.equal(part, decode(CODED, SCALES, (0, 0), torch.bfloat16)[region.slices])


def test_a_checkpoint_without_codes_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "plain", a__weight=torch.ones(2, 2)))
    assert decode_checkpoint(checkpoint, torch.bfloat16) is checkpoint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a__weight": CODED}, "no factors a.weight_scale_inv"),
        ({"a__weight_scale_inv": SCALES}, "factors of no tensor"),
        ({"a__weight": CODED, "a__weight_scale_inv": SCALES[:1].clone()}, "factors of shape"),
        ({"a__weight": CODED.float(), "a__weight_scale_inv": SCALES}, "factors of shape"),
    ],
)
def test_codes_and_factors_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        decode_checkpoint(open_checkpoint(write(tmp_path / "bad", **tensors)), torch.bfloat16)


def test_shapes_of_factors() -> None:
    assert scale_shape((ROWS, COLUMNS)) == tuple(SCALES.shape) == (3, 2)
    assert CODED.dtype == CODES
