"""README, docs and changelog name what exists, and list all of it where they say so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exporter.stages.table import ALL_STAGES

_REPOSITORY = Path(__file__).parent.parent
_PACKAGES = ("compressors", "validate", "exporter")
_FOLDERS = {*_PACKAGES, "tests", "benchmarks", "docs"}
_PAGES = [_REPOSITORY / "README.md", _REPOSITORY / "CHANGELOG.md", *sorted((_REPOSITORY / "docs").rglob("*.md"))]
_GUIDE = _REPOSITORY / "docs" / "development.md"


def _guide() -> str:
    return _GUIDE.read_text(encoding="utf-8")


def _section(title: str) -> str:
    _, found, rest = _guide().partition(f"\n## {title}\n")
    assert found, title
    return rest.partition("\n## ")[0]


def _first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path for path in re.findall(r"[\w./-]+/[\w./-]*\w/?", text) if path.split("/")[0] in _FOLDERS}
    assert [path for path in sorted(named) if not (_REPOSITORY / path).exists()] == []
    if page == _GUIDE:
        assert len(named) > 60


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), target
            assert not anchor or anchor in _anchors(linked), target


def _targets_named_in(page: Path) -> set[str]:
    named = re.findall(r"^    make ([\w-]+)|`make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {first or second for first, second in named}


def _targets() -> set[str]:
    makefile = (_REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_target_of_make_that_a_page_names_exists(page: Path) -> None:
    assert _targets_named_in(page) <= _targets()


def test_the_guide_lists_all_targets_of_make() -> None:
    assert _targets_named_in(_GUIDE) == _targets()


def test_the_quick_tests_are_there() -> None:
    makefile = (_REPOSITORY / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (words,) = re.findall(r"^QUICK := (.*)$", makefile, re.MULTILINE)
    with_prefixes = re.sub(
        r"\$\(addprefix ([^,]+),([^)]*)\)", lambda found: " ".join(found[1] + name for name in found[2].split()), words
    )
    paths = with_prefixes.split()
    assert len(paths) > 10
    assert [path for path in paths if not (_REPOSITORY / path).exists()] == []


def test_the_guide_answers_a_newcomer_s_questions() -> None:
    rows = [line for line in _section("Where is ...?").splitlines() if line.startswith("| ") and "?" in line]
    assert len(rows) >= 12
    assert all(re.search(r"\| .*`[\w./]+\.(py|md)`", row) for row in rows)


def test_every_function_that_the_guide_s_answers_name_is_in_the_file() -> None:
    answers = re.findall(r"`([\w./]+\.py)`, `(\w+)`", _section("Where is ...?"))
    assert answers
    for path, name in answers:
        assert f"def {name}(" in (_REPOSITORY / path).read_text(encoding="utf-8")


def _sub_packages(package: str) -> set[str]:
    return {str(folder.parent.relative_to(_REPOSITORY)) for folder in (_REPOSITORY / package).glob("*/__init__.py")}


def test_the_guide_lists_all_sub_packages() -> None:
    listed = _first_column(_section("Where things are").partition("Inside these:")[2])
    existing = {f"{folder}/" for package in _PACKAGES for folder in _sub_packages(package)}
    assert sorted(listed) == sorted({*existing, "exporter/demo/"})


def test_the_guide_names_all_rooms_of_the_ground_floor() -> None:
    (row,) = re.findall(r"^\| `compressors/model/` \| `description/`.*", _guide(), re.MULTILINE)
    rooms = {Path(folder).name for folder in _sub_packages("compressors/model")}
    assert {name.strip("/") for name in re.findall(r"`(\w+/)`", row)} == rooms


def test_the_guide_lists_all_stages_in_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", _section("How a run is laid out"), re.MULTILINE)
    assert rows == [(stage.name, stage.what) for stage in ALL_STAGES]
