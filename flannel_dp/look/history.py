"""``flannel-dp history``: what happened to the peers of this node, when, and why."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec

from flannel_dp.errors import ConfigError
from flannel_dp.look.events import OF_NODE, Event
from flannel_dp.look.history_file import Kept, Peer
from flannel_dp.look.terminal import Paint, count, human_time, plain

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

_COLOURS = {
    "removed": "red",
    "problem": "red",
    "rejected": "yellow",
    "changed": "yellow",
    "narrow": "yellow",
}
_COLOURS |= dict.fromkeys(("added", "accepted", "recovered", "reachable", "wide"), "green")
_COLOURS["unreachable"] = "red"

_WORDS = {
    "started": "the agent started: flannel-dp {after}",
    "stopped": "the agent stopped; the kernel kept forwarding",
    "added": "peer {peer} was added: {after}",
    "removed": "peer {peer} was removed: {before}",
    "changed": "peer {peer} has changed from {before} to {after}",
    "rejected": "lease {peer} is rejected ({reason})",
    "accepted": "lease {peer} is not rejected any more",
    "unreachable": "peer {peer} became unreachable",
    "reachable": "peer {peer} was reachable again",
    "narrow": "the path to peer {peer} took packets of {after} and no larger ones",
    "wide": "the path to peer {peer} took packets of {after} again",
    "problem": "problem ({problem}) began",
    "recovered": "problem ({problem}) ended",
}
_REPAIRS = {
    "deleted": "another program deleted {after}; restored",
    "changed": "another program made it {before}; restored {after}",
    "added": "another program added {before}; removed",
    "": "repaired {after}",
}

#: What may be an address in the words of an entry.
_ADDRESS = re.compile(r"[0-9a-fA-F.:]{3,}")


class Answer:
    """The events that were asked for, the oldest first; ``peers`` are those that ``query`` means,
    ``left_out`` is how many older events ``limit`` left out."""

    def __init__(
        self,
        kept: Kept,
        query: str = "",
        *,
        since: float = 0.0,
        limit: int = 0,
        now: float | None = None,
    ) -> None:
        self._now = time.time() if now is None else now
        self.query, self.kept_since = query, kept.since
        self.peers: Sequence[Peer] = kept.find(query) if query else ()
        found = [one for one in kept.events if one.time >= since and self._concerns(one)]
        self.left_out = max(0, len(found) - limit) if limit else 0
        self.events = found[self.left_out :]

    def _concerns(self, event: Event) -> bool:
        """Return whether an event is about a peer that was asked for, or the node as a whole."""
        if not self.query or event.kind in OF_NODE:
            return True
        for peer in self.peers:
            if event.peer and peer.name.lower() == event.peer.lower():
                return True
            if peer.subnet and peer.subnet == event.subnet:
                return True
            if event.kind == "repaired" and not event.subnet and _mentions(event, peer):
                return True
        return False

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``history --output json``."""
        names = Event.__struct_fields__
        return {
            "schema": 1,
            "query": self.query,
            "peers": [peer._asdict() for peer in self.peers],
            "kept_since": self.kept_since,
            "left_out": self.left_out,
            "events": [{name: getattr(one, name) for name in names} for one in self.events],
        }

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield what a person reads."""
        for peer in self.peers:
            now = "is a peer" if peer.present else paint("is no peer any more", "red")
            yield f"{peer.name} {now}: {peer.described}".removesuffix(": ")
        if self.left_out:
            yield f"... {count(self.left_out, 'older event')} left out (--limit 0 shows all)"
        for one in self.events:
            yield f"{self._when(one.time)}  {paint(words_of(one), _COLOURS.get(one.kind, ''))}"
        if not self.events:
            since = f" since {self._when(self.kept_since)}" if self.kept_since else ""
            yield f"no events{since}"

    def _when(self, moment: float) -> str:
        """Return local time and how long ago: "2026-11-27 03:12:04 (6 h ago)"."""
        then = datetime.fromtimestamp(moment).astimezone()
        ago = f"({human_time(max(0.0, self._now - moment))} ago)"
        return f"{then:%Y-%m-%d %H:%M:%S} {ago:<12}"


def words_of(event: Event) -> str:
    """Return an event as a sentence, with its cause and the program that did it."""
    if event.kind == "repaired":
        form = _REPAIRS.get(event.change, "repaired {after}")
        if event.program:
            form = form.replace("another program", event.program, 1)
        if event.peer:
            form += " (peer {peer})"
    elif event.kind == "rejected" and not event.peer:
        return event.cause
    else:
        form = _WORDS.get(event.kind, event.kind)
    text = form.format(**msgspec.structs.asdict(event))
    if event.kind == "changed":
        return f"peer {event.peer} has changed: {event.cause}" if "from" in event.cause else text
    return f"{text}: {event.cause}" if event.cause else text


def since_of(text: str, now: float) -> float:
    """Return the time that "2h", "30min", "03:12" or "2026-11-27 03:12" means, in seconds since the
    epoch. Raises ConfigError."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|d)", text):
        return now - float(found[1]) * _UNITS[found[2]]
    today = datetime.fromtimestamp(now).astimezone()
    try:
        if re.fullmatch(r"\d\d:\d\d(:\d\d)?", text):
            then = datetime.fromisoformat(f"{today:%Y-%m-%d} {text}").astimezone()
            return (then if then <= today else then - timedelta(days=1)).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"--since {text!r} is no time", hint="give '2h', '30min', '03:12' or '2026-11-27 03:12'"
        ) from None


def _mentions(event: Event, peer: Peer) -> bool:
    """Return whether the words of an entry name the peer's MAC, endpoint, or an address of its
    subnet."""
    if not peer.subnet:
        return False
    text, network = f"{event.before} {event.after}", ip_network(peer.subnet)
    if peer.mac and peer.mac in text:
        return True
    for word in _ADDRESS.findall(text):
        try:
            address = ip_address(word)
        except ValueError:
            continue
        if address.version == network.version and address in network:
            return True
    return False
