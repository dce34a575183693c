"""Arguments as callers have them: every spelling gives the table that the plain one gives."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import pytest

import flannel_dp
from flannel_dp import Fdb, Neighbour, Nexthop, Peer, Route, Scope, Table
from flannel_dp._core import dump_request

api: Any = flannel_dp
MAC = "02:00:00:00:ab:07"
MACS = (
    MAC.upper(),
    "02-00-00-00-AB-07",
    "0200.0000.ab07",
    "02000000AB07",
    bytes.fromhex("02000000ab07"),
)
ADDRESS = {4: "192.0.2.7", 6: "2001:db8::7"}
PREFIX = {4: "10.244.7.0/24", 6: "fd00:10:244:7::/64"}


def spellings(family: int) -> list[Any]:
    """An address in every form."""
    one = ip_address(ADDRESS[family])
    return [str(one), one, one.packed, bytearray(one.packed), ip_interface(f"{one}/24")]


def prefixes(family: int) -> list[Any]:
    net = ip_network(PREFIX[family])
    return [str(net), net, ip_interface(f"{net[5]}/{net.prefixlen}")]


@pytest.mark.parametrize("family", [4, 6])
def test_macs_and_addresses_in_any_spelling(family: int) -> None:
    wanted = [*api.fdb_table(1, {MAC: ADDRESS[family]})]

    for mac in MACS:
        for address in spellings(family):
            pair = [(mac, address)]
            assert [*api.fdb_table("lo", pair)] == wanted
            swapped = api.neighbour_table("lo", [(address, mac)])
            assert [*swapped] == [Neighbour(1, ADDRESS[family], MAC)]
            assert Table("fdb").find(Fdb(1, mac, address)) == -1


@pytest.mark.parametrize("family", [4, 6])
def test_prefixes_in_any_spelling(family: int) -> None:
    for prefix in prefixes(family):
        for gateway in spellings(family):
            (route,) = api.route_table([(prefix, gateway)], device="lo")
            assert (route.prefix, route.gateway) == (PREFIX[family], ADDRESS[family])
            assert route.device == 1
            (peer,) = api.peer_table(3, [(prefix, gateway, MACS[3])])
            assert peer == Peer(PREFIX[family], ADDRESS[family], MAC, 3)
        scope = api.route_scope(family, within=prefix, device="lo")
        assert dump_request(scope) == dump_request(
            api.route_scope(family, within=str(PREFIX[family]), device=1)
        )
    (host,) = api.route_table([(ip_address(ADDRESS[family]), 7)])
    assert host.prefix == f"{ADDRESS[family]}/{32 if family == 4 else 128}"


@pytest.mark.parametrize("family", [4, 6])
def test_an_entry_takes_the_same_values(family: int) -> None:
    address = ip_address(ADDRESS[family])
    entries: list[tuple[Any, Any]] = [
        (("lo", address, MACS[2]), Neighbour(1, str(address), MAC)),
        (("lo", MACS[2], address.packed), Fdb(1, MAC, str(address))),
        ((7, address, "lo"), Nexthop(7, str(address), 1)),
        ((ip_network(PREFIX[family]), 0, address, "lo"), Route(PREFIX[family], 0, str(address), 1)),
    ]
    for given, plain in entries:
        table = Table(type(plain).__name__.lower())
        table.add(type(plain)(*given))
        assert table.find(plain) == 0
        again = table[0]
        assert again[: len(given)] == plain[: len(given)]
        assert table.discard(given)


def test_a_scope_takes_4_and_6_and_names() -> None:
    for family, number in ((4, 2), (6, 10)):
        named = Scope("route", family, "lo", within=ip_network(PREFIX[family]))  # type: Any
        plain = Scope("route", number, 1, within=PREFIX[family])
        assert dump_request(named) == dump_request(plain)


def test_what_is_plain_already_loads_nothing() -> None:
    program = (
        "import sys\nfrom flannel_dp._core import Table, dump_request\n"
        "from flannel_dp.tables.entries import Fdb\n"
        "from flannel_dp.tables.scopes import fdb_scope\n"
        f"Table('fdb').add(Fdb(1, {MAC!r}, '192.0.2.7')); dump_request(fdb_scope(1))\n"
        "sys.exit(' '.join({'ipaddress', 'flannel_dp.tables.plain'} & set(sys.modules)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("call", "said", "hint"),
    [
        (lambda: api.fdb_table("none0", {}), "device is 'none0'", "netns"),
        (lambda: api.fdb_table(1, {"02:00": "192.0.2.7"}), "mac is not a MAC", "0200.0000.0007"),
        (lambda: api.fdb_table(1, {MAC: b"abc"}), "endpoint is not an IP address", "4 or 16 bytes"),
        (lambda: api.route_table({"10.0.0.0": 7}), "prefix is not a prefix", "10.244.7.0/24"),
        (lambda: api.route_table({"10.0.0.0/8": 7}, metric=-1), "metric is -1", "4294967295"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, said: str, hint: str) -> None:
    with pytest.raises(flannel_dp.ConfigError, match=said) as caught:
        call()
    assert hint in caught.value.hint
