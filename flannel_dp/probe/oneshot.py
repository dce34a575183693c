"""One round of proof: all peers of one place probed, and those that are silent asked why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp.probe.singles import answering_outside, other_macs, refusing
from flannel_dp.probe.target import Place, Target
from flannel_dp.probe.verdict import Evidence
from flannel_dp.probe.volleys import SMALLEST, Volleys

#: Volleys beside the ordinary ones: for each path where some were lost, and for the search of path
#: MTUs, in which so many sizes are tried at a time, twice each. A search by halves takes 11 steps.
_AGAIN, _SIZES = 3, 8
_SEARCH = 11 * 2 * _SIZES

#: Silent peers that are asked one by one; of more the underlay is at fault, or this node.
_ASKED = 64

Told = Callable[[int, int], None]


class Effort(Struct, frozen=True):
    """How much is sent: ``count`` probes per peer, by ``paths`` source ports in turn, each waited
    for ``timeout`` seconds. Without ``search`` the path MTU is only tested, not searched for."""

    count: int = 8
    paths: int = 8
    timeout: float = 1.0
    search: bool = True


ORDINARY = Effort()


class Result(Struct, frozen=True):
    """What was found of one peer: its round trips in seconds, sorted, and the evidence."""

    target: Target
    place: Place
    trips: tuple[float, ...]
    evidence: Evidence


def probe_place(
    place: Place,
    targets: Sequence[Target],
    effort: Effort,
    *,
    own_problem: str = "",
    told: Told = lambda done, total: None,
) -> list[Result]:
    """Probe ``targets``, all of one place, in the caller's network namespace.

    ``own_problem`` says what is wrong with this node's external interface, which explains all
    silence. ``told(answered, total)`` is called meanwhile. Raises KernelError; NotPermitted
    without CAP_NET_RAW.
    """
    paths = min(effort.paths, effort.count)
    most = effort.count + 2 + _AGAIN * paths + _SEARCH
    with ExitStack() as stack:
        loop = stack.enter_context(Volleys.through(place, targets, most, paths=paths))
        asked = [number for number, one in enumerate(targets) if one.vtep]
        echo = stack.enter_context(
            Volleys.echo(place.source, [targets[number].vtep for number in asked], 2)
        )
        echoes = [echo.send(), echo.send()] if asked else []
        first = {loop.send(path=number % paths): number % paths for number in range(effort.count)}
        full = [loop.send(size=place.mtu), loop.send(size=place.mtu)]
        loop.settle([*first, *full], effort.timeout, lambda: told(0, len(targets)))
        echo.settle(echoes, effort.timeout / 4)
        heard = {number: echo.answered(at, echoes) for at, number in enumerate(asked)}
        again = _send_again(loop, first, paths, effort.timeout)
        found = []
        for number, target in enumerate(targets):
            volleys = {**first, **again.get(number, {})}
            by_path = _by_path(loop, number, volleys, paths)
            evidence = Evidence(
                (len(volleys), sum(came for _, came in by_path)),
                (len(echoes), heard[number]) if number in heard else None,
                by_path,
                place.mtu,
                place.mtu if loop.answered(number, full) else None,
                target.state,
                place.is_tunnel,
                own_problem=own_problem,
            )
            found.append(Result(target, place, tuple(loop.trips(number, volleys)), evidence))
        if effort.search:
            found = _with_path_mtus(loop, found, effort.timeout)
    return _with_reasons(found, effort.timeout)


def _by_path(
    loop: Volleys, peer: int, volleys: Mapping[int, int], paths: int
) -> tuple[tuple[int, int], ...]:
    """Return how many of a peer's ``volleys`` were sent and answered, by path."""
    counts = [[0, 0] for _ in range(paths)]
    for volley, path in volleys.items():
        counts[path][0] += 1
        counts[path][1] += loop.answered(peer, (volley,))
    return tuple((sent, came) for sent, came in counts)


