"""What diverts packets of pods although our entries are right: decided from the evidence alone.

The kernel asks its policy rules in order of their numbers, and each table that a rule names, until
a route answers (fib_rules_lookup in net/core/fib_rules.c). Our routes are in table main, so a rule
before that of main, or a table that it names, can take packets away. Addresses that do are in
:mod:`flannel_dp.node.rivals`.

A rule that leaves the pod network alone is none of our business: those of wg-quick and Tailscale
are asked about every packet, and give most of them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import parse_prefix, prefix_holds
from flannel_dp.kernel.messages import RT_TABLE_MAIN
from flannel_dp.kernel.rules import (
    DROPS,
    GOTO,
    LOOKUP,
    NOP,
    PolicyRule,
    TableRoute,
    table_name,
)

#: So many routes of one table are named; the rest is counted.
_NAMED = 8

#: The number of the kernel's own rule for table main (fib_default_rules_init).
_MAIN_PRIORITY: Final = 32766

_NONE, _SOME, _ALL = 0, 1, 2


class Diversion(Struct, frozen=True):
    """One thing that diverts or drops packets of pods, or would.

    ``kind`` is "rule" (the rule itself drops), "route" (of a table that a rule names), "address"
    (on our device) or "device" (one that has a peer's address). ``prefix`` is what it takes,
    ``rule`` the number of the policy rule or -1, ``type`` that of the route ("" for unicast).
    ``of_tunnel`` says that it is about packets of the tunnel between nodes.
    """

    family: int
    kind: str
    text: str
    advice: str
    prefix: str
    rule: int = -1
    table: str = ""
    type: str = ""
    device: str = ""
    of_tunnel: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {self.advice}"


class Ground(Struct, frozen=True):
    """What of this node counts for packets of one family to ``network``.

    Those are packets of pods, or with ``local``, the address that they leave from, packets of the
    tunnel, which have to go by ``uplink`` (an ifindex). ``length`` is the prefix length of our
    shortest route, ``device`` the ifindex of our device or 0, ``pods`` are the ifindexes of
    devices with an address in this node's ``subnet``, and ``name`` gives a device's name.
    """

    family: int
    network: str
    subnet: str
    length: int
    device: int = 0
    pods: frozenset[int] = frozenset()
    name: Callable[[int], str] = "if{}".format
    local: str = ""
    uplink: int = 0

    @property
    def ip(self) -> str:
        """The command that lists and changes rules and routes of this family."""
        return "ip" if self.family == 4 else "ip -6"

    @property
    def packets(self) -> str:
        """Whose packets."""
        return "packets of the tunnel" if self.local else "packets of pods"


class Asked(Struct, frozen=True):
    """A rule that is asked before that of table main: about ``within``, and about all packets of
    pods to there unless it is only ``some``."""

    rule: PolicyRule
    within: str
    some: bool


# ---- policy rules


def asked_before_main(rules: Sequence[PolicyRule], ground: Ground) -> tuple[list[Asked], bool]:
    """Return the rules that packets of pods meet before table main, and whether they get there."""
    found: list[Asked] = []
    skipped = 0
    for rule in rules:
        if rule.priority < skipped or rule.action == NOP:
            continue
        share, within = _share(rule, ground)
        if share == _NONE:
            continue
        if rule.action == GOTO:
            if share == _ALL and any(one.priority == rule.target for one in rules):
                skipped = rule.target
            continue
        if rule.action == LOOKUP and rule.table == RT_TABLE_MAIN:
            if share == _ALL and rule.suppress < ground.length:
                return found, True
            continue
        found.append(Asked(rule, within, share == _SOME))
    return found, False


def answering_rule(
    rules: Sequence[PolicyRule], ground: Ground, table: int, length: int
) -> PolicyRule | None:
    """Return the rule by which a route of ``length`` in ``table`` answers for packets."""
    for rule in rules:
        share, _ = _share(rule, ground)
        if rule.action == LOOKUP and rule.table == table and share and rule.suppress < length:
            return rule
    return None


def _share(rule: PolicyRule, ground: Ground) -> tuple[int, str]:
    """Return how many packets of pods a rule is about, and to which part of the network."""
    within = ground.network
    shares = [_SOME] * bool(rule.partial) + [_NONE] * bool(rule.special or rule.oif)
    if rule.source and ground.local:
        shares.append(_ALL if holds(rule.source, _alone(ground.local)) else _NONE)
    elif rule.source:  # this node's own packets have no source yet
        shares.append(_SOME if _overlap(rule.source, ground.subnet) else _NONE)
    if rule.destination and not holds(rule.destination, ground.network):
        inside = holds(ground.network, rule.destination)
        within = rule.destination if inside and not rule.invert else within
        shares.append(_SOME if inside else _NONE)
    if rule.iif and ground.local:
        shares.append(_ALL if rule.iif == "lo" else _NONE)
    elif rule.iif:
        inner = {"lo"} | {ground.name(one) for one in (ground.device, *ground.pods) if one}
        shares.append(_SOME if rule.iif in inner else _NONE)
    if rule.mask and rule.mark:  # pods' packets carry no mark
        shares.append(_NONE)
    share = min(shares, default=_ALL)
    return (_ALL - share if rule.invert else share), within


def diversions(
    rules: Sequence[PolicyRule],
    tables: Mapping[int, Sequence[TableRoute]],
    ground: Ground,
) -> list[Diversion]:
    """Return what policy rules, and the ``tables`` that they name, do to packets of pods."""
    asked, reached = asked_before_main(rules, ground)
    found: list[Diversion] = []
    for one in asked:
        if one.rule.action != LOOKUP:
            found.append(_dropped(one, rules, ground))
            takes_all = True
        else:
            new, takes_all = _of_table(one, tables.get(one.rule.table, ()), rules, ground)
            found += new
        if takes_all and not one.some:
            break
    else:
        if not reached and not ground.local:
            found.append(_unreached(ground))
    return [replace(one, of_tunnel=True) for one in found] if ground.local else found


def _dropped(one: Asked, rules: Sequence[PolicyRule], ground: Ground) -> Diversion:
    rule = one.rule
    kind = DROPS.get(rule.action, "")
    return Diversion(
        ground.family,
        "rule",
        f"policy rule {rule.priority} ({rule}) drops {ground.packets} to {one.within}",
        f"'{_rule_del(rule, rules, ground)}' removes it",
        one.within,
        rule.priority,
        type=kind,
    )


def _unreached(ground: Ground) -> Diversion:
    command = f"{ground.ip} rule add pref {_MAIN_PRIORITY} lookup main"
    return Diversion(
        ground.family,
        "rule",
        f"no policy rule leads IPv{ground.family} packets of pods to table main, where the routes "
        f"to {ground.network} are",
        f"'{command}' adds it",
        ground.network,
        table="main",
    )


def _of_table(
    one: Asked, routes: Sequence[TableRoute], rules: Sequence[PolicyRule], ground: Ground
) -> tuple[list[Diversion], bool]:
    """Return what the routes of one table take, and whether that is all of ``one.within``."""
    rule, best, inside = one.rule, None, dict[str, TableRoute]()
    length = length_of(one.within)
    for route in sorted(routes, key=lambda route: route.metric, reverse=True):
        size = length_of(route.prefix)
        if size <= rule.suppress:
            continue
        if holds(route.prefix, one.within):
            if best is None or size >= length_of(best.prefix):
                best = route
        elif size > length and holds(one.within, route.prefix):
            inside[route.prefix] = route
    taking = [r for r in inside.values() if _diverts(r, ground)]
    taking.sort(key=lambda route: parse_prefix(route.prefix)[1:])
    found = [_route(one, route, ground) for route in taking[:_NAMED]]
    if len(taking) > _NAMED:
        found.append(_more(one, len(taking) - _NAMED, ground))
    if best is None or best.throws:
        return found, False
    if _diverts(best, ground):
        whole = length_of(best.prefix) < length_of(ground.network)
        found.append(_covering(one, best, rules, ground) if whole else _route(one, best, ground))
    return found, True


def _diverts(route: TableRoute, ground: Ground) -> bool:
    """Return whether a route takes packets elsewhere than ours, or those of this node's pods
    would."""
    if route.kind == "local" and route.prefix == _alone(route.prefix.partition("/")[0]):
        return not holds(ground.subnet, route.prefix)
    if route.throws or (ground.local and route.device == ground.uplink):
        return False
    if route.device in ground.pods and holds(ground.subnet, route.prefix):
        return False
    is_copy = route.device == ground.device != 0 and (route.gateway or route.nexthop)
    return not is_copy


def _route(one: Asked, route: TableRoute, ground: Ground) -> Diversion:
    does = "drops" if route.kind in DROPS.values() else "diverts"
    tos = f" tos {route.tos:#x}" if route.tos else ""
    table = table_name(one.rule.table)
    command = f"{ground.ip} route del {_printed(route.prefix)}{tos} table {table}"
    return Diversion(
        ground.family,
        "route",
        f"route {_words(route, ground)} in table {table}, which policy rule {one.rule.priority} "
        f"({one.rule}) has looked up before table main, {does} {ground.packets}",
        f"'{command}' removes it",
        route.prefix,
        one.rule.priority,
        table,
        route.kind,
        _device_of(route, ground),
    )


def _more(one: Asked, count: int, ground: Ground) -> Diversion:
    table = table_name(one.rule.table)
    what = f"1 more route in table {table} diverts or drops"
    if count != 1:
        what = f"{count} more routes in table {table} divert or drop"
    return Diversion(
        ground.family,
        "route",
        f"{what} {ground.packets} to {one.within}",
        f"'{ground.ip} route show table {table}' lists them",
        one.within,
        one.rule.priority,
        table,
    )


def _covering(
    one: Asked, route: TableRoute, rules: Sequence[PolicyRule], ground: Ground
) -> Diversion:
    """Return a default route, as of a VPN: it has its purpose, so that the pods are exempted."""
    rule, table = one.rule, table_name(one.rule.table)
    does = "drops" if route.kind in DROPS.values() else "diverts"
    remove = f"'{_rule_del(rule, rules, ground)}'"
    before = max(0, rule.priority - 1)
    exempt = f"'{ground.ip} rule add pref {before} to {ground.network} lookup main'"
    return Diversion(
        ground.family,
        "route",
        f"route {_words(route, ground)} in table {table}, which policy rule {rule.priority} "
        f"({rule}) has looked up before table main, {does} {ground.packets} to {one.within}",
        f"{exempt} exempts them, {remove} removes the rule"
        if rule.priority
        else f"{remove} removes the rule",
        one.within,
        rule.priority,
        table,
        route.kind,
        _device_of(route, ground),
    )


def _words(route: TableRoute, ground: Ground) -> str:
    """Return a route as ``ip route`` prints it."""
    words = [route.kind] * bool(route.kind) + [_printed(route.prefix)]
    words += [f"nhid {route.nexthop}"] * bool(route.nexthop)
    words += [f"via {route.gateway}"] * bool(route.gateway)
    device = _device_of(route, ground)
    return " ".join([*words, f"dev {device}"] if device else words)


def _device_of(route: TableRoute, ground: Ground) -> str:
    """IPv6 has routes that drop on lo; IPv4 has them on no device."""
    drops = route.kind in DROPS.values()
    return ground.name(route.device) if route.device and not drops else ""


def _rule_del(rule: PolicyRule, rules: Sequence[PolicyRule], ground: Ground) -> str:
    """``ip rule del``, with the selectors where another rule has the same number."""
    command = f"{ground.ip} rule del pref {rule.priority}"
    if sum(one.priority == rule.priority for one in rules) == 1:
        return command
    words = str(rule)
    negated = words.removeprefix("not ")
    return f"{ground.ip} rule del {'not ' if rule.invert else ''}pref {rule.priority} {negated}"


# ---- prefixes


def _alone(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


def length_of(prefix: str) -> int:
    """Return the length of a prefix."""
    return int(parse_prefix(prefix)[2])


def holds(outer: str, inner: str) -> bool:
    """Return whether ``outer`` holds all of ``inner``; False across families."""
    if not outer:
        return False
    inside, _, longer = inner.partition("/")
    return int(outer.rpartition("/")[2]) <= int(longer) and prefix_holds(outer, inside)


def _overlap(one: str, other: str) -> bool:
    return holds(one, other) or (bool(other) and holds(other, one))


def _printed(prefix: str) -> str:
    """Return a prefix as ``ip route`` prints it and takes it."""
    return "default" if prefix.endswith("/0") else prefix
