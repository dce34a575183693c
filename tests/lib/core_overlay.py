"""A vxlan device of one family, the entries that its peers need, and what iproute2 shows
of it: for the tests of the compiled core."""

from __future__ import annotations

from typing import Any

from flannel_dp._core import Table
from flannel_dp.kernel.tables import Kernel
from flannel_dp.reconcile.plan import Plan, TablePlan
from flannel_dp.tables import columns, scopes
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.results import TableResult
from tests.lib.leases import DEVICE, address, endpoint, mac, subnet

PROTOCOL = 138


class Overlay:
    """A vxlan device of one family in a host, the tables that ``peers`` need, and the
    kernel's idea of them."""

    def __init__(self, host: Any, family: int) -> None:
        self.host, self.family = host, family
        self.device = DEVICE[family]
        self.index = self.add_device(self.device, 1)
        self.kernel = Kernel(host.ns)

    def add_device(self, name: str, vni: int) -> int:
        local = self.host.underlay(self.family)
        self.host.ip_batch(
            "",
            f"link add {name} type vxlan id {vni} dev eth0 local {local} "
            f"dstport {8471 + vni} nolearning",
            f"link set {name} addrgenmode none up",
        )
        return int(self.host.ip_json(f"link show {name}")[0]["ifindex"])

    def ip(self, words: str) -> str:
        return str(self.host.ip(f"-{self.family}", words))

    def bridge(self, words: str) -> str:
        return str(self.host.bridge(words))

    def wanted(self, numbers: range, index: int = 0) -> list[tuple[Table, Scope]]:
        """The four tables (three for IPv6) of the peers ``numbers``, tagged by position."""
        family, index = self.family, index or self.index
        neighbours = columns.neighbour_table(
            index, {address(family, n): mac(family, n) for n in numbers}
        )
        fdb = columns.fdb_table(index, {mac(family, n): endpoint(family, n) for n in numbers})
        found = [
            (neighbours, scopes.neighbour_scope(index, family)),
            (fdb, scopes.fdb_scope(index)),
        ]
        if family == 4:
            nexthops = columns.nexthop_table(index, {n: address(4, n) for n in numbers})
            routes = columns.route_table({subnet(4, n): n for n in numbers})
            found.append((nexthops, scopes.nexthop_scope(index)))
        else:
            routes = columns.route_table(
                {subnet(6, n): address(6, n) for n in numbers}, device=index
            )
        found.append((routes, scopes.route_scope(family, device=index, exclusive=True)))
        return found

    def plan(self, wanted: list[tuple[Table, Scope]]) -> Plan:
        return Plan(
            tuple(
                TablePlan(self.kernel.diff(table, scope), (scope,), {self.index: self.device})
                for table, scope in wanted
            )
        )

    def sync(self, wanted: list[tuple[Table, Scope]]) -> dict[str, TableResult]:
        return {result.kind: result for result in self.kernel.apply(self.plan(wanted))}

    def observed(self) -> dict[str, set[Any]]:
        """What iproute2 shows of the device, the kernel's own routes and guesses left out."""
        routes = self.host.ip_json(f"-{self.family} route show dev {self.device}")
        neighbours = self.host.ip_json(f"-{self.family} neigh show dev {self.device} nud permanent")
        nexthops = self.host.ip_json(f"nexthop show dev {self.device} proto {PROTOCOL}")
        found: dict[str, set[Any]] = {
            "neighbour": {(n["dst"], n["lladdr"]) for n in neighbours},
            "fdb": {
                (f["mac"], f.get("dst"), f["state"])
                for f in self.host.bridge_json(f"fdb show dev {self.device}")
            },
            "nexthop": {(n["id"], n["gateway"], tuple(n["flags"])) for n in nexthops},
            "route": {
                (r["dst"], r.get("nhid"), r["gateway"], r["protocol"], tuple(r["flags"]))
                for r in routes
                if r["protocol"] != "kernel"
            },
        }
        return found

    def expected(self, numbers: range) -> dict[str, set[Any]]:
        family, v4 = self.family, self.family == 4
        return {
            "neighbour": {(address(family, n), mac(family, n)) for n in numbers},
            "fdb": {(mac(family, n), endpoint(family, n), "permanent") for n in numbers},
            "nexthop": {(n, address(4, n), ("onlink",)) for n in numbers} if v4 else set(),
            "route": {
                (subnet(family, n), n if v4 else None, address(family, n), "138", ("onlink",))
                for n in numbers
            },
        }
