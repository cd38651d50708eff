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


def test_the_page_on_clients_names_all_families_with_recurrent_states() -> None:
    sections = families_page().split("\n## ")
    having = [section.partition("\n")[0] for section in sections if "no, it has recurrent states" in section]
    text = (Path(__file__).parents[3] / "docs" / "clients.md").read_text(encoding="utf-8")
    named = text.partition("with recurrent layers:\n")[2].partition(". onnxruntime")[0].replace(" and ", ", ")
    assert named.split(", ") == [name.partition(" and ")[0] for name in having]
