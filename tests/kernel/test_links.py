"""The raw reader of devices, addresses and routes, against iproute2 and against bad replies."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.errors import ConfigError, DeviceGone, DumpInterrupted, KernelError, Overrun
from flannel_dp.kernel import messages, route_messages
from flannel_dp.kernel.links import (
    IFA_F_NODAD,
    SCOPE_LINK,
    DefaultRoute,
    Link,
    LinkReader,
    NeighbourUse,
)
from flannel_dp.kernel.socket import MAX_INTERRUPTED, NetlinkSocket

GATEWAY = {4: "192.0.2.254", 6: "2001:db8::fe"}
OUTSIDE = {4: "203.0.113.7", 6: "2600::7"}


class Tampered:
    """Stands before the reader's real socket and changes what recvmsg returns."""

    def __init__(
        self, real: socket.socket, change: Callable[[bytes, int, int], tuple[bytes, int, int]]
    ) -> None:
        self._real = real
        self._change = change
        self.received = 0

    def send(self, data: bytes) -> int:
        return self._real.send(data)

    def close(self) -> None:
        self._real.close()

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        data, ancillary, flags, (pid, groups) = self._real.recvmsg(size)
        self.received += 1
        data, flags, pid = self._change(data, flags, pid)
        return data, ancillary, flags, (pid, groups)


def tamper(
    reader: LinkReader, change: Callable[[bytes, int, int], tuple[bytes, int, int]]
) -> Tampered:
    made = Tampered(reader._socket, change)
    reader._socket = made  # type: ignore[assignment]
    return made


def untouched(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
    return data, flags, pid


def as_iproute2(link: Link) -> dict[str, Any]:
    """A Link in the words of ``ip -d -j link show``."""
    words: dict[str, Any] = {
        "ifindex": link.index,
        "ifname": link.name,
        "mtu": link.mtu,
        "address": link.mac,
        "up": link.up,
        "carrier": link.carrier,
        "kind": link.kind,
    }
    if link.vxlan is not None:
        info = link.vxlan
        words["vxlan"] = {
            "id": info.vni,
            "port": info.port,
            "learning": info.learning,
            "l2miss": info.l2miss,
            "l3miss": info.l3miss,
            "proxy": info.proxy,
            "rsc": info.rsc,
            "gbp": info.gbp,
            "gpe": info.gpe,
            "external": info.collect_metadata,
            "ttl": info.ttl,
            "local": info.local,
            "group": info.group,
            "udp_csum": info.udp_csum,
            "udp_zero_csum6_tx": info.udp_zero_csum6_tx,
            "udp_zero_csum6_rx": info.udp_zero_csum6_rx,
        }
    return words


def from_iproute2(entry: dict[str, Any]) -> dict[str, Any]:
    """The same words out of iproute2's JSON, which leaves out what is not set."""
    kind = entry.get("linkinfo", {}).get("info_kind", "")
    words: dict[str, Any] = {key: entry[key] for key in ("ifindex", "ifname", "mtu")}
    words["address"] = entry.get("address", "")  # a GPE device carries no Ethernet
    words["up"] = "UP" in entry["flags"]
    words["carrier"] = "LOWER_UP" in entry["flags"]
    words["kind"] = kind
    if kind == "vxlan":
        data = entry["linkinfo"]["info_data"]
        flags = ("learning", "l2miss", "l3miss", "proxy", "rsc", "gbp", "gpe", "external")
        sums = ("udp_csum", "udp_zero_csum6_tx", "udp_zero_csum6_rx")
        words["vxlan"] = {
            "id": data.get("id", 0),
            "port": data["port"],
            "ttl": data.get("ttl", 0),
            "local": data.get("local") or data.get("local6"),
            "group": data.get("group") or data.get("group6") or data.get("remote6"),
            **{flag: bool(data.get(flag, False)) for flag in flags},
            **{flag: bool(data.get(flag, False)) for flag in sums},
        }
    return words


VXLAN_OPTIONS = [
    "id 1 local {local} dev eth0 dstport 8472 nolearning",
    "id 16777215 local {local} dstport 4789 learning ttl 9",
    "id 5 group {group} dev eth0 dstport 4790 l2miss l3miss proxy rsc",
    "id 6 local {local} dstport 1 gbp",
    "local {local} dstport 2 gpe external",
    "external dstport 65535",
    "id 8 local {local} dstport 3 noudpcsum udp6zerocsumtx udp6zerocsumrx",
]


@pytest.mark.parametrize("options", VXLAN_OPTIONS)
def test_vxlan_device_reads_as_iproute2_reads_it(host: Any, family: int, options: str) -> None:
    words = {"local": host.underlay(family), "group": {4: "239.1.1.1", 6: "ff05::1"}[family]}
    host.ip("link add vx type vxlan", options.format(**words))

    with LinkReader(host.ns) as reader:
        link = reader.link("vx")

    assert link is not None
    assert link.vxlan is not None
    assert as_iproute2(link) == from_iproute2(host.ip_json("link show vx")[0])
    assert link.vxlan.lower == link.lower == (host.ifindex if "dev eth0" in options else 0)


def test_all_devices_read_as_iproute2_reads_them(host: Any) -> None:
    host.ip("link add br1 type bridge")
    host.ip("link add vx type vxlan id 1 dstport 8472 dev eth0")

    with LinkReader(host.ns) as reader:
        links = reader.links()
        vxlans = reader.links("vxlan")
        by_index = [reader.link(link.index) for link in links]

    assert [as_iproute2(link) for link in links] == [
        from_iproute2(entry) for entry in host.ip_json("link show")
    ]
    assert [link.name for link in vxlans] == ["vx"]
    assert by_index == links
    eth0 = next(link for link in links if link.name == "eth0")
    assert eth0.lower_elsewhere


def test_vxlan_whose_external_interface_is_in_another_namespace(host: Any, netns: str) -> None:
    host.ip("link add vx type vxlan id 1 dstport 8472 dev eth0")
    host.ip(f"link set vx netns {netns}")

    with LinkReader(netns) as reader:
        link = reader.link("vx")

    assert link is not None
    assert link.lower_elsewhere
    assert link.lower == host.ifindex


def test_device_that_is_not_there(netns: str) -> None:
    with LinkReader(netns) as reader:
        assert reader.link("flannel.1") is None
        assert reader.link(4711) is None
        with pytest.raises(DeviceGone, match="addresses of device 4711"):
            reader.addresses(4711)


@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "nul\0"])
def test_name_the_kernel_cannot_hold(netns: str, name: str) -> None:
    with LinkReader(netns) as reader, pytest.raises(ConfigError, match="bytes"):
        reader.link(name)


