"""Devices and addresses as we write them, against what pyroute2 writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute

from flannel_dp import errors
from flannel_dp.kernel.link_writer import LinkWriter, vxlan_data
from flannel_dp.kernel.netns import call_in_netns, call_on_thread
from tests.lib.hosts import Host

NAME, MAC, OTHER_MAC = "vx.1", "02:00:00:00:00:11", "02:00:00:00:00:12"
LOCAL_KEY = {4: "vxlan_local", 6: "vxlan_local6"}
ADDRESS = {4: "10.244.3.0/32", 6: "fd00:10:244:3::/128"}


def shown(host: Host) -> Any:
    """Return the device as iproute2 shows it, less what no two devices share."""
    found = json.loads(host.ip(f"-d -j addr show {NAME}"))[0]
    for attempt in found["addr_info"]:
        attempt.pop("valid_life_time", None)
    # Link-local addresses are the kernel's, and come when they come.
    found["addr_info"] = [one for one in found["addr_info"] if one["scope"] != "link"]
    found.pop("ifindex")
    return found


def on(host: Host, make: Callable[[], None]) -> Any:
    """Return the device that ``make`` makes on the host; it is deleted again."""
    call_in_netns(host.ns, call_on_thread, make)
    try:
        return shown(host)
    finally:
        host.ip(f"link del {NAME}")


def index_of(host: Host) -> int:
    return int(json.loads(host.ip(f"-j link show {NAME}"))[0]["ifindex"])


def options(host: Host, family: int) -> list[dict[str, Any]]:
    """Return everything that a network's configuration may ask for."""
    tunnel = {"vni": 1, "lower": host.ifindex, "local": host.underlay(family)}
    plain = {**tunnel, "port": 8472, "learning": False}
    return [
        plain,
        {**plain, "vni": 0},
        {**plain, "vni": 0xFFFFFF, "port": 65535},
        {**plain, "port": 1},
        {**plain, "learning": True},
        {**plain, "gbp": True},
        {**plain, "learning": True, "gbp": True},
        {"port": 8472, "learning": False, "external": True},
        {"port": 4789, "learning": True, "external": True, "gbp": True},
    ]


def by_pyroute2(family: int, mtu: int, given: dict[str, Any]) -> None:
    words = {"vni": "vxlan_id", "lower": "vxlan_link", "local": LOCAL_KEY[family]}
    words |= {"port": "vxlan_port", "learning": "vxlan_learning", "gbp": "vxlan_gbp"}
    words |= {"external": "vxlan_collect_metadata"}
    with IPRoute() as ipr:
        attributes = {words[key]: value for key, value in given.items()}
        attributes["vxlan_learning"] = int(given["learning"])
        ipr.link("add", ifname=NAME, kind="vxlan", mtu=mtu, address=MAC, **attributes)


def by_ours(mtu: int, given: dict[str, Any]) -> None:
    with LinkWriter() as writer:
        writer.add(NAME, "vxlan", mtu=mtu, mac=MAC, data=vxlan_data(**given), what="add")


def test_devices_are_those_that_pyroute2_makes(host: Host, family: int) -> None:
    for mtu, given in [(1400, one) for one in options(host, family)] + [
        (1280, options(host, family)[0])
    ]:
        theirs = on(host, lambda mtu=mtu, given=given: by_pyroute2(family, mtu, given))
        ours = on(host, lambda mtu=mtu, given=given: by_ours(mtu, given))

        assert ours == theirs, given
        data = ours["linkinfo"]["info_data"]
        assert (ours["mtu"], ours["address"], data["port"]) == (mtu, MAC, given["port"])
        assert data.get("external", False) == given.get("external", False)


