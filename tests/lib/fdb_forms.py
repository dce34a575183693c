"""A namespace with FDBs of every form that the kernel has, and what `bridge` shows of them."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from hypothesis import strategies as st

from flannel_dp import Fdb, Kernel, fdb_scope
from flannel_dp.tables.entries import NUD_NOARP, NUD_PERMANENT
from tests.lib.hosts import Host, run
from tests.lib.leases import endpoint, mac

ZERO, GROUP = "00:00:00:00:00:00", "01:00:5e:00:00:01"
REACHABLE, GROUPS = 2, (1002, 1003)
STATES = {"permanent": NUD_PERMANENT, "static": NUD_NOARP, "": REACHABLE, "stale": 4}


class Forms:
    """``port``, a vxlan device of one VNI and a port of bridge ``br``, and ``many``, one of
    several VNIs; of one family, with two nexthop groups."""

    def __init__(self, host: Host, family: int) -> None:
        self.host, self.family, self.kernel = host, family, Kernel(host.ns)
        there = host.underlay(family)
        host.ip_batch(
            "",
            f"link add br{family} type bridge",
            f"link add port{family} type vxlan id 1 dev eth0 local {there} "
            f"dstport {8400 + family} nolearning",
            f"link add many{family} type vxlan external vnifilter local {there} "
            f"dstport {9400 + family} nolearning",
            f"link set port{family} master br{family}",
            *(f"link set {name}{family} addrgenmode none up" for name in ("br", "port", "many")),
            *(f"nexthop add id {family}0{n} via {endpoint(family, n)} fdb" for n in (1, 2)),
            *(f"nexthop add id {one + family} group {family}01/{family}02 fdb" for one in GROUPS),
        )
        host.bridge(f"vni add dev many{family} vni 10-11")
        shown = {one["ifname"]: int(one["ifindex"]) for one in host.ip_json("link show")}
        self.br, self.eth0 = shown[f"br{family}"], shown["eth0"]
        self.port, self.many = shown[f"port{family}"], shown[f"many{family}"]
        self.names = {index: name for name, index in shown.items()}
        self.indexes = shown
        self.scopes = {one: fdb_scope(one, owner="all", side="") for one in (self.port, self.many)}

    def close(self) -> None:
        self.kernel.close()

    def clear(self) -> None:
        """Leave on the devices nothing but what the bridge put there."""
        for device in (self.port, self.many):
            for entry in self.read(device):
                if not entry.master or entry.state != NUD_PERMANENT:
                    self.batch(self.words("del", entry))

    def read(self, device: int) -> list[Fdb]:
        return [*self.kernel.read("fdb_any", fdb_scope(device, side=""))]

    def words(self, verb: str, entry: Fdb) -> str:
        """What ``bridge`` is told to add or delete an entry."""
        words = ["fdb", verb, entry.mac, "dev", self.names[entry.device]]
        words += ["master" if entry.master else "self"]
        words += ["permanent" if entry.state == NUD_PERMANENT else "static"]
        words += entry.flags.split(",") if entry.flags else []
        for word, value in (
            ("vlan", entry.vlan),
            ("dst", entry.endpoint),
            ("port", entry.port),
            ("vni", entry.vni),
            ("src_vni", entry.src_vni),
            ("via", self.names.get(entry.via)),
            ("nhid", entry.nexthop if verb != "del" else 0),
        ):
            words += [word, str(value)] if value else []
        return " ".join(words)

    def batch(self, *lines: str) -> None:
        """Give ``bridge`` lines, of which some may fail."""
        subprocess.run(
            ["bridge", "-n", self.host.ns, "-force", "-batch", "-"],
            input="\n".join([*lines, ""]),
            capture_output=True,
            text=True,
            check=False,
        )

    def shown(self, device: int) -> list[Fdb]:
        """What ``bridge -j -d fdb show`` prints of a device, as entries."""
        name = self.names[device]
        printed = run("bridge", "-n", self.host.ns, "-j", "-d", "fdb", "show", "dev", name)
        return [self._entry(device, one) for one in json.loads(printed)]

    def _entry(self, device: int, shown: dict[str, Any]) -> Fdb:
        known = {"mac", "ifname", "dst", "port", "vni", "src_vni", "viaIf", "nhid", "flags"}
        assert not {*shown} - known - {"vlan", "master", "state"}, shown
        words = [word for word in shown["flags"] if word not in ("self", "master")]
        assert "self" in shown["flags"] or shown.get("master"), shown
        return Fdb(
            device,
            shown["mac"],
            shown.get("dst", ""),
            shown.get("vni", 0),
            shown.get("port", 0),
            self.indexes.get(shown.get("viaIf", ""), 0),
            shown.get("nhid", 0),
            STATES[shown.get("state", "")],
            shown.get("src_vni", 0),
            "",
            ",".join(sorted(words)),
            shown.get("vlan", 0),
            self.indexes.get(shown.get("master", ""), 0),
        )

    def entries(self) -> st.SearchStrategy[Fdb]:
        """Entries of all forms that a table can hold, of few MACs, so that they meet."""
        family = self.family
        unicast = mac(family, 1), mac(family, 2)
        macs = st.sampled_from((ZERO, GROUP, *unicast))
        there = st.sampled_from([endpoint(family, n) for n in (1, 2, 3)])
        state = st.sampled_from((NUD_PERMANENT, NUD_NOARP))
        flags = st.sampled_from(("", "", "extern_learn", "router", "sticky", "extern_learn,router"))
        none, nothing = st.just(0), st.just("")
        dressed = state, none, nothing, flags, none, none

        def built(device: int, *values: st.SearchStrategy[Any]) -> st.SearchStrategy[Fdb]:
            return st.builds(Fdb, st.just(device), *values)

        vni, port = st.sampled_from((0, 0, 7)), st.sampled_from((0, 0, 4789))
        via = st.sampled_from((0, 0, self.eth0))
        group = st.sampled_from([one + family for one in GROUPS])
        source = st.sampled_from((0, 10, 11))
        return st.one_of(
            built(self.port, macs, there, vni, port, via, none, *dressed),
            built(self.port, macs, nothing, none, none, none, group, *dressed),
            built(self.many, macs, there, source, port, none, none, state, source, *dressed[2:]),
            built(
                self.port,
                st.sampled_from(unicast),
                nothing,
                *[none] * 4,
                st.just(NUD_NOARP),
                none,
                nothing,
                st.sampled_from(("", "sticky")),
                none,
                st.just(self.br),
            ),
            built(
                self.port,
                st.sampled_from(unicast),
                nothing,
                *[none] * 4,
                st.just(REACHABLE),
                none,
                nothing,
                st.just("extern_learn"),
                none,
                st.just(self.br),
            ),
        )


def consistent(entries: list[Fdb]) -> list[Fdb]:
    """Entries that the kernel can hold side by side: of a MAC those that go with the first."""
    kept: dict[tuple[Any, ...], list[Fdb]] = {}
    for entry in entries:
        place = entry.device, entry.mac, entry.src_vni, entry.master, entry.vlan
        mates = kept.setdefault(place, [])
        first = mates[0] if mates else entry
        several = entry.mac in (ZERO, GROUP) and not entry.nexthop
        fits = (entry.state, entry.flags, entry.nexthop) == (
            first.state,
            first.flags,
            first.nexthop,
        )
        if entry not in mates and fits and (several or not mates):
            mates.append(entry)
    return [entry for mates in kept.values() for entry in mates]
