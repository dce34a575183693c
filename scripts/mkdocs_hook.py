"""A hook of mkdocs: pages from outside of docs/, and links to them.

README.md is the site's first page; packaging/README.md and CHANGELOG.md are pages, too. A link to
any other file outside of docs/ is its name alone: the site has no source text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

#: The pages by their place in the repository, and their place in the site.
PAGES = {
    "README.md": "index.md",
    "packaging/README.md": "packaging.md",
    "CHANGELOG.md": "changelog.md",
}

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links lead to where the site has the page."""
    place = page.file.src_uri
    source = next((one for one, other in PAGES.items() if other == place), f"docs/{place}")
    return relinked(markdown, source, place)


def relinked(markdown: str, source: str, place: str) -> str:
    """Return the text of the file ``source`` for its place in the site."""

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target or ":" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            path = PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        else:
            return text if text == path or "`" in text else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(path, posixpath.dirname(place) or '.')}{anchor})"

    return _LINK.sub(link, markdown)
