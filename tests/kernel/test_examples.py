"""The programs in examples/, run as their users would run them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import KernelError, StatusBoard
from flannel_dp.agent.problems import Problems
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import lease_of, peers, plane
from tests.lib.planes import sent
from tests.lib.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
MACS = {"02:00:00:00:00:07": 7, "02:00:00:00:00:08": 8}


def example(name: str, *args: str) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / name), *args]


def fdb(host: Any, device: str) -> dict[str, str]:
    """The device's FDB as {MAC: endpoint}."""
    return {entry["mac"]: entry["dst"] for entry in host.bridge_json(f"fdb show dev {device}")}


# ---- a plain map in an FDB ----------------------------------------------------------


@pytest.fixture
def vxlan_host(host: Any, family: int) -> Any:
    """A host with a vxlan device of its own making, over ``family``."""
    local = host.underlay(family)
    host.ip(f"link add vxlan0 type vxlan id 42 local {local} dev eth0 dstport 4789 nolearning")
    host.ip("link set vxlan0 up")
    return host


def vteps(family: int, numbers: dict[str, int]) -> dict[str, str]:
    prefix = "192.0.2." if family == 4 else "2001:db8::"
    return {mac: f"{prefix}{number}" for mac, number in numbers.items()}


def keep(host: Any, tmp_path: Path, peers: dict[str, str]) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(peers))
    return subprocess.run(
        example("fdb_from_dict.py", "vxlan0", str(file), "--netns", host.ns),
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
        check=False,
    )


def test_fdb_map_is_kept(vxlan_host: Any, family: int, tmp_path: Path) -> None:
    """Missing entries are added, different ones replaced, stale ones removed."""
    first, second = MACS
    underlay = vteps(family, {"stale": 99, "other": 98})
    vxlan_host.bridge(f"fdb add 02:00:00:00:00:63 dev vxlan0 dst {underlay['stale']}")
    vxlan_host.bridge(f"fdb add {first} dev vxlan0 dst {underlay['other']}")
    wanted = vteps(family, MACS)

    done = keep(vxlan_host, tmp_path, wanted)

    assert (done.returncode, done.stderr) == (0, "")
    assert fdb(vxlan_host, "vxlan0") == wanted
    assert [line[:20] for line in done.stdout.splitlines()[:3]] == [
        f"~ fdb {first}"[:20],
        f"+ fdb {second}"[:20],
        "- fdb 02:00:00:00:00:63"[:20],
    ]


def test_fdb_map_that_holds_writes_nothing(vxlan_host: Any, family: int, tmp_path: Path) -> None:
    wanted = vteps(family, MACS)
    keep(vxlan_host, tmp_path, wanted)

    done = keep(vxlan_host, tmp_path, wanted)

    assert done.returncode == 0
    assert done.stdout.splitlines() == ["fdb        0 added  0 replaced  0 removed  2 unchanged"]


def test_fdb_map_names_the_entry_that_fails(vxlan_host: Any, family: int, tmp_path: Path) -> None:
    """The other family's address is none that this tunnel can have; the rest is written."""
    first, second = MACS
    wrong = vteps(6 if family == 4 else 4, {first: 7})

    done = keep(vxlan_host, tmp_path, {**wrong, **vteps(family, {second: 8})})

    assert done.returncode == 1
    assert first in done.stderr
    assert second not in done.stderr
    assert set(fdb(vxlan_host, "vxlan0")) == {second}


# ---- an agent ------------------------------------------------------------------------


def net_conf(family: int) -> dict[str, object]:
    backend = {"Type": "vxlan", "VNI": 1}
    if family == 4:
        return {"Network": "10.244.0.0/16", "Backend": backend}
    return {
        "EnableIPv4": False,
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": backend,
    }


def lease(number: int) -> dict[str, object]:
    document = json.loads((EXAMPLES / "leases.json").read_text())["leases"][0]
    return dict(
        json.loads(json.dumps(document).replace("node1", f"node{number}"))
        | {
            "Subnet": f"10.244.{number}.0/24",
            "IPv6Subnet": f"fd00:10:244:{number}::/64",
            "PublicIP": f"192.0.2.{number}",
            "PublicIPv6": f"2001:db8::{number}",
            "BackendData": {"VNI": 1, "VtepMAC": f"02:00:00:00:04:0{number}"},
            "BackendV6Data": {"VNI": 1, "VtepMAC": f"02:00:00:00:06:0{number}"},
        }
    )


def publish(path: Path, numbers: list[int], **first: str) -> None:
    """Write the leases the way a writer should: beside, then renamed. ``first`` are changes of
    the first one, this node's."""
    temporary = path.with_suffix(".new")
    leases = [lease(number) for number in numbers]
    leases[0] |= first
    temporary.write_text(json.dumps({"leases": leases}))
    temporary.rename(path)


