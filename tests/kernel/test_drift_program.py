"""The program that changed an entry, by the netlink port that the kernel's event names, and the
entries of a repair that reads a family again."""

from __future__ import annotations

from typing import Any

from flannel_dp.kernel.programs import Programs
from flannel_dp.reconcile.drift import Repaired
from flannel_dp.reconcile.watch import Watch
from flannel_dp.tables.entries import EventFilter
from tests.lib.agent_log import Log
from tests.lib.agents import AgentNode, rest
from tests.lib.leases import DEVICE, address, lease_of, peers, plane, subnet
from tests.lib.rival import Rival
from tests.lib.watched_node import settle


def test_the_log_names_the_program_that_lives(
    host: Any, rival: Rival, log: Log, family: int
) -> None:
    with AgentNode(host, family, leases=[lease_of(host), *peers([1, 2])]) as node:
        rest(node)
        gone, device, gateway = subnet(family, 1), DEVICE[family], address(family, 2)

        rival.does(f"route del {gone}")
        told = log.one("restored route", gone, f"which {rival.name} had deleted")
        assert told["program"] == rival.name
        rival.does(f"neigh replace {gateway} lladdr 02:66:66:66:66:66 dev {device}")
        log.one("restored neighbour", gateway, f"; {rival.name} had made it neighbour")
        rival.does(f"route add {subnet(family, 77)} dev {device}")
        log.one("removed route", subnet(family, 77), f"which {rival.name} had added")
        (line,) = host.ip(f"-{family} -o address show {device} scope global").splitlines()
        own = next(word for word in line.split() if "/" in word)
        rival.does(f"address del {own} dev {device}")
        # Events about IPv6 addresses name no port (inet6_ifa_notify in net/ipv6/addrconf.c).
        who = rival.name if family == 4 else "another program"
        told = log.one(f"restored device {device} address {own}, which {who} had deleted")
        assert (told["table"], told["before"]) == ("device", "none")
        log.one(f"Device {device} ", f"was changed: address + {own}")


def _repaired(watch: Watch) -> list[Repaired]:
    return [one for repair in settle(watch) for one in repair.entries]


def test_a_program_that_has_ended_is_told_as_such(host: Any, rival: Rival, family: int) -> None:
    """By its number alone; where a family is read again, too, whose entries all have names."""
    with plane(host, family) as dp, Watch(dp) as watch:
        assert dp.sync([lease_of(host), *peers([1, 2, 3])]).ok
        watch.remember()
        settle(watch)
        rival.does(f"route del {subnet(family, 1)}")
        rival.does(f"neigh del {address(family, 2)} dev {DEVICE[family]}")
        rival.ends()
        watch.mark_dirty()

        found = {(one.table, one.change): one for one in _repaired(watch)}

        assert {*found} == {("route", "deleted"), ("neighbour", "deleted")}
        for one in found.values():
            assert (one.before, one.port) == (None, rival.pid)
            assert Programs().name(one.port).startswith(f"process {rival.pid} (ended")
        peers_of = dp.known[family].peers
        assert peers_of.subnet(found["route", "deleted"].peer) == subnet(family, 1)
        assert peers_of.subnet(found["neighbour", "deleted"].peer) == subnet(family, 2)


def test_an_audit_names_what_no_event_told(host: Any, log: Log, family: int) -> None:
    with AgentNode(host, family, leases=[lease_of(host), *peers([1, 2])], audit=0.5) as node:
        rest(node)
        watch = node.agent._work.watch
        assert watch is not None
        watch._events.set_filter(EventFilter(protocol=0))  # the kernel tells nothing from here on
        host.ip(f"-{family} route del {subnet(family, 1)}")

        told = log.one("Drift repaired: restored route", subnet(family, 1))

        assert (told["program"], told["change"]) == ("another program", "deleted")
        log.one("The audit found and repaired 1 entry that another program had changed")
