"""Work in another network namespace moves nobody: not the caller, not other threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from flannel_dp.kernel.netns import netns_path
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import lease_of, peer, peers, plane
from tests.lib.traffic import on_threads


def here() -> str:
    """The namespace of this very thread."""
    return os.readlink("/proc/thread-self/ns/net")


def all_threads(but: Iterable[str] = ()) -> set[str]:
    """The namespaces of all threads of this process, except those with these numbers."""
    found = set()
    for task in {*os.listdir("/proc/self/task")} - {*but}:
        try:
            found.add(os.readlink(f"/proc/self/task/{task}/ns/net"))
        except FileNotFoundError:  # it has ended meanwhile
            continue
    return found


def test_every_call_leaves_the_caller_where_it_is(
    host: Any, family: int, wait_until: Callable[..., None]
) -> None:
    home, others = here(), {*os.listdir("/proc/self/task")} - {str(threading.get_native_id())}
    leases = [lease_of(host), *peers(range(1, 30))]
    with plane(host, family) as dp:
        for call in (
            lambda: dp.plan(leases),
            lambda: dp.sync(leases),
            lambda: dp.update(added=[peer(40)], removed=[peer(1)]),
            lambda: dp.explain("10.240.5.5"),
            lambda: dp.sync(leases),
            lambda: dp.clean(),
        ):
            call()
            assert here() == home
            # A thread that has done its work takes a moment to vanish from /proc.
            wait_until(lambda: all_threads(others) == {home})


def test_a_thread_stays_home_while_another_one_syncs(host: Any, family: int) -> None:
    """Seen from a thread that looks as often as it can, while syncs run in another."""
    home, done, looks = here(), threading.Event(), [0]

    def look() -> None:
        while not done.is_set() or not looks[0]:
            assert here() == home
            assert os.stat("/proc/thread-self/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
            looks[0] += 1

    def sync() -> None:
        try:
            for turn in range(10):
                with plane(host, family, allow_shrink=True) as dp:
                    dp.sync([lease_of(host), *peers(range(1, 200 - turn * 10))])
                assert here() == home
        finally:
            done.set()

    on_threads(look, sync)
    assert observed(host, family) == expected(peers(range(1, 110)), family)


@pytest.mark.parametrize("how", ["name", "path", "descriptor"])
def test_two_namespaces_at_the_same_time(
    make_host: Callable[..., Any], family: int, how: str
) -> None:
    hosts = [make_host(), make_host()]
    sets = [peers(range(10, 150)), peers(range(100, 300))]
    opened: list[int] = []

    def work(number: int) -> Callable[[], None]:
        node, path = hosts[number], netns_path(hosts[number].ns)
        netns: str | int = {"name": node.ns, "path": path}.get(how, -1)
        if netns == -1:
            netns = os.open(path, os.O_RDONLY)
            opened.append(netns)

        def sync() -> None:
            with plane(node, family, netns=netns, allow_shrink=True) as dp:
                for size in (50, 100, 140):
                    assert dp.sync([lease_of(node, number), *sets[number][:size]]).ok

        return sync

    on_threads(work(0), work(1))
    for fd in opened:
        os.close(fd)
    for number, node in enumerate(hosts):
        assert observed(node, family) == expected(sets[number][:140], family)


def test_one_data_plane_used_by_many_threads(host: Any) -> None:
    """Its calls take turns; the last word is that of a sync with everything."""
    with plane(host, allow_shrink=True) as dp:
        leases = [lease_of(host), *peers(range(1, 60))]
        dp.sync(leases)
        on_threads(
            *(
                lambda n=n: [dp.update(added=[peer(n)], removed=[peer(n - 5)]) for _ in range(10)]
                for n in (70, 80, 90)
            ),
            lambda: [dp.plan(leases) for _ in range(10)],
            lambda: [dp.sync(leases) for _ in range(10)],
        )
        assert dp.sync(leases).ok
        assert dp.plan(leases).is_empty
    for family in (4, 6):
        assert observed(host, family) == expected(leases[1:], family)


def test_the_callers_namespace_is_not_written_to(
    make_host: Callable[..., Any], family: int
) -> None:
    """The caller's own namespace is played by one that a thread moves into."""
    from flannel_dp.kernel.netns import call_in_netns

    caller, target = make_host(), make_host()
    before = everything(caller)

    def work() -> str:
        with plane(target, family) as dp:
            dp.sync([lease_of(target), *peers(range(5, 40))])
            dp.update(added=[peer(50)])
            dp.clean()
        return here()

    assert call_in_netns(caller.ns, work) == call_in_netns(caller.ns, here)
    assert everything(caller) == before
