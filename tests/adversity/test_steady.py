"""Doing it again: a sync with nothing to do, restarts under traffic, a thousand syncs."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.kernel import expected, ifindex, observed
from tests.lib.leases import DEVICE, NETWORK, address, lease_of, peers, plane, subnet
from tests.lib.monitor import Monitor
from tests.lib.traffic import Pings, pod, pod_address
from tests.lib.waiting import LIMIT

ROOT = Path(__file__).parents[2]
#: One object more for each sync, in a quarter of them, is more than Python keeps for later.
SYNCS = 240


def test_a_second_sync_of_a_thousand_peers(host: Any, family: int) -> None:
    """Nothing sent, nothing announced."""
    leases = [lease_of(host), *peers(range(1, 1001))]
    with plane(host, family) as dp:
        assert dp.sync(leases).ok
        sent = dp.kernel.channel.messages_sent
        with Monitor(host) as monitor:
            reports = [dp.sync(leases) for _ in range(5)]

            assert monitor.events() == []
        assert dp.kernel.channel.messages_sent == sent
    assert all(report.ok and report.writes == 0 for report in reports)


class Stream:
    """Bytes from one namespace to another over TCP, all the time, while this is open."""

    def __init__(self, source: str, target: str, address: str) -> None:
        self._address = address
        self._listener: socket.socket = call_in_netns(target, self._listen)
        self._client: socket.socket = call_in_netns(source, self._connect)
        self._server, _ = self._listener.accept()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._send, self._sink)]
        self.received = 0
        self.broken: list[OSError] = []

    def _listen(self) -> socket.socket:
        kind = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return socket.create_server((self._address, 7777), family=kind)

    def _connect(self) -> socket.socket:
        return socket.create_connection((self._address, 7777), timeout=LIMIT)

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._threads[0].join()
        self._client.close()
        self._threads[1].join()
        self._server.close()
        self._listener.close()

    def _send(self) -> None:
        while not self._stop.wait(0.002):
            try:
                self._client.sendall(bytes(4096))
            except OSError as error:
                self.broken.append(error)
                return

    def _sink(self) -> None:
        try:
            while data := self._server.recv(1 << 16):
                self.received += len(data)
        except OSError as error:
            self.broken.append(error)


def test_restarts_lose_no_packet_and_break_no_connection(
    lab: Any,
    make_host: Callable[..., Any],
    lease_file: Callable[..., str],
    tmp_path: Path,
    wait_until: Callable[..., None],
    family: int,
) -> None:
    """The command is run again and again on one of two nodes while their pods talk, with
    other peers coming and going; the pods do not notice, the device stays."""
    here, there = make_host(), make_host()
    pods = [pod(lab, here, 0), pod(lab, there, 1)]
    both = [lease_of(here, 0), lease_of(there, 1)]
    config = tmp_path / "net-conf.json"
    document: dict[str, Any] = {"Backend": {"Type": "vxlan"}}
    if family == 4:
        document |= {"Network": NETWORK[4], "SubnetLen": 24}
    else:
        document |= {"IPv6Network": NETWORK[6], "EnableIPv6": True, "EnableIPv4": False}
    config.write_text(json.dumps(document))
    files = [lease_file([*both, *peers(range(a, a + 60))]) for a in (2, 20, 40, 15)]

    def command(path: str) -> None:
        words = ["sync", "--leases", path, "--net-conf", str(config), "--iface", "eth0"]
        words += ["--netns", here.ns, "--output", "json"]
        done = programs.run(
            [sys.executable, "-m", "flannel_dp", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    with plane(there, family) as far:
        far.sync(both)
        command(files[0])
        index = ifindex(here, DEVICE[family])
        target = pod_address(family, 1)
        with (
            Pings(pods[0], target) as pings,
            Stream(pods[0], pods[1], target) as stream,
        ):
            for path in (files[0], *files, *files):
                command(path)
            far.sync(both)
            seen = stream.received
            wait_until(lambda: stream.received > seen)
            pings.await_answers(3)

    assert pings.lost == 0
    assert stream.broken == []
    assert ifindex(here, DEVICE[family]) == index
    assert observed(here, family) == expected([both[1], *peers(range(15, 75))], family)


@pytest.mark.parametrize("families", ["4", "46"], ids=["ipv4", "dual"])
def test_hundreds_of_syncs_leave_no_trace_in_the_process(
    host: Any,
    lease_file: Callable[..., str],
    worker: Callable[..., list[Any]],
    families: str,
) -> None:
    leases = [lease_of(host), *peers(range(1, 41))]
    [found] = worker("many-syncs", host.ns, families, lease_file(leases), SYNCS)

    assert found["fds"] == 0
    # Python keeps some objects for later, fewer and fewer; a leak is in every quarter.
    assert min(found["blocks"]) < SYNCS // len(found["blocks"]), "not one object for every sync"
    assert found["malloc"] < 100 * SYNCS
    assert found["rss"] < 1 << 20


def test_without_file_descriptors_there_is_an_error_of_ours(
    host: Any, lease_file: Callable[..., str], worker: Callable[..., list[Any]]
) -> None:
    """RLIMIT_NOFILE: whatever could not be opened, the error is typed and nothing leaks."""
    path = lease_file([lease_of(host), *peers(range(1, 20))])
    found = worker("few-descriptors", host.ns, "46", path)

    assert found[-1]["ok"]
    assert len(found) > 1
    assert all(
        attempt["error"] == "KernelError" and "ulimit" in attempt["hint"] for attempt in found[:-1]
    ), found
    assert all(attempt["leaked"] == 0 for attempt in found)
    assert observed(host, 4) == expected(peers(range(1, 20)), 4)


def test_tables_read_ahead_are_those_read_in_place(host: Any, family: int) -> None:
    """Large syncs read the kernel on a second thread; what it finds is the same."""
    leases = [lease_of(host), *peers(range(1, 2100))]
    with plane(host, family, allow_shrink=True) as dp:
        dp.sync(leases)
        stray = address(family, 4000)
        host.ip(f"neigh replace {stray} lladdr 02:00:00:00:00:99 dev {DEVICE[family]}")
        host.ip(
            f"-{family} route del {subnet(family, 7)} dev {DEVICE[family]}"
            if family == 6
            else f"route del {subnet(4, 7)}"
        )
        report = dp.sync(leases)

        assert report.ok
        assert report.tables["neighbour"]["removed"] == 1
        assert report.tables["route"]["added"] == 1
        assert dp.sync(leases).writes == 0
        assert dp.sync(leases[:1000]).tables["route"]["removed"] == 1100
