"""Counters and ``sync --watch``: privileges, kill -9, repairs, /metrics."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flannel_dp import Counters
from flannel_dp._core import BpfMap
from flannel_dp.bpf import pins
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.counters.device import FILTER
from flannel_dp.resources.counters.reading import Reading
from tests.lib.bpf import tc
from tests.lib.hosts import Host
from tests.lib.leases import address, mac
from tests.lib.service import CAP_NET_ADMIN, Service, fetch, free_port

DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}


@pytest.fixture
def service(
    host: Host, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Service]:
    made = Service(host, family, tmp_path, wait_until)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def filters(service: Service) -> list[str]:
    device = DEVICE[service.family]
    if f" {device}: " not in service.host.ip("link show"):
        return []
    ways = ("ingress", "egress")
    return [way for way in ways if FILTER in tc(service.host, f"filter show dev {device} {way}")]


def await_counting(service: Service) -> None:
    service.await_clean()
    service.wait(lambda: filters(service) == ["ingress", "egress"])


def send(service: Service, peer: int, count: int) -> None:
    """Datagrams to the subnet of node ``peer``, which nobody receives."""
    kind = socket.AF_INET if service.family == 4 else socket.AF_INET6
    with call_in_netns(service.host.ns, socket.socket, kind, socket.SOCK_DGRAM) as udp:
        for _ in range(count):
            udp.sendto(b"x", (address(service.family, peer), 9))


def reading(service: Service) -> Reading:
    device = DEVICE[service.family]
    return Counters([device], service.host.ns).read()[device]


def sent(service: Service, peer: int) -> int:
    raw = bytes.fromhex(mac(service.family, peer).replace(":", ""))
    return reading(service).traffic(raw, service.family, "sent").packets


def test_counters_outlive_kill_9_and_are_found_again(service: Service) -> None:
    service.start("--counters")
    await_counting(service)
    send(service, 2, 5)
    service.end(signal.SIGKILL)
    send(service, 2, 7)
    assert sent(service, 2) == 12

    service.start("--counters")
    service.wait(lambda: service.said("is ready on node"))

    send(service, 2, 1)
    assert sent(service, 2) == 13
    assert "were loaded" not in service.log.read_text()  # the second one's log
    assert service.end() == 0
    assert filters(service) == ["ingress", "egress"]


def test_no_more_is_kept_than_before_and_repairs_go_on(service: Service) -> None:
    """Linux 5.19 and later: with CAP_NET_ADMIN alone filters are attached, maps read and
    pins made, by descriptors from before the privileges went."""
    service.start("--counters", "--audit-interval", "0.2")
    await_counting(service)
    service.wait(lambda: service.said("is ready on node"))
    lines = Path(f"/proc/{service.pid}/status").read_text().splitlines()
    assert f"CapEff:\t{CAP_NET_ADMIN:016x}" in lines
    device = DEVICE[service.family]

    tc(service.host, f"filter del dev {device} egress")
    service.wait(lambda: filters(service) == ["ingress", "egress"])

    pin = pins.pin_directory(device, service.host.ns) / "peers"
    pin.unlink()
    service.wait(pin.exists)

    service.host.ip(f"link del {device}")
    await_counting(service)
    send(service, 2, 3)
    assert sent(service, 2) == 3


def test_a_filter_that_somebody_removes_is_put_back_at_once(service: Service) -> None:
    """By the kernel's event: the next audit is an hour away."""
    service.start("--counters", "--audit-interval", "3600")
    await_counting(service)
    service.wait(lambda: service.said("is ready on node"))
    device = DEVICE[service.family]

    for what in (f"filter del dev {device} egress", f"qdisc del dev {device} clsact"):
        tc(service.host, what)
        service.wait(lambda: filters(service) == ["ingress", "egress"])

    send(service, 2, 3)
    assert sent(service, 2) == 3


def test_metrics_have_each_peers_traffic(service: Service) -> None:
    port = free_port(service.host)
    service.start("--counters", "--healthz-ip", "127.0.0.1", "--healthz-port", str(port))
    await_counting(service)
    service.wait(lambda: service.said("is ready on node"))
    send(service, 3, 4)

    code, text = fetch(service.host, port, "/metrics")

    assert code == 200
    lines = [line for line in text.splitlines() if line.startswith("flannel_dp_peer_packets_total")]
    assert len(lines) == 2 * 5
    (line,) = [one for one in lines if one.endswith(" 4.0")]
    for label in (f'family="{service.family}"', 'direction="sent"', address(service.family, 3)):
        assert label in line
    last = "flannel_dp_peer_last_packet_timestamp_seconds"
    assert len([one for one in text.splitlines() if one.startswith(f"{last}{{")]) == 1


def test_what_is_missing_is_a_problem_and_no_reason_to_stop(service: Service) -> None:
    """A foreign map in our place: said in the status, and the peers are programmed."""
    device = DEVICE[service.family]
    directory = pins.pin_directory(device, service.host.ns, create=True)
    BpfMap.create(1, 4, 4, 8, name="theirs").pin(directory / "peers")

    service.start("--counters")
    service.await_clean()

    service.wait(lambda: service.said("is ready on node"))
    assert service.said("the map theirs there")
    assert filters(service) == []
    assert not service.ended()