def routed(host: Any, family: int) -> set[str]:
    """The subnets that are routed into the overlay."""
    if not host.ip_json("link show type vxlan"):
        return set()
    device = "flannel.1" if family == 4 else "flannel-v6.1"
    routes = host.ip_json(f"-{family} route show proto 138")
    return {route["dst"] for route in routes if route.get("dev") == device}


def subnets(family: int, *numbers: int) -> set[str]:
    return {str(lease(n)["Subnet" if family == 4 else "IPv6Subnet"]) for n in numbers}


@contextmanager
def agent(host: Any, directory: Path, family: int) -> Iterator[subprocess.Popen[str]]:
    conf = directory / "net-conf.json"
    conf.write_text(json.dumps(net_conf(family)))
    files = ["--leases", str(directory / "leases.json"), "--net-conf", str(conf)]
    command = example(
        "embed_dataplane.py", *files, "--iface", "eth0", "--netns", host.ns, "--interval", "0.01"
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_agent_follows_its_file(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """sync at the start and when this node's lease changes, update on any other change, nothing on
    a broken file; SIGTERM leaves all there."""
    leases = tmp_path / "leases.json"
    publish(leases, [1, 2, 3])
    with agent(host, tmp_path, family) as process:
        wait_until(lambda: routed(host, family) == subnets(family, 2, 3))

        publish(leases, [1, 3, 4, 5])
        wait_until(lambda: routed(host, family) == subnets(family, 3, 4, 5))

        broken = leases.with_suffix(".new")
        broken.write_text('{"leases": [')
        broken.rename(leases)
        assert process.stderr is not None
        assert "leases.json: line 1" in process.stderr.readline()
        assert routed(host, family) == subnets(family, 3, 4, 5)

        publish(leases, [1, 5])
        wait_until(lambda: routed(host, family) == subnets(family, 5))
        publish(leases, [1, 5], Subnet="10.244.77.0/24", IPv6Subnet="fd00:10:244:77::/64")
        own = "10.244.77.0/32" if family == 4 else "fd00:10:244:77::/128"
        wait_until(lambda: own in host.ip("address show type vxlan"))
        process.send_signal(signal.SIGTERM)
        output, complaints = process.communicate(timeout=LIMIT)

    assert (process.returncode, complaints) == (0, "")
    said = [line.partition(":")[0] for line in output.splitlines()]
    assert said == ["sync", "update", "update", "sync"]
    assert routed(host, family) == subnets(family, 5)


def test_agent_without_a_lease_says_so(host: Any, family: int, tmp_path: Path) -> None:
    publish(tmp_path / "leases.json", [2, 3])
    with agent(host, tmp_path, family) as process:
        output, complaints = process.communicate(timeout=LIMIT)

    assert (process.returncode, output) == (1, "")
    assert host.underlay(family) in complaints
    assert routed(host, family) == set()


def test_published_files_are_a_cluster_of_three(host: Any, tmp_path: Path) -> None:
    """examples/leases.json and net-conf.json work as they are, both families at once."""
    command = example(
        "embed_dataplane.py",
        *("--leases", str(EXAMPLES / "leases.json")),
        *("--net-conf", str(EXAMPLES / "net-conf.json")),
        *("--netns", host.ns, "--iface", host.ipv4),
    )
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True, cwd=os.sep
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("sync: ")
        process.terminate()

    assert process.returncode == 0
    assert routed(host, 4) == subnets(4, 2, 3)
    assert routed(host, 6) == subnets(6, 2, 3)


# ---- a resource of one's own --------------------------------------------------------------


ROUTES = {
    4: {"198.51.100.0/24": "192.0.2.251", "203.0.113.7/32": "192.0.2.252"},
    6: {"2001:db8:100::/48": "2001:db8::fb", "2001:db8:200::7/128": "2001:db8::fc"},
}


def underlay(family: int, number: int) -> str:
    return f"192.0.2.{number}" if family == 4 else f"2001:db8::{number}"


def host_routes(host: Any, family: int) -> dict[str, str]:
    """The routes with the example's mark as {prefix: gateway}."""
    found = host.ip_json(f"-{family} route show proto 139")
    return {
        route["dst"] if "/" in route["dst"] else f"{route['dst']}/{32 if family == 4 else 128}": (
            route["gateway"]
        )
        for route in found
    }


@pytest.fixture
def own_resource(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("host_routes")


@pytest.fixture
def extended(host: Any, family: int, own_resource: Any) -> Iterator[Any]:
    """A data plane of one family with the example's resource."""
    with plane(
        host, family, resources=[own_resource.HostRoutes(family, ROUTES[family])]
    ) as dataplane:
        yield dataplane


def test_the_resource_of_the_example_is_one_short_module() -> None:
    assert len((EXAMPLES / "host_routes.py").read_text().splitlines()) < 100


def test_a_resource_of_ones_own_is_synced(extended: Any, host: Any, family: int) -> None:
    """The first sync writes its entries, the second writes nothing."""
    leases = [lease_of(host), *peers(range(2, 5))]

    first = extended.sync(leases)

    assert first.ok
    assert host_routes(host, family) == ROUTES[family]
    assert observed(host, family) == expected(peers(range(2, 5)), family)
    assert first.tables["route"]["added"] == 3 + len(ROUTES[family])
    messages = sent(extended)

    second = extended.sync(leases)

    assert second.ok
    assert second.writes == 0
    assert sent(extended) == messages


def test_a_plan_shows_the_resource(extended: Any, host: Any, family: int) -> None:
    """As lines of text, and in the JSON document under the resource's name."""
    plan = extended.plan([lease_of(host), *peers([2])])

    lines = [
        f"+ route {prefix} via {via} dev eth0 proto 139" for prefix, via in ROUTES[family].items()
    ]
    assert [line for line in str(plan).splitlines() if line in lines] == lines
    assert plan.to_json()["resources"] == {f"host routes {family}": lines}
    assert host_routes(host, family) == {}


def test_drift_of_the_resource_is_repaired(extended: Any, host: Any, family: int) -> None:
    """By the next sync, and by a resync: one route deleted, one changed, one of ours added."""
    leases = [lease_of(host), *peers([2])]
    extended.sync(leases)
    (gone, _), (changed, _) = ROUTES[family].items()
    for repair in (lambda: extended.sync(leases), extended.resync):
        host.ip(f"-{family} route del {gone} proto 139")
        host.ip(f"-{family} route replace {changed} via {underlay(family, 9)} proto 139")
        extra = "192.88.99.0/24" if family == 4 else "2001:db8:300::/48"
        host.ip(f"-{family} route add {extra} dev eth0 proto 139")

        report = repair()

        assert report.ok
        assert host_routes(host, family) == ROUTES[family]
        assert {
            word: report.tables["route"][word] for word in ("added", "replaced", "removed")
        } == {
            "added": 1,
            "replaced": 1,
            "removed": 1,
        }


def test_a_failure_of_the_resource_names_the_route(
    host: Any, family: int, own_resource: Any
) -> None:
    """A gateway that nothing leads to fails alone; the overlay and the other routes are done."""
    first, second = ROUTES[family]
    wrong = {first: "10.99.0.1" if family == 4 else "2001:db8:99::1"}
    routes = own_resource.HostRoutes(family, {**ROUTES[family], **wrong})
    with plane(host, family, resources=[routes]) as dataplane:
        report = dataplane.sync([lease_of(host), *peers([2])])

    assert not report.ok
    (failed,) = report.to_json()["failures"]
    assert failed["detail"].startswith(f"add route {first} via {wrong[first]} dev eth0 proto 139: ")
    assert host_routes(host, family) == {second: ROUTES[family][second]}
    assert observed(host, family) == expected(peers([2]), family)


def test_a_resource_that_cannot_be_read_is_a_problem_until_it_can(
    host: Any, family: int, own_resource: Any
) -> None:
    """Its problem carries its name, the overlay is done, and the next pass ends the problem."""
    faults = [KernelError(errno.EBUSY, "read the routes")]

    class Faulty(own_resource.HostRoutes):  # type: ignore[misc]
        def compare(self, *args: Any) -> Any:
            if faults:
                raise faults.pop()
            return super().compare(*args)

    leases, board = [lease_of(host), *peers([2])], StatusBoard()
    problems = Problems(board)
    with plane(host, family, resources=[Faulty(family, ROUTES[family])]) as dataplane:
        report = dataplane.sync(leases)
        problems.note_report(report)

        assert {*report.problems} == {*board.status.problems} == {f"host routes {family}"}
        assert observed(host, family) == expected(peers([2]), family)
        assert host_routes(host, family) == {}

        problems.note_report(dataplane.resync())

    assert not board.status.problems
    assert host_routes(host, family) == ROUTES[family]


def test_clean_removes_the_resource(extended: Any, host: Any, family: int) -> None:
    """And routes of others stay."""
    foreign = "198.18.0.0/15" if family == 4 else "2001:db8:400::/48"
    host.ip(f"-{family} route add {foreign} dev eth0 proto static")
    before = everything(host)
    extended.sync([lease_of(host), *peers(range(2, 5))])

    report = extended.clean()

    assert report.ok
    assert host_routes(host, family) == {}
    assert everything(host) == before


def test_the_page_about_resources_shows_the_example() -> None:
    """Each block of Python in docs/extending.md is a part of the example as it is."""
    blocks = (ROOT / "docs/extending.md").read_text().split("```python\n")[1:]
    example = (EXAMPLES / "host_routes.py").read_text()

    shown = [block.partition("```")[0] for block in blocks]

    assert len(shown) == 5
    assert [part for part in shown if part not in example] == []
