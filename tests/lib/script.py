"""Tests that are written as text, so that they can be read, and written, without Python.

A file holds scripts one after the other. Each begins with a title that says what it shows, and
may have words below it that say more. Then come sections, as in a txtar archive; what they mean is
said at the top of the file, and in the test module that runs them::

    === A failure stops what depends on it, and nothing else

    -- before --
    peers  a  1

    -- after --
    peers  a  2

Blank lines, and lines that begin with "#", say nothing to the test. A section that holds nothing
but the word "nothing" is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Section:
    name: str
    lines: list[str] = field(default_factory=list)

    def table(self) -> list[dict[str, str]]:
        """The rows of a table: its first line names the columns, which are two spaces apart, and
        every row has its words below those names."""
        head, *rows = self.lines
        starts = [match.start() for match in re.finditer(r"(?:^|(?<=  ))\S", head)]
        ends = [*starts[1:], None]
        names = [head[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        for row in rows:
            for start in starts[1:]:
                assert row[start - 1 : start].strip() == "", f"not below its column: {row!r}"
        return [
            {
                name: row[start:end].strip()
                for name, start, end in zip(names, starts, ends, strict=True)
            }
            for row in rows
        ]


@dataclass
class Script:
    """``sections`` are in the order in which they are written; a name may come twice."""

    title: str
    origin: str
    sections: list[Section] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [section.name for section in self.sections]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Section:
        """The only section of this name."""
        (found,) = [section for section in self.sections if section.name == name]
        return found

    def lines(self, name: str) -> list[str]:
        """The lines of a section, none where it is left out."""
        return self[name].lines if name in self else []

    def check_names(self, *known: str) -> None:
        """Fail for a section that no test reads, such as one whose name is misspelt."""
        assert {*self.names} <= {*known}, f"{self.origin}: unknown sections: {self.names}"


def load(path: Path) -> list[Script]:
    """The scripts of a file. What stands before the first title explains the file."""
    scripts: list[Script] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if title := re.fullmatch(r"=== (.+)", line):
            scripts.append(Script(title[1], f"{path.name}:{number}"))
        elif not scripts or not line.strip() or line.startswith("#"):
            continue
        elif name := re.fullmatch(r"-- (.+) --", line):
            scripts[-1].sections.append(Section(name[1]))
        elif scripts[-1].sections:
            scripts[-1].sections[-1].lines.append(line.rstrip())
    for script in scripts:
        assert script.sections, f"{script.origin}: no sections"
        for section in script.sections:
            assert section.lines, f"{script.origin}: section {section.name} is empty"
            if section.lines == ["nothing"]:
                section.lines = []
    assert len({script.title for script in scripts}) == len(scripts), f"{path}: a title comes twice"
    return scripts


def each_script(path: Path) -> pytest.MarkDecorator:
    """Run a test with each script of a file, its parameter ``script``."""
    return pytest.mark.parametrize("script", load(path), ids=_name)


def _name(script: Script) -> str:
    return re.sub(r"\W+", "-", script.title.lower()).strip("-")
