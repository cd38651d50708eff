"""Makes docs/licences.md from the metadata of the installed packages that moe-export needs.

python -m docs.licences_page > docs/licences.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

__all__ = ["licences_page"]

_HEAD = """\
# Licences of what is installed with it

moe-export is under Apache-2.0. On Linux with Python 3.11, `pip install "moe-export[cpu]"` also installs the packages
below; nothing of them is part of our files. The licences are those that the packages name in their metadata. This page
is made by `python -m docs.licences_page > docs/licences.md`.

| package | licence |
|---|---|
"""
_EXTRA = "cpu"
_IN_CLASSIFIERS = "License :: "
_LONGEST = 60  # some packages put the whole text of their licence there


def licences_page() -> str:
    """The page."""
    found = _needed("moe-export", _EXTRA, {})
    del found["moe-export"]
    rows = sorted((name.lower(), f"| {name} | {_licence(package)} |\n") for name, package in found.items())
    return _HEAD + "".join(row for _, row in rows)


def _needed(name: str, extra: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """The packages that one needs, with their own needs; those that its extras or other systems need are left out."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return found
    name = _normal(package.metadata["Name"])
    if name in found:
        return found
    found[name] = package
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for further in requirement.extras or {""}:
                _needed(requirement.name, further, found)
    return found


def _licence(package: Distribution) -> str:
    """The licence in a few words: an SPDX expression, the classifiers, or the field."""
    metadata = package.metadata
    named = metadata.get("License-Expression") or ", ".join(_classified(package))
    field = (metadata.get("License") or "").strip()
    short = field if len(field) <= _LONGEST and "\n" not in field else ""
    return (named or short or "not named in its metadata").replace("|", "/")


def _classified(package: Distribution) -> Iterator[str]:
    for classifier in package.metadata.get_all("Classifier") or ():
        if classifier.startswith(_IN_CLASSIFIERS):
            name = classifier.rpartition(" :: ")[2]
            if name != "OSI Approved":
                yield name


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.stdout.write(licences_page())