def _send_again(
    loop: Volleys, first: Mapping[int, int], paths: int, timeout: float
) -> dict[int, dict[int, int]]:
    """Send more to peers that lost some probes, by each path: is it one path that loses them?
    Return these volleys with their paths, by peer."""
    partly = [n for n in range(len(loop)) if 0 < loop.answered(n, first) < len(first)]
    if not partly:
        return {}
    extra = {loop.send(partly, path=path): path for _ in range(_AGAIN) for path in range(paths)}
    loop.settle(extra, timeout)
    return dict.fromkeys(partly, extra)


def _with_path_mtus(loop: Volleys, found: list[Result], timeout: float) -> list[Result]:
    """Search for the path MTU of peers that answer, and not at the device's MTU: by halves, for all
    of them at once. Each size is tried twice, as one packet may be lost by itself."""
    ranges = {
        number: (SMALLEST[one.place.family], one.evidence.mtu)
        for number, one in enumerate(found)
        if one.trips and one.evidence.path_mtu is None
    }
    slowest = max((one.trips[-1] for one in found if one.trips), default=0)
    wait = min(timeout, max(0.2, 20 * slowest))
    while any(high - low > 1 for low, high in ranges.values()):
        sizes: dict[int, list[int]] = {}
        for number, (low, high) in ranges.items():
            if high - low > 1:
                sizes.setdefault((low + high) // 2, []).append(number)
        # Few sizes at a time: how many volleys there may be is settled when the socket is made.
        chosen = [*sizes.items()][:_SIZES]
        if loop.left < 2 * len(chosen):
            break
        sent = [
            (size, numbers, [loop.send(numbers, size=size), loop.send(numbers, size=size)])
            for size, numbers in chosen
        ]
        loop.settle([volley for *_, volleys in sent for volley in volleys], wait)
        for size, numbers, volleys in sent:
            for number in numbers:
                low, high = ranges[number]
                ranges[number] = (size, high) if loop.answered(number, volleys) else (low, size)
    return [
        replace(one, evidence=replace(one.evidence, path_mtu=ranges[number][0]))
        if number in ranges
        else one
        for number, one in enumerate(found)
    ]


def _with_reasons(found: list[Result], timeout: float) -> list[Result]:
    """Ask the peers that forwarded nothing back why. Where others answer, a little more than they
    take is waited for."""
    silent = [n for n, one in enumerate(found) if not one.trips and not one.evidence.own_problem]
    if not silent:
        return found
    place, targets = found[0].place, [found[number].target for number in silent]
    slowest = max((one.trips[-1] for one in found if one.trips), default=timeout)
    wait = min(timeout, max(timeout / 2, 20 * slowest))
    under = echoes(place.local, [one.endpoint for one in targets], wait)
    inside: list[bool | None] = [None] * len(targets)
    if place.is_tunnel and (":" in place.source) == (":" in place.local):
        inside = [*echoes(place.source, [one.endpoint for one in targets], wait)]
    chosen = targets[:_ASKED] if place.is_tunnel else []
    detours = _by_detours(place, chosen, wait)
    refused = refusing(place, chosen, wait)
    outside = answering_outside(place, chosen, wait)
    macs = other_macs(place, chosen, wait)
    result = [*found]
    for at, number in enumerate(silent):
        asked = at < len(chosen)
        evidence = replace(
            result[number].evidence,
            underlay=under[at],
            inside=inside[at],
            refused=refused[at] if asked else None,
            outside=outside[at] if asked else None,
            detour=detours[at] if asked else None,
            other_mac=macs[at] if asked else None,
        )
        result[number] = replace(result[number], evidence=evidence)
    return result


def _by_detours(place: Place, targets: Sequence[Target], timeout: float) -> list[bool]:
    """Return of each peer whether another node forwards here what the peer should have sent."""
    if not targets:
        return []
    with Volleys.through(place, targets, 2, paths=1, hops=2) as loop:
        volleys = [loop.send(), loop.send()]
        loop.settle(volleys, timeout)
        return [loop.answered(number, volleys) > 0 for number in range(len(targets))]


def echoes(source: str, addresses: list[str], timeout: float) -> list[bool]:
    """Return of each address whether it answers an ICMP echo request from ``source``."""
    with Volleys.echo(source, addresses, 2) as echo:
        volleys = [echo.send(), echo.send()]
        echo.settle(volleys, timeout)
        return [echo.answered(number, volleys) > 0 for number in range(len(addresses))]