def test_addresses_of_one_device_and_family(host: Any, family: int) -> None:
    host.ip("link add vx type vxlan id 1 dstport 8472 dev eth0")
    host.ip("addr add 10.244.3.0/32 dev vx")
    host.ip("addr add fd00:10:244:3::/128 dev vx nodad")
    host.ip("addr add fe80::5/64 dev vx nodad")

    with LinkReader(host.ns) as reader:
        link = reader.link("vx")
        assert link is not None
        ours = reader.addresses(link.index, family)
        both = reader.addresses(link.index)
        everything = reader.addresses()

    shown = {(a.address, a.prefixlen, a.scope) for a in ours}
    if family == 4:
        assert shown == {("10.244.3.0", 32, 0)}
    else:
        assert shown == {("fd00:10:244:3::", 128, 0), ("fe80::5", 64, SCOPE_LINK)}
        assert all(a.flags & IFA_F_NODAD for a in ours)
    assert {a.family for a in both} == {4, 6}
    assert {a.address for a in everything} >= {"127.0.0.1", "::1", host.ipv4, host.ipv6}


def test_point_to_point_address_is_the_own_end(host: Any, family: int) -> None:
    own, peer = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd09::1", "fd09::2")}[family]
    host.ip(f"addr add {own} peer {peer} dev eth0")

    with LinkReader(host.ns) as reader:
        found = {a.address for a in reader.addresses(host.ifindex, family)}

    assert own in found
    assert peer not in found


def test_route_on_link_through_a_gateway_and_to_ourselves(host: Any, family: int) -> None:
    neighbour = {4: "192.0.2.77", 6: "2001:db8::77"}[family]
    host.ip(f"-{family} route add {OUTSIDE[family]} via {GATEWAY[family]}")

    with LinkReader(host.ns) as reader:
        near, far = reader.route_to(neighbour), reader.route_to(OUTSIDE[family])
        own = reader.route_to(host.underlay(family))

    assert near is not None
    assert (near.oif, near.gateway, near.local) == (host.ifindex, None, False)
    assert near.prefsrc == host.underlay(family)
    assert far is not None
    assert (far.oif, far.gateway) == (host.ifindex, GATEWAY[family])
    assert own is not None
    assert own.local


