"""docs/screens: what the command shows on terminals of 80 and 140 columns, kept as text.

``make screens`` writes the files anew, and the blocks of the pages that show them: those below a
line ``<!-- screen: NAME COMMAND -->``, the command first. tests/lib/scenes.py has the cluster.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lib import programs, scenes
from tests.lib.terminals import Session

DOCS = Path(__file__).resolve().parents[2] / "docs"
SCREENS = DOCS / "screens"
WIDTHS = (80, 140)

#: Lines of a terminal: of one on which all has room, and of a full screen.
ALL, FULL = 90, 24

#: What a full screen shows once it has drawn all that its scene has.
DRAWN = {
    "show --watch": "0.5 events/s, 0.1 repaired/s; 5 events, 1 repaired in all",
    "stats --watch": "1-10 of 10",
}

BLOCK = re.compile(r"(<!-- screen: (\S+) (.+) -->\n```\n)((?:(?!```).*\n)*)(```\n)")


@pytest.fixture
def write(request: pytest.FixtureRequest) -> bool:
    """Whether files are to be written instead of compared."""
    return bool(request.config.getoption("--write-screens"))


@pytest.fixture
def node(host: Any, tmp_path: Path) -> Any:
    """Node 1 of the cluster of the scenes, with its files."""
    host.sysctl("ipv4/ip_forward", 1)
    host.sysctl("ipv6/conf/all/forwarding", 1)
    for family, network in ((4, "198.51.100.0/24"), (6, "2001:db8:1::/64")):
        host.ip(f"-{family} route add {network} via {scenes.endpoint(254, family)} onlink dev eth0")
    (tmp_path / "net-conf.json").write_text(scenes.net_conf())
    (tmp_path / "nodes.json").write_text(scenes.nodes(1, 2, 3, 4, node99=3))
    return host


def compare(name: str, width: int, shown: list[str], *, write: bool) -> None:
    path = SCREENS / f"{name.replace(' --', '-')}-{width}.txt"
    text = "".join(f"{line}\n" for line in shown)
    if write:
        path.write_text(text)
    assert shown == path.read_text().splitlines(), f"{path} is old: run 'make screens'"


def shown_by(command: list[str], width: int, **how: Any) -> list[str]:
    words = [sys.executable, "-m", *command]
    with Session(programs.Popen, words, columns=width, lines=ALL, **how) as session:
        session.wait()
        shown = "".join(f"{line}\n" for line in session.shown())
    # The table of neighbours is the machine's, and other tests may have filled it.
    return re.sub(
        r"^warnings:\n  [^\n]*gc_thresh3.*\n(  .*\n)*", "", shown, flags=re.M
    ).splitlines()


def test_the_command_on_a_node(node: Any, tmp_path: Path, write: bool) -> None:
    files = ["--leases", "nodes.json", "--net-conf", "net-conf.json"]
    where = ["--netns", node.ns, "--iface", "eth0", "--node-name", "node1", "--firewall", "none"]

    def run(name: str, *words: str) -> None:
        for width in WIDTHS:
            command = ["flannel_dp", *words, *files, *where]
            compare(name, width, shown_by(command, width, cwd=tmp_path), write=write)

    run("plan", "plan")
    shown_by(["flannel_dp", "sync", *files, *where], 80, cwd=tmp_path)
    node.bridge(f"fdb del {scenes.mac(4)} dev flannel.1")
    node.ip(f"-6 route replace {scenes.subnet(3, 6)} via {scenes.endpoint(3, 6)} dev eth0 onlink")
    run("show", "show")
    run("explain", "explain", "10.244.4.7")


@pytest.mark.parametrize("name", scenes.SCENES)
def test_scenes(name: str, write: bool) -> None:
    for width in WIDTHS:
        command = ["tests.lib.scenes", name]
        if name not in DRAWN:
            compare(name, width, shown_by(command, width), write=write)
            continue
        words = [sys.executable, "-m", *command]
        with Session(programs.Popen, words, columns=width, lines=FULL) as session:
            session.until(lambda: any(DRAWN[name] in line for line in session.shown()))
            compare(name, width, session.shown(), write=write)
            session.type("q")
            assert session.wait() == 0


def block(found: re.Match[str]) -> str:
    """What a block should be."""
    return f"{found[1]}$ {found[3]}\n{(SCREENS / f'{found[2]}.txt').read_text()}{found[5]}"


def test_pages_show_screens_as_they_are(write: bool) -> None:
    """Comes after the tests above: what they have written is what pages show."""
    seen = set()
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text()
        seen |= {found[2] for found in BLOCK.finditer(before)}
        after = BLOCK.sub(block, before)
        if write and after != before:
            page.write_text(after)
        assert page.read_text() == after, f"{page} is old: run 'make screens'"

    assert {path.stem for path in SCREENS.glob("*-80.txt")} <= seen
