"""A kernel that is busy, full, or does not let us: interrupted dumps, a full neighbour
table, missing capabilities."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DumpInterrupted
from tests.lib.kernel import everything, expected, has_device, observed, stranger
from tests.lib.leases import address, lease_of, peers, plane
from tests.lib.short import run

# ---- dumps ----------------------------------------------------------------------


@contextmanager
def churn(host: Any, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process adds and deletes a nexthop object of its own, without a pause, for
    longer than anybody looks (its end would fail the test)."""
    commands = folder / "churn"
    commands.write_text("nexthop add id 7 dev other0\nnexthop del id 7\n" * 500_000)
    with subprocess.Popen(["ip", "-n", host.ns, "-force", "-batch", str(commands)]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nothing_is_planned_from_an_interrupted_dump(host: Any, tmp_path: Path) -> None:
    """Nexthop objects of others come and go while ours are read, page after page. Each plan
    is empty, as everything is in order, or there is none (DumpInterrupted)."""
    leases = [lease_of(host), *peers(range(1, 2001))]
    stranger(host, "other0")
    with plane(host, 4) as dp:
        assert dp.sync(leases).ok
        plans = interrupted = 0
        with churn(host, tmp_path) as process:
            while plans + interrupted < 60:
                try:
                    plan = dp.plan(leases)
                except DumpInterrupted:
                    interrupted += 1
                else:
                    assert plan.is_empty, str(plan)
                    plans += 1
            assert process.poll() is None, "the churn ended before the plans did"


def test_the_kernel_does_interrupt_such_a_dump(host: Any, tmp_path: Path) -> None:
    """What the test above relies on: with one attempt, dumps under churn fail."""
    leases = [lease_of(host), *peers(range(1, 2001))]
    stranger(host, "other0")
    with plane(host, 4) as dp:
        dp.sync(leases)
        wanted = next(w for w in dp.state[4].tables if w.table.kind == "nexthop")
        interrupted = False
        with churn(host, tmp_path) as process:
            while not interrupted:
                assert process.poll() is None, "no dump was interrupted"
                try:
                    diff = dp.kernel.channel.diff(wanted.table, wanted.scopes, attempts=1)
                    assert len(diff) == 0
                except DumpInterrupted:
                    interrupted = True


# ---- a full table -----------------------------------------------------------------


@pytest.mark.alone
def test_a_full_neighbour_table_stops_no_sync(host: Any, family: int) -> None:
    """gc_thresh3 bounds the entries that are resolved, of all namespaces together;
    permanent ones are exempt (neigh_alloc, exempt_from_gc)."""
    version = "ipv4" if family == 4 else "ipv6"
    limit = int(Path(f"/proc/sys/net/{version}/neigh/default/gc_thresh3").read_text())
    stranger(host, "other0")
    lines = [
        f"neigh add {address(family, 1000 + n)[:-1] if family == 4 else address(family, 1000 + n)}"
        f"7 lladdr 02:bb:00:00:{n >> 8:02x}:{n & 255:02x} dev other0 nud reachable"
        for n in range(limit + 200)
    ]
    full = subprocess.run(
        ["ip", "-n", host.ns, "-force", "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No buffer space" in full.stderr
    leases = [lease_of(host), *peers(range(1, 301))]
    with plane(host, family) as dp:
        first, second = dp.sync(leases), dp.sync(leases)
        assert first.ok
        assert second.writes == 0
        action = f"'sysctl -w net.{version}.neigh.default.gc_thresh3={4 * limit}'"
        assert [action in text for text in first.warnings].count(True) == 1
        assert not any("gc_thresh3" in text for text in second.warnings)
        assert observed(host, family) == expected(leases[1:], family)
        assert dp.update(removed=[leases[5]]).ok
        assert dp.update(added=[leases[5]]).ok
    run("ip", "-n", host.ns, "link", "del", "other0")
    assert observed(host, family) == expected(leases[1:], family)


# ---- capabilities -------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["first", "later"])
def test_without_net_admin_nothing_happens(
    host: Any,
    lease_file: Callable[..., str],
    worker: Callable[..., list[Any]],
    family: int,
    there: bool,
) -> None:
    """Started without the capability: one error that names it, and not a trace."""
    leases = [lease_of(host), *peers(range(1, 20))]
    if there:
        with plane(host, family) as dp:
            dp.sync(leases[:10])
    before = everything(host)
    prefix = ("ip", "netns", "exec", host.ns, "setpriv", "--bounding-set=-net_admin")

    [found] = worker(
        "drop-capability", "", family, lease_file(leases), 0, prefix=(*prefix, "--inh-caps=-all")
    )

    assert found["error"] == "NotPermitted"
    assert "CAP_NET_ADMIN" in found["hint"]
    assert everything(host) == before
    assert has_device(host, family) == there


@pytest.mark.parametrize("messages", [1, 30, 100])
def test_net_admin_dropped_in_the_middle(
    host: Any,
    lease_file: Callable[..., str],
    worker: Callable[..., list[Any]],
    family: int,
    messages: int,
) -> None:
    """The error is the same, what was written is harmless, and root finishes the work."""
    leases = [lease_of(host), *peers(range(1, 60))]
    prefix = ("ip", "netns", "exec", host.ns)

    [found] = worker("drop-capability", "", family, lease_file(leases), messages, prefix=prefix)

    assert found["error"] == "NotPermitted"
    assert "CAP_NET_ADMIN" in found["hint"]
    state, whole = observed(host, family), expected(leases[1:], family)
    assert all(state[table] <= whole[table] for table in whole)
    assert sum(map(len, state.values())) == messages
    with plane(host, family) as dp:
        assert dp.sync(leases).ok
    assert observed(host, family) == whole