@pytest.mark.parametrize("kind", ["", "blackhole", "unreachable", "prohibit", "throw"])
def test_route_that_carries_nothing(host: Any, family: int, kind: str) -> None:
    if kind:
        host.ip(f"-{family} route add {kind} {OUTSIDE[family]}")

    with LinkReader(host.ns) as reader:
        assert reader.route_to(OUTSIDE[family]) is None


@pytest.mark.parametrize("text", ["", "10.0.0.0/8", "eth0", "1.2.3"])
def test_route_to_what_is_no_address(netns: str, text: str) -> None:
    with LinkReader(netns) as reader, pytest.raises(ConfigError, match="is not an IP address"):
        reader.route_to(text)


def test_no_default_route(host: Any, family: int) -> None:
    with LinkReader(host.ns) as reader:
        assert reader.default_routes(family) == []


@pytest.mark.parametrize("metric", [0, 50])
def test_default_route(host: Any, family: int, metric: int) -> None:
    option = f"metric {metric}" if metric else ""
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0 {option}")
    expected = metric or {4: 0, 6: 1024}[family]

    with LinkReader(host.ns) as reader:
        found = reader.default_routes(family)

    assert found == [DefaultRoute(host.ifindex, GATEWAY[family], expected)]


def test_default_route_beside_a_bogon_filter(host: Any, family: int) -> None:
    host.ip(f"-{family} route add default via {GATEWAY[family]}")
    host.ip(f"-{family} route add blackhole", {4: "240.0.0.0/4", 6: "4000::/2"}[family])

    with LinkReader(host.ns) as reader:
        assert [route.oif for route in reader.default_routes(family)] == [host.ifindex]


def test_halves_of_the_address_space_are_no_default_route(host: Any, family: int) -> None:
    for half in {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}[family]:
        host.ip(f"-{family} route add {half} via {GATEWAY[family]}")

    with LinkReader(host.ns) as reader:
        assert reader.default_routes(family) == []


def test_the_main_table_has_a_default_route_behind_a_policy_and_halves(
    host: Any, family: int
) -> None:
    host.ip("link add other0 type veth peer name other1")
    host.ip("link set other0 up")
    host.ip("link set other1 up")
    host.ip(f"-{family} rule add pref 100 lookup 52")
    host.ip(f"-{family} route add default dev other0 table 52 metric 1")
    for half in {4: ("0.0.0.0/1", "128.0.0.0/1"), 6: ("::/1", "8000::/1")}[family]:
        host.ip(f"-{family} route add {half} dev other0")
    host.ip(f"-{family} route add default via {GATEWAY[family]} dev eth0 metric 70")
    host.ip(f"-{family} route add default dev other0 metric 90")
    host.ip(f"-{family} route add unreachable default metric 95")
    other = host.ip_json("link show other0")[0]["ifindex"]

    with LinkReader(host.ns) as reader:
        used, main = reader.default_routes(family), reader.main_default_routes(family)

    assert used == [DefaultRoute(other, None, 1, 52)]
    standby = [DefaultRoute(host.ifindex, GATEWAY[family], 70), DefaultRoute(other, None, 90)]
    assert [route for route in main if route.metric < 95] == standby


