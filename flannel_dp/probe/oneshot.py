"""One round of proof: all peers of one place probed, and those that are silent asked why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp.probe.offloaded import Offloaded, offloaded
from flannel_dp.probe.singles import answering_outside, other_macs, refusing
from flannel_dp.probe.target import Place, Target
from flannel_dp.probe.verdict import Evidence, share
from flannel_dp.probe.volleys import SMALLEST, Volleys

#: Volleys beside the ordinary ones: for each path where some were lost, and for the search of path
#: MTUs, in which so many sizes are tried at a time, twice each. A search by halves takes 11 steps.
_AGAIN, _SIZES = 3, 8
_SEARCH = 11 * 2 * _SIZES

#: Silent peers that are asked one by one; of more the underlay is at fault, or this node.
_ASKED = 64

#: A Linux host sends another an ICMP error each second (icmp_ratelimit); and a little.
_ERROR_PAUSE = 1.05

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
    silence. ``told(done, total)`` is called meanwhile, with peers. Raises KernelError; NotPermitted
    without CAP_NET_RAW.
    """
    paths = min(effort.paths, effort.count)
    most = effort.count + 2 + _AGAIN * paths + _SEARCH
    with Volleys.through(place, targets, most, paths=paths) as loop:
        first: dict[int, int] = {}
        for number in range(effort.count):
            first[loop.send(path=number % paths)] = number % paths
            told(len(targets) * number // (effort.count + 1), len(targets))
        full = [loop.send(size=place.largest)]
        loop.settle([*first, *full], effort.timeout)
        came = loop.counts(first)
        # One packet may be lost by itself.
        small = [n for n, large in enumerate(loop.counts(full)) if came[n] and not large]
        if small:
            full.append(loop.send(small, size=place.largest))
            loop.settle(full[1:], effort.timeout)
        again = _send_again(loop, first, came, paths, effort.timeout)
        large = loop.counts(full)
        every, none = (_evenly(effort.count, paths, answered) for answered in (1, 0))
        found = []
        for number, target in enumerate(targets):
            volleys, by_path = first, none if not came[number] else every
            if number in again:
                volleys = {**first, **again[number]}
                by_path = _by_path(loop, number, volleys, paths)
            evidence = Evidence(
                share(by_path),
                None,
                by_path,
                place.largest,
                place.largest if large[number] else None,
                target.state,
                place.is_tunnel,
                own_problem=own_problem,
            )
            found.append(Result(target, place, tuple(loop.trips(number, volleys)), evidence))
        if effort.search:
            found = _with_path_mtus(loop, found, effort.timeout)
    return _with_reasons(_with_offload(found, effort.timeout), effort.timeout)


def _evenly(count: int, paths: int, answered: int) -> tuple[tuple[int, int], ...]:
    """Return what ``_by_path`` does of a peer that has answered all (1) or none (0)."""
    sent = [len(range(path, count, paths)) for path in range(paths)]
    return tuple((one, one * answered) for one in sent)


def _by_path(
    loop: Volleys, peer: int, volleys: Mapping[int, int], paths: int
) -> tuple[tuple[int, int], ...]:
    """Return how many of a peer's ``volleys`` were sent and answered, by path."""
    counts = [[0, 0] for _ in range(paths)]
    for volley, path in volleys.items():
        counts[path][0] += 1
        counts[path][1] += len(loop.trips(peer, (volley,)))
    return tuple((sent, came) for sent, came in counts)


def _send_again(
    loop: Volleys, first: Mapping[int, int], came: Sequence[int], paths: int, timeout: float
) -> dict[int, dict[int, int]]:
    """Send more to peers that lost some probes, by each path: is it one path that loses them?
    Return these volleys with their paths, by peer."""
    partly = [number for number, count in enumerate(came) if 0 < count < len(first)]
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
            came = loop.counts(volleys)
            for number in numbers:
                low, high = ranges[number]
                ranges[number] = (size, high) if came[number] else (low, size)
    return [
        replace(one, evidence=replace(one.evidence, path_mtu=ranges[number][0]))
        if number in ranges
        else one
        for number, one in enumerate(found)
    ]


def _with_offload(found: list[Result], timeout: float) -> list[Result]:
    """Ask some of the peers that lose nothing whether what is left to the devices comes back whole.
    A program encapsulates probes of eBPF mode here, and leaves nothing to a device."""
    place = found[0].place if found else None
    asked = [number for number, one in enumerate(found) if one.trips and _is_whole(one.evidence)]
    asked = asked[:_ASKED]
    if place is None or not asked or not place.is_tunnel or place.external:
        return found
    answers = offloaded(place, [found[number].target for number in asked], timeout)
    common = _spoiled_by_all(answers)
    by_number, by_all = dict(zip(asked, answers, strict=True)), common is not None
    result = []
    for number, one in enumerate(found):
        # This node's card spoils what is for peers that were not asked, too.
        answer = by_number.get(number, common if one.trips else None)
        if answer is not None:
            evidence = replace(
                one.evidence,
                checksum=answer.checksum,
                segments=answer.segments,
                spoiled_by_all=by_all,
            )
            one = replace(one, evidence=evidence)
        result.append(one)
    return result


def _spoiled_by_all(answers: Sequence[Offloaded]) -> Offloaded | None:
    """Return what is spoiled by all that were asked, None for nothing."""
    kinds = [{one.checksum for one in answers}, {one.segments for one in answers}]
    found = [False if False in kind and True not in kind else None for kind in kinds]
    return Offloaded(*found) if False in found else None


def _is_whole(evidence: Evidence) -> bool:
    return evidence.loop[0] == evidence.loop[1]


def _with_reasons(found: list[Result], timeout: float) -> list[Result]:
    """Ask the peers that forwarded nothing back why. Where others answer, a little more than they
    take is waited for."""
    silent = [n for n, one in enumerate(found) if not one.trips and not one.evidence.own_problem]
    if not silent:
        return found
    place, targets = found[0].place, [found[number].target for number in silent]
    slowest = max((one.trips[-1] for one in found if one.trips), default=timeout)
    wait = min(timeout, max(timeout / 2, 20 * slowest))
    ends = [one.endpoint for one in targets]
    chosen = targets[:_ASKED] if place.is_tunnel else []
    asks_inside = place.is_tunnel and (":" in place.source) == (":" in place.local)
    time.sleep(max(0.0, _ERROR_PAUSE - timeout))  # since the last probe
    asked = threading.Event()
    # Each waits by itself, in this thread's network namespace.
    with ThreadPoolExecutor(6) as pool:
        refusal = pool.submit(refusing, place, chosen, wait, asked.set)
        refusal.add_done_callback(lambda _: asked.set())
        asked.wait()
        answers = (
            pool.submit(_by_vteps, place, targets, wait),
            pool.submit(_by_detours, place, chosen, wait),
            pool.submit(answering_outside, place, chosen, wait),
            pool.submit(other_macs, place, chosen, wait),
            pool.submit(echoes, place.local, ends, wait),
        )
        inside = echoes(place.source, ends, wait) if asks_inside else [None] * len(ends)
        heard, detours, outside, macs, under = (one.result() for one in answers)
        refused = refusal.result()
    result = [*found]
    for at, number in enumerate(silent):
        one_by_one = at < len(chosen)
        evidence = replace(
            result[number].evidence,
            echo=heard[at],
            underlay=under[at],
            inside=inside[at],
            refused=refused[at] if one_by_one else None,
            outside=outside[at] if one_by_one else None,
            detour=detours[at] if one_by_one else None,
            other_mac=macs[at] if one_by_one else None,
        )
        result[number] = replace(result[number], evidence=evidence)
    return result


def _by_vteps(
    place: Place, targets: Sequence[Target], timeout: float
) -> list[tuple[int, int] | None]:
    """Return how many ICMP echo requests the vxlan device of each peer was sent and answered."""
    found: list[tuple[int, int] | None] = [None] * len(targets)
    asked = [number for number, one in enumerate(targets) if one.vtep]
    if asked:
        with Volleys.echo(place.source, [targets[number].vtep for number in asked], 2) as echo:
            volleys = [echo.send(), echo.send()]
            echo.settle(volleys, timeout)
            for number, count in zip(asked, echo.counts(volleys), strict=True):
                found[number] = (len(volleys), count)
    return found


def _by_detours(place: Place, targets: Sequence[Target], timeout: float) -> list[bool]:
    """Return of each peer whether another node forwards here what the peer should have sent."""
    if not targets:
        return []
    with Volleys.through(place, targets, 2, paths=1, hops=2) as loop:
        volleys = [loop.send(), loop.send()]
        loop.settle(volleys, timeout)
        return [count > 0 for count in loop.counts(volleys)]


def echoes(source: str, addresses: list[str], timeout: float) -> list[bool]:
    """Return of each address whether it answers an ICMP echo request from ``source``."""
    with Volleys.echo(source, addresses, 2) as echo:
        volleys = [echo.send(), echo.send()]
        echo.settle(volleys, timeout)
        return [count > 0 for count in echo.counts(volleys)]
