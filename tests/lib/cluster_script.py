"""Scripts about a node of a cluster: leases, the node's entries before, plan, entries after.

They are written with the addresses of IPv4, and run for both families. For IPv6, a text of the
left form becomes that of the right:

    10.240.N.H               fd00:10:N::H           network of the pods; N is the node's number
    10.240.N.0/24            fd00:10:N::/64         subnet of a node
    10.240.N.0/20, /26 ..    fd00:10:N::/44, /66 .. more of the subnets, or a part of one
    198.18.0.N               2001:db8:1::N          address of a peer
    192.0.2.N                2001:db8::N            network of this node's eth0, itself being 1
    203.0.113.N              2001:db8:9::N          another network
    0.0.0.0/0                ::/0
    02:00:00:04:00:N         02:00:00:06:00:N       MAC of node N's vxlan device
    flannel.1                flannel-v6.1
    nhid #10.240.N.0         via fd00:10:N:: dev flannel-v6.1

and what a plan says of nexthop objects is left out, which are for IPv4 alone.

Sections are steps, and come in this order or any other, as often as need be:

    leases              what the source publishes from now on, a lease a line: "this node" (number
                        0), "node 5", "nodes 5 to 9". What is not said follows from the number;
                        "node 5 named a", "subnet S", "address A", "MAC M", "VNI 7", "backend B",
                        "made at 20" and "written at 30" (revisions of etcd) change it
    on the node         commands that another program runs; "device other0" makes a device
    plan                what a plan says, line by line, those of one table in any order.
                        "#10.240.N.0" is the number of the nexthop
                        object of that gateway, and a line that ends in ".." goes on
    sync                a sync with these leases, and its outcome:
                            ok | not ok
                            writes N            (left out: as many as may be)
                            rejected NAME: REASON, and names WORD (in what it says)
                            conflict: PREFIX
                            error: words of the message
    plan by a new process, sync by a new process    the same, by one that remembers nothing
    update              changes of leases that the source reports: "add LEASE" or "remove NAME",
                        where NAME is "node 5" or the name of a lease
    outcome             that of the update
    after               the leases whose peers the kernel has: exactly their routes, neighbours,
                        FDB entries and, for IPv4, nexthop objects; "nothing" for none
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from flannel_dp import BackendData, DataPlane, FlannelDPError, Lease
from tests.lib.kernel import expected, observed, places, stranger
from tests.lib.leases import DEVICE, lease_of, mac, peer, plane
from tests.lib.script import Script

STEPS = (
    *("leases", "on the node", "plan", "plan by a new process", "sync", "sync by a new process"),
    *("update", "outcome", "after"),
)
#: Called with the data plane, the host, and all leases but this node's.
Check = Callable[[DataPlane, Any, list[Lease]], None]

_FIELDS = r" (named|subnet|address|MAC|VNI|backend|made at|written at) (\S+)"


def in_family(text: str, family: int) -> str:
    """A text with IPv4 addresses as it is for a family."""
    if family == 4:
        return text
    text = re.sub(r"nhid #(\S+)", r"via \1 dev flannel.1", text)
    text = text.replace("flannel.1", DEVICE[6]).replace("02:00:00:04:", "02:00:00:06:")
    text = text.replace("0.0.0.0/0", "::/0")
    text = re.sub(r"\b10\.(\d+)\.(\d+)\.(\d+)(?:/(\d+))?", _overlay, text)
    for network, prefix in (
        ("198.18.0", "2001:db8:1::"),
        ("192.0.2", "2001:db8::"),
        ("203.0.113", "2001:db8:9::"),
    ):
        text = re.sub(rf"\b{network}\.(\d+)", lambda m, to=prefix: f"{to}{int(m[1]):x}", text)
    return text


def _overlay(match: re.Match[str]) -> str:
    second, third, host = int(match[1]), int(match[2]), int(match[3])
    number = (second - 240) << 8 | third
    text = (f"fd00:10:{number:x}::" if number else "fd00:10::") + (f"{host:x}" if host else "")
    if match[4] is None:
        return text
    length = int(match[4])
    assert host == 0 or length == 24, match[0]
    return f"{text}/{ {12: 32, 24: 64, 32: 128}.get(length, length + (24 if length < 24 else 40)) }"


def lease(host: Any, line: str) -> Lease:
    """The lease of a line such as "node 5 named a MAC 02:00:00:04:00:07"."""
    first, more = re.match(r"(this node|node \d+)(.*)$", line), ""
    assert first, f"no lease: {line!r}"
    more = first[2]
    fields: dict[str, Any] = {}
    for word, value in re.findall(_FIELDS, more):
        match word:
            case "named":
                fields["name"] = value
            case "subnet":
                fields |= {"subnet": value, "ipv6_subnet": in_family(value, 6)}
            case "address":
                fields |= {"public_ip": value, "public_ipv6": in_family(value, 6)}
            case "MAC":
                fields["backend_data"] = BackendData(1, value)
                fields["backend_v6_data"] = BackendData(1, in_family(value, 6))
            case "VNI":
                number = int(first[1].split()[1])
                fields["backend_data"] = BackendData(int(value), mac(4, number))
                fields["backend_v6_data"] = BackendData(int(value), mac(6, number))
            case "backend":
                fields["backend_type"] = value
            case "made at":
                fields["revision"] = int(value)
            case "written at":
                fields["moved"] = int(value)
    assert re.fullmatch(f"({_FIELDS})*", more), f"not understood: {more!r}"
    if first[1] == "this node":
        own = lease_of(host)
        return peer(0, public_ip=own.public_ip, public_ipv6=own.public_ipv6, **fields)
    return peer(int(first[1].split()[1]), **fields)


def leases(host: Any, lines: Iterable[str]) -> list[Lease]:
    found = []
    for line in lines:
        if several := re.fullmatch(r"nodes (\d+) to (\d+)", line):
            found += [peer(n) for n in range(int(several[1]), int(several[2]) + 1)]
        else:
            found.append(lease(host, line))
    return found


class ClusterRun:
    """One script on one node, for one family. ``check`` is called after every sync and update
    that raised nothing."""

    def __init__(self, script: Script, host: Any, family: int, check: Check | None = None) -> None:
        script.check_names(*STEPS)
        self.script, self.host, self.family, self.check = script, host, family, check
        self.published: list[Lease] = []
        self._said: list[str] = []
        self._details: dict[str, str] = {}

    def run(self) -> None:
        with ExitStack() as stack:
            self._dp = stack.enter_context(plane(self.host, self.family))
            for number, (name, lines) in enumerate(
                ((one.name, one.lines) for one in self.script.sections), 1
            ):
                if name.endswith(" by a new process"):
                    self._dp.close()
                    self._dp = stack.enter_context(plane(self.host, self.family))
                try:
                    self._step(name.removesuffix(" by a new process"), lines)
                except BaseException as error:
                    error.add_note(f"{self.script.origin}, section {number}: {name}")
                    raise

    def _step(self, name: str, lines: list[str]) -> None:
        match name:
            case "leases":
                self.published = leases(self.host, lines)
            case "on the node":
                for line in lines:
                    self._command(line)
            case "plan":
                said = [_readable(line) for line in self._dp.plan(self.published).lines()]
                _compare(said, self._in_family(lines))
            case "sync":
                self._outcome(self._dp.sync, self.published)
                self._agree(lines)
            case "update":
                self._outcome(self._dp.update, *self._changes(lines))
            case "outcome":
                self._agree(lines)
            case "after":
                found = observed(self.host, self.family)
                wanted = expected(leases(self.host, lines), self.family)
                assert found == wanted, f"there is {found}, and not {wanted}"

    def _command(self, line: str) -> None:
        program, words = line.split(maxsplit=1)
        words = in_family(words, self.family)
        match program:
            case "device":
                stranger(self.host, words)
            case "bridge":
                self.host.bridge(words)
            case "ip":
                self.host.ip(f"-{self.family} {words}")
            case _:
                raise AssertionError(f"{self.script.origin}: cannot run {line!r}")

    def _in_family(self, lines: Iterable[str]) -> list[str]:
        return [
            in_family(line, self.family)
            for line in lines
            if self.family == 4 or not re.match(r"[+~-] nexthop ", line)
        ]

    def _changes(self, lines: Iterable[str]) -> tuple[list[Lease], list[Lease | str]]:
        """What is added and removed; it is published, and not any more, from now on."""
        added: list[Lease] = []
        removed: list[Lease | str] = []
        for line in lines:
            word, what = line.split(maxsplit=1)
            if word == "add":
                added.append(lease(self.host, what))
            else:
                assert word == "remove", line
                removed.append(peer(int(what.split()[1])) if what.startswith("node ") else what)
        gone = {one if isinstance(one, str) else one.label for one in removed}
        gone |= {one.label for one in added}
        self.published = [one for one in self.published if one.label not in gone] + added
        return added, removed

    def _outcome(self, act: Callable[..., Any], *given: Any) -> None:
        """Do it, and keep what is to be said of it."""
        try:
            report = act(*given)
        except FlannelDPError as error:
            self._said = [f"error: {error}"]
            return
        own = lease_of(self.host).key
        rejected = {f"rejected {_name(one.lease)}: {one.reason}": one for one in report.rejected}
        self._details = {line: one.detail for line, one in rejected.items()}
        self._said = [
            "ok" if report.ok else "not ok",
            f"writes {report.writes}",
            *rejected,
            *(f"conflict: {place}" for place in places(report.conflicts)),
        ]
        if self.check is not None:
            self.check(self._dp, self.host, [one for one in self.published if one.key != own])

    def _agree(self, lines: list[str]) -> None:
        """The outcome is that of the script."""
        wanted = self._in_family(lines)
        if [line[:6] for line in wanted] == ["error:"]:
            (said,) = self._said
            assert said.startswith("error: "), said
            assert wanted[0][7:] in said
            return
        said = self._said
        if not any(line.startswith("writes ") for line in wanted):
            said = [line for line in said if not line.startswith("writes ")]
        for number, line in enumerate(wanted):
            wanted[number], _, word = line.partition(", and names ")
            assert word in self._details.get(wanted[number], word), line
        assert sorted(said) == sorted(wanted), f"the outcome is {said}, and not {wanted}"


def _name(label: str) -> str:
    """A lease by its name, or as "node 5" where it has none."""
    found = re.match(r"10\.(\d+)\.(\d+)\.0-24", label)
    return f"node {(int(found[1]) - 240) << 8 | int(found[2])}" if found else label


def _readable(line: str) -> str:
    """A line of a plan, with the gateway in place of the number of its nexthop object."""
    return re.sub(
        r"\b(nexthop|nhid) (\d{9,})\b",
        lambda m: f"{m[1]} #10.{int(m[2]) >> 16 & 255}.{int(m[2]) >> 8 & 255}.{int(m[2]) & 255}",
        line,
    )


def _compare(said: list[str], wanted: list[str]) -> None:
    """Lines, of which those that end in ".." go on. What is done to one table is in any order."""
    said, wanted = _by_table(said), _by_table(wanted)
    cut = [
        line[: len(mine) - 2] + ".." if mine.endswith("..") else line
        for line, mine in zip(said, wanted, strict=False)
    ]
    said = [*cut, *said[len(cut) :]]
    assert said == wanted, "\n".join(["it says:", *said, "it should say:", *wanted])


def _by_table(lines: list[str]) -> list[str]:
    groups = groupby(lines, key=lambda line: line.split()[:2])
    return [line for _, group in groups for line in sorted(group)]
