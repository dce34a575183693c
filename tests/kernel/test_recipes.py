"""docs/library/recipes.md: each program runs as it stands, and leaves what pyroute2's form does."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/library/recipes.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def recipe(title: str) -> tuple[str, str]:
    """The program of a section, and what it takes in pyroute2."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    ours, theirs = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return ours, theirs


class Place:
    """A namespace, and a directory in which programs run."""

    def __init__(self, host: Any, folder: Path) -> None:
        self.host, self.folder = host, folder

    def command(self, program: str) -> list[str]:
        return ["ip", "netns", "exec", self.host.ns, sys.executable, "-c", program]

    def run(self, program: str, *, warns: bool = False) -> str:
        done = subprocess.run(
            self.command(program), cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert warns or done.stderr == ""
        return done.stdout

    def state(self, device: str) -> dict[str, list[str]]:
        """What ip and bridge show of a device, sorted."""
        host, family = self.host, -4
        shown = {
            "fdb": host.bridge_json(f"fdb show dev {device}"),
            "neigh": host.ip_json(f"{family} neigh show dev {device} nud permanent"),
            "route": host.ip_json(f"{family} route show dev {device}"),
            "address": [
                [a["local"] for a in link["addr_info"] if a["family"] == "inet"]
                for link in host.ip_json(f"address show {device}")
            ],
        }
        return {what: sorted(map(str, found)) for what, found in shown.items()}

    def add_vxlan(self, device: str = "vxlan0") -> None:
        """What the page says that there is: the block of commands about a device."""
        blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        (block,) = (one for one in blocks if f"add {device} " in one)
        for line in block.splitlines():
            program, _, words = line.replace("192.0.2.1 ", f"{self.host.ipv4} ").partition(" ")
            getattr(self.host, program)(words)


@pytest.fixture
def place(host: Any, tmp_path: Path) -> Place:
    return Place(host, tmp_path)


def test_hub_of_static_tunnels(place: Place) -> None:
    ours, theirs = recipe("Hub of static tunnels")
    place.host.ip("address replace 192.0.2.1/24 dev eth0")

    assert "6 entries changed" in place.run(ours)
    made = place.state("hub0")
    assert "0 entries changed" in place.run(ours)
    place.host.ip("link delete hub0")
    place.run(theirs, warns=True)

    assert (len(made["fdb"]), len(made["neigh"]), len(made["route"])) == (2, 2, 2)
    assert made == place.state("hub0")


def test_sync_from_a_sql_table(place: Place) -> None:
    ours, theirs = recipe("Sync from a SQL table")
    place.add_vxlan()
    with sqlite3.connect(place.folder / "peers.db") as db:
        db.execute("CREATE TABLE peers (mac TEXT, vtep TEXT)")
        rows = [(f"02:00:00:00:00:0{n}", f"192.0.2.{n}") for n in (7, 8)]
        db.executemany("INSERT INTO peers VALUES (?, ?)", rows)
    stale = "fdb add 02:00:00:00:00:99 dev vxlan0 dst 192.0.2.99"
    place.host.bridge(stale)

    assert "2 added  0 replaced  1 removed" in place.run(ours)
    made = place.state("vxlan0")
    assert "0 added  0 replaced  0 removed  2 unchanged" in place.run(ours)
    place.host.bridge("fdb del 02:00:00:00:00:07 dev vxlan0")
    place.host.bridge(stale)
    place.run(theirs, warns=True)

    assert made == place.state("vxlan0")


def test_evpn_like_agent(place: Place) -> None:
    ours, theirs = recipe("EVPN-like agent")
    place.add_vxlan()
    place.host.bridge("fdb append 00:00:00:00:00:00 dev vxlan0 dst 192.0.2.77")  # another program's

    place.run(ours)
    made = place.state("vxlan0")
    place.host.bridge("fdb flush dev vxlan0")
    place.host.bridge("fdb append 00:00:00:00:00:00 dev vxlan0 dst 192.0.2.77")
    place.run(theirs, warns=True)

    assert len(made["fdb"]) == 4
    assert made == place.state("vxlan0")


def test_one_vxlan_device_with_1000_vnis(place: Place) -> None:
    ours, theirs = recipe("One vxlan device with 1,000 VNIs")
    place.add_vxlan("vxlan1k")

    assert "2000 added" in place.run(ours)
    made = place.state("vxlan1k")
    assert "2000 unchanged" in place.run(ours)
    place.host.bridge("fdb flush dev vxlan1k")
    place.run(theirs.replace("2000", "1010"), warns=True)  # ten VNIs say as much, in less time

    assert len(made["fdb"]) == 2000
    few = place.state("vxlan1k")["fdb"]
    assert few == [one for one in made["fdb"] if "'src_vni': 100" in one]


def test_an_asyncio_controller(place: Place, wait_until: Callable[..., None]) -> None:
    ours, theirs = recipe("An asyncio controller")
    place.add_vxlan()
    path = place.folder / "controller.sock"

    def macs() -> set[str]:
        return {entry["mac"] for entry in place.host.bridge_json("fdb show dev vxlan0")}

    with subprocess.Popen(
        place.command(ours), cwd=place.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(path.exists)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                replies = client.makefile()

                def tell(line: str) -> str:
                    client.sendall(f"{line}\n".encode())
                    return replies.readline().strip()

                assert tell("put 02:00:00:00:00:07 192.0.2.7") == "ok"
                assert "endpoint is not an IP address: 'x'" in tell("put 02:00:00:00:00:08 x")
                assert tell("put 02:00:00:00:00:09 192.0.2.9") == "ok"
                assert tell("remove 02:00:00:00:00:09") == "ok"
                made = place.state("vxlan0")
                place.host.bridge("fdb del 02:00:00:00:00:07 dev vxlan0")
                wait_until(lambda: macs() == {"02:00:00:00:00:07"})
                assert tell("stop") == "ok"
            assert process.stdout is not None
            assert "deleted, repaired: fdb 02:00:00:00:00:07" in process.stdout.read()
            assert process.wait(60) == 0
        finally:
            process.kill()
    place.host.bridge("fdb del 02:00:00:00:00:07 dev vxlan0")
    place.run(theirs, warns=True)
    assert made == place.state("vxlan0")


def test_an_agent_in_a_namespace(place: Place) -> None:
    ours, theirs = recipe("Test an agent in a namespace")
    file = place.folder / "test_agent.py"
    file.write_text(ours)
    command = [
        "unshare",
        "--map-root-user",
        "--net",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        file.name,
    ]

    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=place.folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )

    assert "1 passed" in done.stdout, done.stdout + done.stderr
    place.add_vxlan()
    place.host.bridge("fdb add 02:00:00:00:00:07 dev vxlan0 dst 192.0.2.7")
    place.run(theirs, warns=True)


@pytest.mark.parametrize("page", ["tables", "keeping", "sources"])
def test_the_snippets_of_a_page_run(place: Place, page: str) -> None:
    text = (ROOT / f"docs/library/{page}.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    place.add_vxlan()

    place.run(program, warns=True)


def test_every_recipe_is_run() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)

    assert [
        title for title in titles if f'recipe("{title}")' not in Path(__file__).read_text()
    ] == []
