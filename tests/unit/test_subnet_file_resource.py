"""subnet.env as a resource: what it says of which MTU, and what it keeps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp import KernelError
from flannel_dp.kernel.host import Host
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Resource, Result
from flannel_dp.resources.subnet_file import SubnetFileResource
from tests.lib.leases import network_config, peers
from tests.lib.views import View, devices_done, view

CONFIG = network_config()
LINES = {
    4: "FLANNEL_NETWORK=10.240.0.0/12\nFLANNEL_SUBNET=10.240.0.1/24\n",
    6: "FLANNEL_IPV6_NETWORK=fd00:10::/32\nFLANNEL_IPV6_SUBNET=fd00:10::1/64\n",
}
DONE = devices_done(device4=("flannel.1", 7, 1450), device6=("flannel-v6.1", 8, 1430))

both = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "subnet.env"


def cluster(*families: int) -> View:
    return view(CONFIG, peers(range(1, 4)), *(families or (4, 6)))


def write(path: Path, wanted: View, done: Any = DONE, *, ip_masq: bool = False) -> Report:
    """Compare and apply; the report."""
    resource, host, report = (
        SubnetFileResource(str(path), CONFIG, ip_masq=ip_masq),
        Host(),
        Report(),
    )
    change = resource.compare(host, resource.desired(wanted), done)
    outcome = Result() if change.is_empty else resource.apply(host, change)
    resource.record(report, change, outcome)
    return report


def test_compare_writes_nothing_and_apply_leaves_nothing_to_do(path: Path) -> None:
    resource, host = SubnetFileResource(str(path), CONFIG), Host()
    desired = resource.desired(cluster())

    change = resource.compare(host, desired, DONE)

    assert not path.parent.exists()
    assert f"~ {path}: FLANNEL_SUBNET=10.240.0.1/24" in change.lines()

    resource.apply(host, change)

    assert path.read_text() == f"{LINES[4]}{LINES[6]}FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    assert resource.compare(host, desired, DONE).is_empty


def test_a_report_names_the_file_that_was_written(path: Path) -> None:
    first, second = write(path, cluster()), write(path, cluster())

    assert (first.subnet_file, second.subnet_file) == (str(path), "")
    assert first.looked == second.looked == {"subnet file"}


@both
def test_the_mtu_is_the_device_s_else_the_interface_s(path: Path, family: int) -> None:
    config = network_config(family)
    resource, wanted = SubnetFileResource(str(path), config), view(config, peers([1]), family)
    for done, mtu in ((DONE, {4: 1450, 6: 1430}[family]), ({}, 1500)):
        change = resource.compare(Host(), resource.desired(wanted), done)
        assert change.text == f"{LINES[family]}FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n"


def test_masquerading_is_written_down(path: Path) -> None:
    write(path, cluster(), ip_masq=True)

    assert "FLANNEL_IPMASQ=true\n" in path.read_text()


@both
def test_a_family_that_cannot_be_synced_keeps_its_lines_and_its_mtu(
    path: Path, family: int
) -> None:
    write(path, cluster())
    before = path.read_text()

    report = write(path, cluster(10 - family), {f"device{10 - family}": Result()})

    assert path.read_text() == before
    assert report.looked == set()


@both
def test_a_family_that_the_file_does_not_know_is_left_out(path: Path, family: int) -> None:
    write(path, cluster(family))

    assert LINES[family] in path.read_text()
    assert LINES[10 - family] not in path.read_text()


def test_without_a_family_that_can_be_synced_the_file_stays(path: Path) -> None:
    write(path, cluster())
    before = path.read_text()

    report = write(path, View([], [], cluster(4).errors))

    assert path.read_text() == before
    assert report.looked == set()


def test_clean_leaves_the_file(path: Path) -> None:
    write(path, cluster())
    before = path.read_text()
    resource = SubnetFileResource(str(path), CONFIG)

    Reconciler(Host(), [resource]).clean()

    assert path.read_text() == before


def test_a_file_that_cannot_be_written_is_a_problem_of_its_own(path: Path) -> None:
    path.mkdir(parents=True)
    resource, report = SubnetFileResource(str(path), CONFIG), Report()

    found = Reconciler(Host(), [resource]).sync(cluster())
    resource.record(report, found.changes[resource.name], found.done[resource.name])

    error = report.problems["subnet file"]
    assert isinstance(error, KernelError)
    assert str(path) in str(error)
    assert report.subnet_file == ""


class Device(Resource[Any, Any]):
    """A device of one family that cannot be looked at, or not be made."""

    def __init__(self, family: int, when: str) -> None:
        self.name, self.families, self.vital = f"device{family}", (family,), True
        self._when = when

    def desired(self, view: Any) -> int:
        return 0

    def compare(self, host: Any, desired: Any, done: Any) -> Any:
        if self._when == "compare":
            raise KernelError(22, f"look for {self.name}")
        return SimpleNamespace(is_empty=False, facts={"mtu": 1400})

    def apply(self, host: Any, change: Any) -> Result:
        raise KernelError(22, f"create {self.name}")


@both
def test_it_is_written_although_a_device_cannot_be_made(path: Path, family: int) -> None:
    resource = SubnetFileResource(str(path), CONFIG)

    Reconciler(Host(), [resource, Device(family, "apply")]).sync(cluster())

    assert path.read_text() == f"{LINES[4]}{LINES[6]}FLANNEL_MTU=1400\nFLANNEL_IPMASQ=false\n"


@both
def test_a_device_that_cannot_be_looked_at_says_nothing_of_the_mtu(path: Path, family: int) -> None:
    write(path, cluster())
    before = path.read_text()
    resource, report = SubnetFileResource(str(path), CONFIG), Report()

    found = Reconciler(Host(), [resource, Device(family, "compare")]).sync(cluster())
    resource.record(report, found.changes[resource.name], found.done[resource.name])

    assert path.read_text() == before
    assert report.looked == set()
