"""What the log and the history tell of drift: each entry, before and after, and the program."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flannel_dp._core import Claims
from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.cluster.lease import printable
from flannel_dp.cluster.network import devices_of
from flannel_dp.kernel.programs import Programs
from flannel_dp.look.events import Event
from flannel_dp.tables.describe import describe

if TYPE_CHECKING:
    from flannel_dp.agent.kept import Kept
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.reconcile.drift import Repair, Repaired
    from flannel_dp.reconcile.plan import DeviceChange
    from flannel_dp.resources.peers.state import State

log = logging.getLogger(__name__)


class Repairs:
    """Tells what was repaired of what is ``kept`` in sync. For the agent's thread."""

    def __init__(self, kept: Kept, bursts: Bursts, chronicle: Chronicle) -> None:
        self._kept, self._bursts, self._chronicle = kept, bursts, chronicle
        self._programs = Programs()

    def tell(self, repair: Repair) -> None:
        """Tell which entries of ours another program had changed, and that they are as before."""
        if not repair.counts:
            return
        now = self._chronicle.clock()
        total = sum(repair.counts.values())
        room = self._bursts.room(("drift", 0), total)
        names = _names(self._kept.known.values(), self._kept.config)
        told = 0
        for change in repair.report.devices if repair.report else ():
            port = repair.ports.get(change.name, 0)
            for one in _of_device(now, change, self._programs.name(port)):
                told += self._keep(one, repair.seconds, told < room)
        for entry in repair.entries:
            peers = self._kept.known[entry.family].peers
            one = _of_entry(now, peers, entry, names, self._programs.name(entry.port))
            told += self._keep(one, repair.seconds, told < room)
        self._keep_counts(now, repair)
        self._bursts.more(("drift", 0), total - told)

    def _keep(self, one: Event, seconds: float, is_told: bool) -> bool:
        """Keep one repair, and have the log tell it where it has room; return whether it did."""
        self._chronicle.repaired(one)
        if is_told:
            _tell(one, seconds)
        return is_told

    def _keep_counts(self, now: float, repair: Repair) -> None:
        """Keep how many entries of each table were repaired beside those with names."""
        named = Counter((one.table, one.change) for one in repair.entries)
        for (table, change), count in sorted(repair.counts.items()):
            left = count - named[table, change]
            if left > 0 and table != "device":
                words = f"{left} more entries of table {table}"
                self._chronicle.repaired(
                    Event(now, "repaired", before=words, after=words, table=table, change=change)
                )


def _of_entry(
    now: float, peers: Claims, one: Repaired, names: dict[int, str], program: str
) -> Event:
    has_peer = 0 <= one.peer < len(peers)
    return Event(
        now,
        "repaired",
        one.family,
        printable(peers.name(one.peer)) if has_peer else "",
        peers.subnet(one.peer) if has_peer else "",
        before=describe(one.before, names) if one.before is not None else "",
        after=describe(one.after, names) if one.after is not None else "",
        table=one.table,
        change=one.change,
        program=program,
    )


def _of_device(now: float, change: DeviceChange, program: str) -> Iterator[Event]:
    """Yield what was repaired of a device, or that it was recreated."""
    device = f"device {change.name}"
    if change.action == "none":
        return
    lines = change.changes if change.action == "adopt" else ("",)
    for line in lines:
        kind, before, after = _sides(line) if line else ("deleted", "", "recreated")
        yield Event(
            now,
            "repaired",
            before=before and f"{device} {before}",
            after=after and f"{device} {after}".removesuffix(" recreated"),
            table="device",
            change=kind,
            program=program,
        )


def _sides(line: str) -> tuple[str, str, str]:
    """Return what a line of a device's plan undoes, and both sides of it: ``mtu 1400 -> 1450``."""
    if " -> " in line:
        before, _, after = line.partition(" -> ")
        key = before.rpartition(" ")[0]
        return "changed", before, f"{key} {after}".strip()
    if " + " in line:
        return "deleted", "", line.replace(" + ", " ")
    if " - " in line:
        return "added", line.replace(" - ", " "), ""
    return "changed", "down" if line == "up" else "otherwise", line


def _tell(one: Event, seconds: float) -> None:
    fields = {
        "before": one.before or "none",
        "after": one.after or "none",
        "table": one.table,
        "family": one.family,
        "change": one.change,
        "program": one.program or "another program",
        "seconds": f"{seconds:.4f}",
    }
    if one.change == "added":
        log.info("Drift repaired: removed %(before)s, which %(program)s had added", fields)
    elif one.change == "deleted":
        log.info("Drift repaired: restored %(after)s, which %(program)s had deleted", fields)
    else:
        log.info("Drift repaired: restored %(after)s; %(program)s had made it %(before)s", fields)


def _names(states: Iterable[State], config: NetworkConfig) -> dict[int, str]:
    """Return the names of the devices that entries are on, by ifindex."""
    devices = devices_of(config)
    found: dict[int, str] = {}
    for state in states:
        found[state.uplink] = state.family.iface
        found[state.index] = devices.get(state.number, "")
    return {index: name for index, name in found.items() if index and name}