def test_changes_are_those_that_pyroute2_makes(host: Host, family: int) -> None:
    plain = options(host, family)[0]
    host.ip("link add eth7 type veth peer name eth7p")
    lower = json.loads(host.ip("-j link show eth7"))[0]["ifindex"]
    other = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    address = ADDRESS[family]
    ip, _, length = address.partition("/")

    def theirs() -> None:
        by_pyroute2(family, 1400, plain)
        with IPRoute() as ipr:
            index = index_of(host)
            ipr.link("set", index=index, kind="vxlan", vxlan_link=lower)
            ipr.link("set", index=index, kind="vxlan", **{LOCAL_KEY[family]: other})
            ipr.link("set", index=index, kind="vxlan", vxlan_learning=1)
            ipr.link("set", index=index, mtu=1300)
            ipr.link("set", index=index, address=OTHER_MAC)
            ipr.addr(
                "add",
                index=index,
                address=ip,
                prefixlen=int(length),
                flags=0x02 if family == 6 else 0,
            )
            ipr.link("set", index=index, state="up")

    def ours() -> None:
        by_ours(1400, plain)
        with LinkWriter() as writer:
            index = index_of(host)
            writer.set_kind(index, "vxlan", vxlan_data(lower=lower), what="lower")
            writer.set_kind(index, "vxlan", vxlan_data(local=other), what="local")
            writer.set_kind(index, "vxlan", vxlan_data(learning=True), what="learning")
            writer.set(index, mtu=1300, what="mtu")
            writer.set(index, mac=OTHER_MAC, what="mac")
            writer.add_address(index, address, what="address")
            writer.set(index, up=True, what="up")

    made = on(host, ours)

    assert made == on(host, theirs)
    data = made["linkinfo"]["info_data"]
    assert (made["mtu"], made["address"], data["link"]) == (1300, OTHER_MAC, "eth7")
    assert data["local" if family == 4 else "local6"] == other
    assert (data["learning"], "UP" in made["flags"]) == (True, True)
    assert [one["local"] for one in made["addr_info"]] == [ip]


def test_what_was_written_is_taken_back(host: Host, family: int) -> None:
    def work() -> None:
        by_ours(1400, options(host, family)[0])
        with LinkWriter() as writer:
            index = index_of(host)
            writer.set(index, up=True, what="up")
            writer.add_address(index, ADDRESS[family], what="add")
            writer.delete_address(index, ADDRESS[family], what="delete")
            assert shown(host)["addr_info"] == []
            writer.set(index, up=False, what="down")
            assert "UP" not in shown(host)["flags"]
            writer.set(index, name="other.1", what="name")
            assert "other.1" in host.ip("link show")
            writer.delete(index, what="delete")

    call_in_netns(host.ns, work)

    assert "vxlan" not in host.ip("-d link show")


def test_errors_are_the_kernels(host: Host, family: int) -> None:
    plain, address = options(host, family)[0], ADDRESS[family]
    absent, unused = 4_000_000, {4: "10.244.4.0/32", 6: "fd00:10:244:4::/128"}[family]

    def work() -> list[tuple[type[Exception], int]]:
        by_ours(1400, plain)
        found = []
        with LinkWriter() as writer:
            index = index_of(host)
            writer.add_address(index, address, what="add")
            for attempt in (
                lambda: by_ours(1400, plain),
                lambda: writer.set_kind(index, "vxlan", vxlan_data(lower=absent), what="set"),
                lambda: writer.set(absent, mtu=1300, what="set"),
                lambda: writer.set(index, mtu=70_000, what="set"),
                lambda: writer.delete(absent, what="delete"),
                lambda: writer.add_address(index, address, what="add"),
                lambda: writer.delete_address(index, unused, what="delete"),
                lambda: writer.set_kind(index, "vxlan", vxlan_data(vni=7), what="set"),
            ):
                with pytest.raises(errors.KernelError) as caught:
                    attempt()
                found.append((type(caught.value), caught.value.errno))
        return found

    gone, plain_error = errors.DeviceGone, errors.KernelError
    found = call_in_netns(host.ns, work)

    assert [number for _, number in found] == [17, 19, 19, 22, 19, 17, 99, 95]
    assert [kind is gone for kind, _ in found] == [number == 19 for _, number in found], found
    assert issubclass(gone, plain_error)


def test_not_permitted(host: Host) -> None:
    script = (
        "from flannel_dp.errors import NotPermitted\n"
        "from flannel_dp.kernel.capabilities import drop_capabilities\n"
        "from flannel_dp.kernel.link_writer import LinkWriter, vxlan_data\n"
        "drop_capabilities(())\n"
        "data = vxlan_data(vni=1, port=8472)\n"
        "try:\n"
        "    with LinkWriter() as writer:\n"
        "        writer.add('vx.1', 'vxlan', mtu=1400, mac='02:00:00:00:00:11', data=data,"
        " what='make it')\n"
        "except NotPermitted as error:\n    print(error.message)\n"
    )

    assert host.exec(sys.executable, "-c", script).startswith("make it")
