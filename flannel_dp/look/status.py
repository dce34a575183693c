"""``flannel-dp status``: what the agents of this node say of themselves, in one screen each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from flannel_dp.look.terminal import Paint, columns, count, human_time, plain

#: So many of each kind are listed.
LISTED = 5

_COLOURS = {"ok": "green", "starting": "yellow", "degraded": "yellow"}
_HEADLINES = {
    "ok": "in sync",
    "starting": "starting: not all peers are programmed yet",
    "degraded": "running with problems",
    "stuck": "stuck: its loop does not turn",
    "ended": "broken: a part of it has ended, restart it",
}
#: What there is of each repair: the entry, or what another program had added.
_REPAIRS = {"added": "removed", "deleted": "restored", "changed": "restored"}


class AgentsStatus:
    """The documents of the agents of one network namespace; ``now`` is in seconds since the
    epoch."""

    def __init__(self, agents: Sequence[dict[str, Any]], now: float | None = None) -> None:
        self.agents = sorted(agents, key=lambda one: (one.get("devices", []), one.get("pid", 0)))
        self._now = time.time() if now is None else now

    @property
    def ok(self) -> bool:
        """Whether all is well with all of them."""
        return all(one.get("ok") for one in self.agents)

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``status --output json``."""
        return {"schema": 1, "ok": self.ok, "agents": self.agents}

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield what a person reads."""
        for number, one in enumerate(self.agents):
            if number:
                yield ""
            yield from self._screen(one, paint)

    # ---- one agent

    def _screen(self, one: dict[str, Any], paint: Paint) -> Iterator[str]:
        status = str(one.get("status"))
        devices = ", ".join(one.get("devices", ())) or "no device yet"
        said = _HEADLINES.get(status, status)
        if status == "starting" and one.get("awaiting"):
            said = f"starting: {one['awaiting']}"
        verdict = paint(said, _COLOURS.get(status, "red"))
        yield f"{paint(devices, 'bold')}: {verdict}"
        yield from columns(self._facts(one), indent="  ")
        for title, lines in self._lists(one):
            if lines:
                yield f"{title}:"
                yield from (f"  {line}" for line in lines[:LISTED])
                if len(lines) > LISTED:
                    yield f"  ... and {len(lines) - LISTED} more (--output json)"

    def _facts(self, one: dict[str, Any]) -> Iterator[tuple[str, str]]:
        started = f", since {self._ago(one['started'])}" if one.get("started") else ""
        yield "agent", f"flannel-dp {one['version']}, process {one['pid']}{started}"
        mode = f", mode {one['mode']}, VNI {one['vni']}" if one.get("mode") else ""
        yield "node", f"{one['node']}{mode}"
        for number, family in one["families"].items():
            device = f", {family['device']}" if family["device"] else ""
            yield (
                f"IPv{number}",
                f"{family['subnet']} of {family['network']}, at {family['address']} on "
                f"{family['interface']}{device}, MTU {family['mtu']}",
            )
        source = one["source"]
        if source["origin"]:
            state = "ok" if source["ok"] else "unavailable"
            changed = f", last change {self._ago(source['changed'])}" if source["changed"] else ""
            yield "source", f"{source['origin']}: {state}{changed}"
        for number, peers in one["peers"].items():
            paths = [f"{n} {path}" for path, n in peers.items() if path != "total"]
            yield f"peers, IPv{number}", f"{peers['total']}: {', '.join(paths)}"
        if lives := (one["probes"] or {}).get("lives"):
            for number, by in lives.items():
                found = ", ".join(f"{value} {life}" for life, value in by.items() if value)
                every = one["probes"]["interval"]
                yield f"probes, IPv{number}", f"{found or 'none'}; one every {every:.3g} s"
        if mtus := (one["probes"] or {}).get("path_mtu"):
            yield from self._path_mtus(mtus)
        audit = one["audit"]
        if audit["last"]:
            found = "nothing to repair"
            if audit["written"]:
                found = f"{count(audit['written'], 'entry', 'entries')} repaired"
            text = f"{self._ago(audit['last'])}, {found}; {audit['count']} so far"
            yield "audit", f"{text}, every {audit['interval']:g} s"
        shown = [f"{value} {name}" for name, value in one["counters"].items() if value]
        yield "counters", ", ".join(shown) or "none yet"

    def _path_mtus(self, mtus: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if mtus["narrow"]:
            some = [f"{each['subnet']} {each['path_mtu']}" for each in mtus["peers"][:LISTED]]
            more = ", ..." if mtus["narrow"] > len(some) else ""
            what = count(mtus["narrow"], "path takes", "paths take")
            yield "path MTU", f"{what} less than the device sends: {', '.join(some)}{more}"

    def _lists(self, one: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
        yield (
            "problems",
            [
                f"{each['problem']}: {each['text']}"
                + (f" (since {self._ago(each['since'])})" if each["since"] else "")
                for each in one["problems"]
            ],
        )
        ill = (one["probes"] or {}).get("peers", ())
        yield (
            "peers that are not well reachable",
            [f"{each['subnet']} at {each['endpoint']}: {each['text']}" for each in ill],
        )
        rejected = one["rejected"]
        total = sum(rejected["reasons"].values())
        lines = [
            f"{each['lease']} ({each['reason']}): {each['detail']}" for each in rejected["leases"]
        ]
        yield f"rejected leases ({total})", lines
        yield "warnings", [*one["warnings"]]
        yield "last repairs", [*map(self._repair, one["repairs"])]

    def _repair(self, one: dict[str, Any]) -> str:
        what = one["after"] or one["before"]
        by = f" by {one['program']}" if one["program"] else ""
        verb = _REPAIRS.get(one["change"], "repaired")
        return f"{self._ago(one['time'])}: {verb} {what} ({one['change']}{by})"

    def _ago(self, moment: float) -> str:
        """Return a time as "14:03:20 (5 min ago)"."""
        then = datetime.fromtimestamp(moment).astimezone()
        form = "%H:%M:%S" if abs(self._now - moment) < 86400 else "%Y-%m-%d %H:%M:%S"
        return f"{then.strftime(form)} ({human_time(max(0.0, self._now - moment))} ago)"
