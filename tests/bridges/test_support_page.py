"""`bridges/SUPPORT.md` names every family, and its figures, which are of another run, are within what it allows."""

from tests.bridges.layout_tables import KINDS
from tests.bridges.support import EXACT, GRADIENT_TOLERANCE, PAGE, read_page
from tests.bridges.support_families import FAMILIES

from weightcast.bridges.models.registry import BUILT_IN


def test_every_family_of_the_registry_has_a_row() -> None:
    assert [row.title for row in read_page(PAGE.read_text())] == [family.title for family in FAMILIES.values()]
    assert {bridge.family for bridge in BUILT_IN} <= {family.bridge for family in FAMILIES.values()}


def test_the_figures_are_within_the_limits() -> None:
    for row, family in zip(read_page(PAGE.read_text()), FAMILIES.values(), strict=True):
        assert 0 < row.logits <= family.tolerance, row
        assert 0 < row.gradients <= GRADIENT_TOLERANCE, row
        layouts = KINDS[family.kind]
        cells = len(family.models) * len(layouts[4]) + len(layouts[8])
        assert row.round_trip == f"{EXACT}, {cells} of {cells}"
        assert row.layouts == f"{family.kind}, {len(layouts[4]) + len(layouts[8])}"


def test_every_layout_is_named() -> None:
    page = PAGE.read_text()
    for layouts in KINDS.values():
        assert all(f"`{name}`" in page for by_name in layouts.values() for name in by_name)
