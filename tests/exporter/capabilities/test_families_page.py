"""docs/families.md is what the families' descriptions and the capability table say."""

from __future__ import annotations

from pathlib import Path

from compressors.model.families.registry import supported_families
from docs.families_page import families_page

_PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_the_committed_page_is_what_is_generated() -> None:
    assert _PAGE.read_text(encoding="utf-8") == families_page(), (
        "the code says something else: python -m docs.families_page > docs/families.md"
    )


def test_every_family_has_a_section() -> None:
    page = families_page()
    for family in supported_families().values():
        assert f"| `model_type` | `{family.model_type}`, {family.architecture} |" in page
