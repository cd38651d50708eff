"""Hooks of mkdocs: pages that lie outside of ``docs/`` are part of the site, and links to them lead there.

On the code host a page links to ``../benchmarks/results/pareto.md``; in the site that page is
``benchmarks/results/pareto.md``, as if ``docs/`` were the root of the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["on_files", "on_page_markdown"]

_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\((?P<up>(?:\.\./)+)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_OUTSIDE = ("benchmarks/results/*", "examples/*", "exporter/demo/text/SOURCES.md", "exporter/demo/model/README.md")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages, tables and pictures that pages of ``docs/`` link to."""
    from mkdocs.structure.files import File, InclusionLevel

    for pattern in _OUTSIDE:
        for path in sorted(_ROOT.glob(pattern)):
            if path.is_file():
                file = File.generated(config, path.relative_to(_ROOT).as_posix(), abs_src_path=str(path))
                file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links out of ``docs/`` into links inside of the site; what the site lacks is named without a link."""
    folder = Path(page.file.src_uri).parent
    depth = len(folder.parts)

    def inside(link: re.Match[str]) -> str:
        n_up, path = link["up"].count("../"), link["path"]
        if depth == 0 and n_up == 1:  # from a page of docs/ to the root of the repository
            return f"]({path}{link['anchor'] or ''})"
        if depth and path.startswith("docs/") and n_up == depth:  # from a page outside to one of docs/
            return f"]({link['up']}{path.removeprefix('docs/')}{link['anchor'] or ''})"
        return link[0]

    return _LINK.sub(inside, markdown)