def test_the_main_table_s_default_routes_are_read_without_the_table(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPv4's come first in a dump; of 5,000 routes one datagram is read."""
    original, received = NetlinkSocket._receive, []

    def count(self: NetlinkSocket, what: str) -> Any:
        received.append(what)
        return original(self, what)

    lines = [f"route add 10.{n // 250}.{n % 250}.0/24 via {GATEWAY[4]}" for n in range(5000)]
    batch = "\n".join([*lines, f"route add default via {GATEWAY[4]}"])
    command = ["ip", "-n", host.ns, "-4", "-batch", "-"]
    subprocess.run(command, input=batch, text=True, check=True)

    monkeypatch.setattr(NetlinkSocket, "_receive", count)
    with LinkReader(host.ns) as reader:
        found = reader.main_default_routes(4)

    assert len(received) == 1
    assert found == [DefaultRoute(host.ifindex, GATEWAY[4], 0)]


def test_default_route_with_two_next_hops(host: Any, family: int) -> None:
    gateways = {4: ("192.0.2.253", "192.0.2.254"), 6: ("2001:db8::fd", "2001:db8::fe")}[family]
    hops = " ".join(f"nexthop via {gateway} dev eth0" for gateway in gateways)
    host.ip(f"-{family} route add default {hops}")

    with LinkReader(host.ns) as reader:
        found = reader.default_routes(family)

    assert {route.gateway for route in found} == set(gateways)
    assert {route.oif for route in found} == {host.ifindex}


@pytest.mark.parametrize("compat", [1, 0])
def test_default_route_on_a_nexthop_object(host: Any, family: int, compat: int) -> None:
    host.sysctl("ipv4/nexthop_compat_mode", compat)
    host.ip(f"nexthop add id 7 via {GATEWAY[family]} dev eth0")
    host.ip(f"-{family} route add default nhid 7")

    with LinkReader(host.ns) as reader:
        found = reader.default_routes(family)

    assert [(r.oif, r.gateway) for r in found] == [(host.ifindex, GATEWAY[family])]


def test_ipv4_default_route_through_an_ipv6_gateway(host: Any) -> None:
    host.ip(f"-4 route add default via inet6 {GATEWAY[6]} dev eth0")

    with LinkReader(host.ns) as reader:
        assert reader.default_routes(4) == [DefaultRoute(host.ifindex, GATEWAY[6], 0)]


def test_looking_for_the_default_route_does_not_grow_with_the_table(host: Any, family: int) -> None:
    prefix = {4: "10.{0}.{1}.0/24", 6: "fd00:{0:x}:{1:x}::/48"}[family]
    lines = [
        f"route add {prefix.format(n // 250, n % 250)} via {GATEWAY[family]}" for n in range(2000)
    ]
    batch = "\n".join([*lines, f"route add default via {GATEWAY[family]}"])
    command = ["ip", "-n", host.ns, f"-{family}", "-batch", "-"]
    subprocess.run(command, input=batch, text=True, check=True)

    with LinkReader(host.ns) as reader:
        counted = tamper(reader, untouched)
        assert len(reader.default_routes(family)) == 1

    assert counted.received == 1


@pytest.mark.parametrize("times", [1, MAX_INTERRUPTED - 1, MAX_INTERRUPTED])
def test_interrupted_dump_is_never_used(host: Any, times: int) -> None:
    left = times

    def interrupt(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
        nonlocal left
        kind, message_flags = struct.unpack_from("=HH", data, 4)
        last = kind == messages.NLMSG_DONE
        if last and left:
            left -= 1
            marked = struct.pack("=H", message_flags | messages.NLM_F_DUMP_INTR)
            data = data[:6] + marked + data[8:]
        return data, flags, pid

    with LinkReader(host.ns) as reader:
        expected = reader.links()
        tamper(reader, interrupt)
        if times < MAX_INTERRUPTED:
            assert reader.links() == expected
        else:
            with pytest.raises(DumpInterrupted, match="dump devices"):
                reader.links()
            assert reader.links() == expected


def test_answers_from_other_processes_are_not_believed(host: Any) -> None:
    """Any process with CAP_NET_ADMIN can send us netlink messages; a forged answer comes first."""
    with LinkReader(host.ns) as reader:
        lie = messages.IFINFOMSG.pack(0, 1, 666, 0, 0) + messages.attr(3, b"forged\0")
        header = messages.NLMSGHDR.pack(16 + len(lie), messages.RTM_NEWLINK, 0, 1, 0)
        script = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\n"
            f"s.sendto({header + lie!r}, ({reader._socket.getsockname()[0]}, 0))\n"
        )
        host.exec(sys.executable, "-c", script)

        link = reader.link("eth0")

    assert link is not None
    assert link.name == "eth0"


def test_answers_to_earlier_questions_are_passed_over(host: Any) -> None:
    with LinkReader(host.ns) as reader:
        next(reader._ask(messages.RTM_GETLINK, messages.NLM_F_DUMP, bytes(16), "abandoned"))

        link = reader.link("eth0")

    assert link is not None
    assert link.name == "eth0"


def test_truncated_answers_are_errors(host: Any) -> None:
    def cut(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
        return data[:-8], flags, pid

    def flag(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
        return data, flags | socket.MSG_TRUNC, pid

    for change in (cut, flag):
        with LinkReader(host.ns) as reader:
            tamper(reader, change)
            with pytest.raises(KernelError) as caught:
                reader.link("eth0")
        assert caught.value.errno == errno.EBADMSG


def test_overrun_is_an_error(host: Any) -> None:
    def overrun(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
        return data[:4] + struct.pack("=H", messages.NLMSG_OVERRUN) + data[6:], flags, pid

    with LinkReader(host.ns) as reader:
        tamper(reader, overrun)
        with pytest.raises(Overrun, match="look up device eth0"):
            reader.link("eth0")


def test_a_kernel_that_does_not_answer_is_an_error(host: Any) -> None:
    with LinkReader(host.ns) as reader:
        reader._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 10_000)
        )
        with pytest.raises(KernelError) as caught:
            list(reader._receive("wait for nothing"))

    assert caught.value.errno == errno.ETIMEDOUT


def test_error_carries_the_words_of_the_kernel(netns: str) -> None:
    body = messages.IFINFOMSG.pack(0, 0, 0, 0, 1)
    with LinkReader(netns) as reader, pytest.raises(KernelError) as caught:
        list(reader._ask(messages.RTM_GETLINK, messages.NLM_F_DUMP, body, "ask wrongly"))

    assert caught.value.errno == errno.EINVAL
    assert caught.value.kernel_message


def test_reading_a_thousand_times_leaks_no_descriptor(netns: str) -> None:
    gc.collect()  # what earlier tests left is not closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        with LinkReader(netns) as reader:
            reader.link("lo")

    assert len(os.listdir("/proc/self/fd")) <= before  # those of earlier tests may be closed


def test_import_stays_cheap() -> None:
    script = (
        "import sys, flannel_dp.kernel.links, flannel_dp.resources.device.plan;"
        "print([m for m in ('pyroute2', 'ctypes', 'asyncio', 'click') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


@given(data=st.binary(max_size=200), kind=st.sampled_from([16, 20, 24]))
def test_garbage_is_decoded_or_refused(data: bytes, kind: int) -> None:
    for each in (
        lambda: messages.parse_link((kind, data), "fuzz"),
        lambda: messages.parse_address((kind, data), "fuzz"),
        lambda: messages.messages(data, 1, "fuzz"),
        lambda: messages.raise_error(data, 0x300, "fuzz"),
        lambda: route_messages.next_hops({9: data}, "fuzz"),
        lambda: route_messages.next_hops(messages.attributes(data, 0, "fuzz"), "fuzz"),
    ):
        with suppress(KernelError):
            each()


def test_every_truncation_of_a_real_answer_is_decoded_or_refused(host: Any) -> None:
    host.ip(f"link add vx type vxlan id 1 local {host.ipv4} dstport 8472 dev eth0")
    answers: list[bytes] = []

    def keep(data: bytes, flags: int, pid: int) -> tuple[bytes, int, int]:
        answers.append(data[16:])
        return data, flags, pid

    with LinkReader(host.ns) as reader:
        tamper(reader, keep)
        whole = reader.link("vx")

    assert whole is not None
    errors: list[int] = []
    indexes: set[int] = set()
    for length in range(len(answers[0])):
        try:
            indexes.add(
                messages.parse_link((messages.RTM_NEWLINK, answers[0][:length]), "cut").index
            )
        except KernelError as error:
            errors.append(error.errno)
    assert indexes == {whole.index}
    assert set(errors) == {errno.EBADMSG}
    assert len(errors) > len(answers[0]) // 2


def test_how_full_the_neighbour_table_is(host: Any, family: int) -> None:
    """A table counts as full once it has rejected a neighbour: of the entries that it holds the
    kernel does not say which are permanent, and exempt from the limit."""
    name = "arp_cache" if family == 4 else "ndisc_cache"
    with LinkReader(host.ns) as reader:
        before = reader.neighbour_use(family)
        shown = host.ip(f"-s ntable show name {name}")
        after = reader.neighbour_use(family)
    assert before is not None
    assert after is not None
    assert before.rejected <= int(shown.split("table_fulls ")[1].split()[0]) <= after.rejected
    assert before.limit == int(shown.split("thresh3 ")[1].split()[0])
    assert not NeighbourUse(entries=5000, limit=1024).is_full(300)
    assert NeighbourUse(entries=5000, limit=1024, rejected=1).is_full(300)
    assert not NeighbourUse(entries=5000, limit=1024, rejected=1).is_full(4000)
