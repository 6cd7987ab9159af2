"""The support page, `bridges/SUPPORT.md`: written from the readings of one test run, and read back by a fast check.

`WEIGHTCAST_SUPPORT_PAGE=1 pytest -m long tests/bridges/test_layouts.py` takes the readings and writes the page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bridges.layout_tables import KINDS
from tests.bridges.support_families import FAMILIES, Family
from tests.bridges.support_job import Reading

PAGE = Path(__file__).parents[2] / "bridges" / "SUPPORT.md"
GRADIENT_TOLERANCE = 1e-4
EXACT = "bit-exact"
_HEAD = """# What was compared with transformers

Written by one test run (`make test-all`; how to write it anew says `tests/bridges/support.py`): random small models
with every feature on, in fp32 on a CPU, in four and in eight gloo processes, with megatron-core's layers that need no
GPU, against `transformers`.

- **logits**: the largest difference in any layout; allowed are 1e-5, with experts or latent attention 2e-5.
- **gradients**: the largest difference of the loss, and of a gradient in relation to the largest of its tensor, in the
  layouts with *; allowed is 1e-4.
- **round trip**: import into a model full of NaN, then the regions that are streamed, the export to full tensors and
  the saved folder, all against the file; how many pairs of model and layout came out with every bit.

| family | logits, at most | gradients, at most | round trip | layouts |
|---|---|---|---|---|
"""
_TAIL = """
## Layouts

What a layout leaves over of the processes is data parallelism; sp is sequence parallelism, "first1" one layer on the
first pipeline stage, "E|tt|tt|L" Megatron's list of stages, in which embedding (E) and loss (L) may stand alone, and
"E-and-L-counted" the other way to say so; prediction layers (m), one or two, are on the stage of the loss. The
vocabulary (131) divides by no tensor parallel size, and models with one key-value head are cut by TP too.

{layouts}

Eight processes run the first model of a family, four run all.

## Tables only

With Transformer Engine nothing has run here. That each family's table maps the names and shapes that its layers have
in Megatron's checkpoints, grouped experts included, is a test (`tests/bridges/test_layouts_names.py`).
"""


@dataclass(frozen=True)
class Row:
    """A row of the page, read back."""

    title: str
    logits: float
    gradients: float
    round_trip: str
    layouts: str


def support_page(readings: Sequence[Reading]) -> str:
    """The page for the readings of a whole run."""
    by_model: dict[str, list[Reading]] = {}
    for reading in readings:
        by_model.setdefault(reading.model, []).append(reading)
    rows = [_row(family, [r for name in family.models for r in by_model[name]]) for family in FAMILIES.values()]
    layouts = [f"- **{kind}**: {_layout_names(layouts, readings)}" for kind, layouts in KINDS.items()]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL.format(layouts="\n".join(layouts))


def _row(family: Family, readings: Sequence[Reading]) -> str:
    gradients = max(reading.gradients for reading in readings if reading.gradients is not None)
    unchanged = sum(reading.num_changed == 0 for reading in readings)
    exact = f"{EXACT}, {unchanged} of {len(readings)}"
    num_layouts = len({reading.layout for reading in readings})
    logits = max(reading.logits for reading in readings)
    return f"| {family.title} | {logits:.1e} | {gradients:.1e} | {exact} | {family.kind}, {num_layouts} |"


def _layout_names(layouts: Mapping[int, Mapping[str, object]], readings: Sequence[Reading]) -> str:
    with_gradients = {reading.layout for reading in readings if reading.gradients is not None}
    sets = [
        ", ".join(f"`{name}`{'*' if name in with_gradients else ''}" for name in names) for names in layouts.values()
    ]
    return "; in eight processes ".join(sets)


def read_page(page: str) -> list[Row]:
    """The rows of a page."""
    lines = [line for line in page.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [Row(row[0], float(row[1]), float(row[2]), row[3], row[4]) for row in cells]
