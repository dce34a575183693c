"""The pages for people: the files that they name exist."""

from __future__ import annotations

import ast
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import click
import pytest

import flannel_dp
from flannel_dp.command.cli import command
from flannel_dp.command.spelling import normalise

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "bench/README.md", *(ROOT / "docs").rglob("*.md")])

#: A path to a file of source, or a link to a file: those are what moves.
_PATH = re.compile(r"[\w./-]*\w\.(?:py|c|h|pyx|pxi|md)\b")

#: Files of the Linux kernel, and of a reader of the recipes.
_ELSEWHERE = {"net/ipv4/fib_semantics.c", "rtnetlink.h", "test_agent.py"}


def named(text: str) -> set[str]:
    """The paths in a page; web addresses are left out."""
    text = re.sub(r"https?://\S+", "", text)
    return {path for path in _PATH.findall(text) if not path.startswith(("/", "_", "-"))}


def exists(path: str, page: Path) -> bool:
    """Whether a page's path leads to a file, from the page, the root, or inside of a package."""
    if any((base / path).exists() for base in (page.parent, ROOT)):
        return True
    return any(found.match(path) for found in _sources())


@cache
def _sources() -> list[Path]:
    return [
        path
        for folder in ("flannel_dp", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c", ".h", ".pyx", ".pxi")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    paths = named(page.read_text()) - _ELSEWHERE

    assert [path for path in sorted(paths) if not exists(path, page)] == []


def test_a_page_that_names_a_file_that_moved_is_found() -> None:
    text = (
        "`kernel/devices.py`, csrc/table.c, [page](../docs/scaling.md), https://a.org/kernel/b.py"
    )

    found = named(text)

    assert found == {"kernel/devices.py", "csrc/table.c", "../docs/scaling.md"}
    assert not exists("kernel/devices.py", ROOT / "README.md")
    assert exists("csrc/table.c", ROOT / "README.md")
    assert exists("peers/layouts.py", ROOT / "README.md")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {path for path in named((ROOT / "README.md").read_text()) if path.startswith("docs/")}

    found = {str(page.relative_to(ROOT)) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    library = ROOT / "docs/library"  # its own index lists the rest
    inside = {f"docs/library/{path}" for path in named((library / "index.md").read_text())}
    assert found == linked | {path for path in inside if path in found}
    assert {path for path in linked if path.startswith("docs/library/")} == {
        "docs/library/index.md"
    }


#: Links to a section: [text](page#section), where page may be missing.
_LINK = re.compile(r"\]\(([\w./-]*\.md)?#([\w-]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sections_that_a_page_links_to_exist(page: Path) -> None:
    for other, section in _LINK.findall(page.read_text()):
        text = (page.parent / other).read_text() if other else page.read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert section in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in titles}


#: What a page names as a section of another: "Going back" in [operations](operations.md).
_QUOTED = re.compile(r'"([^"\n]+)"(?:,?) in\s\[[^\]]*\]\(([\w./-]*\.md)\)')


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sections_that_a_page_quotes_exist(page: Path) -> None:
    for title, other in _QUOTED.findall(page.read_text()):
        assert f"# {title}\n" in (page.parent / other).read_text() or title == "In Prometheus"


def test_architecture_lists_all_packages() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    table = text[text.index("## The packages") : text.index("Each imports only")]
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))

    package = ROOT / "flannel_dp"
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    lowest = {"backoff", "deprecation", "errors", "later", "threads", "wording"}
    modules = {path.stem for path in package.glob("[a-z]*.py")} - lowest
    assert sorted(listed) == sorted(folders | modules)


def test_architecture_lists_all_resources() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    (row,) = re.findall(r"^\| `resources` \| (.*?) \|", text, re.MULTILINE)

    package = ROOT / "flannel_dp/resources"
    found = {path.stem for path in package.iterdir() if not path.name.startswith("_")}
    assert set(re.findall(r"`(\w+)`", row)) == found


def commands(text: str) -> list[str]:
    """The ``flannel-dp`` command lines in a page: lines of code blocks, and code in sentences."""
    joined = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```|^( {4,}\S.*\n)", joined, re.MULTILINE | re.DOTALL)
    lines = [line for pair in blocks for part in pair for line in part.splitlines()]
    code = [line for line in lines if re.match(r"\s*(# )?flannel-dp (?!\d|.*flannel-dp)", line)]
    code += re.findall(r"`(flannel-dp [^`]*)`", re.sub(r"\s+", " ", joined))
    code = [line.strip().removeprefix("# ") for line in code]  # a prompt of root
    return [re.split(r"\s#|\s>|\s\|", line)[0].replace("...", "").strip() for line in code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_accepted(page: Path) -> None:
    known = command.commands
    for line in commands(page.read_text()):
        words = normalise(shlex.split(line)[1:], (command, *known.values()))
        if words and words[0] in known and "COMMAND" not in words:
            words += ["10.244.2.7"] if words == ["explain"] else []
            known[words[0]].make_context(words[0], words[1:])
        else:
            assert not words or words[0] in ("--help", "--version", "COMMAND"), line


def test_a_command_of_a_page_that_is_not_accepted_is_found() -> None:
    page = "```\nflannel-dp sync --leases a \\\n    --no-such # why\n```\nand `flannel-dp\nplan`"
    shell = "```\n# flannel-dp --version\nflannel-dp 0.1.0\n```\n"

    assert commands(page) == ["flannel-dp sync --leases a      --no-such", "flannel-dp plan"]
    assert commands(shell) == ["flannel-dp --version"]
    with pytest.raises(click.UsageError):
        command.commands["sync"].make_context("sync", ["--no-such"])


#: Words that operators do not search for.
_WORDS = re.compile(
    r"\b(some|no)body\b|\bwhoever\b|\bbeliev|\bcannot be had\b|\bmade anew\b|\bstands? still\b"
    r"|\bthe own (lease|subnet)\b|\brefuses? (a|the) lease|\bout of line\b|\bplace is taken\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_it_in_the_words_of_its_field(page: Path) -> None:
    assert [found[0] for found in _WORDS.finditer(page.read_text())] == []


@pytest.mark.parametrize("page", sorted((ROOT / "packaging/man").glob("*.1")), ids=lambda p: p.name)
def test_help_says_it_in_the_words_of_its_field(page: Path) -> None:
    """The manual pages have all texts of --help."""
    assert [found[0] for found in _WORDS.finditer(page.read_text())] == []


#: Messages that docs/troubleshooting.md quotes, as the code has them.
MESSAGES = [
    "is not on-link",
    "conflicts with an existing",
    "events were lost",
    "is not installed",
    "nothing to do",
    "another node has taken",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_troubleshooting_quotes_are_those_of_the_code(message: str) -> None:
    page = re.sub(r"\s+", " ", (ROOT / "docs/troubleshooting.md").read_text())
    code = [path.read_text() for path in (ROOT / "flannel_dp").rglob("*.py")]

    assert message in page
    assert any(message in text for text in code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_uses_public_names(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and node.module == "flannel_dp":
                assert {one.name for one in node.names} <= {*flannel_dp.__all__}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_uses_public_names(example: Path) -> None:
    for node in ast.walk(ast.parse(example.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flannel_dp"):
            assert node.module == "flannel_dp"
            assert {one.name for one in node.names} <= {*flannel_dp.__all__}
