"""``flannel-dp sync --watch`` at the limit of its descriptors."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from functools import partial

import pytest

from tests.lib.leases import DEVICE
from tests.lib.service import Service, fetch, free_port
from tests.lib.waiting import LIMIT, wait_until

FULL = "Too many open files"


def limit(pid: int, descriptors: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors, hard))


def started(service: Service, *more: str, **limits: tuple[int, int]) -> Service:
    """Start it as a program of its own, with these limits (RLIMIT_NAME=(soft, hard))."""

    def apply() -> None:
        for name, values in limits.items():
            resource.setrlimit(getattr(resource, name), values)

    with service.log.open("wb") as log:
        service.process = subprocess.Popen(
            service.command(*more), stderr=log, stdout=log, preexec_fn=apply
        )
    return service


@pytest.mark.parametrize("place", [6, 8, 10])
def test_a_start_waits_for_descriptors(service: Service, place: int) -> None:
    """As many as it needs to come to that point, and not one more. The points are not those of a
    family: every other one is IPv6's."""
    descriptors = place + (service.family == 6)
    port = free_port(service.host)
    given = ("--healthz-ip", "127.0.0.1", "--healthz-port", str(port))
    started(service, *given, RLIMIT_NOFILE=(descriptors, 4096))
    wait_until(lambda: service.ended() or service.said(FULL) or service.clean())
    assert not service.ended(), service.log.read_text()

    limit(service.pid, 4096)
    service.await_clean()
    wait_until(lambda: fetch(service.host, port, "/readyz")[0] == 200)
    wait_until(lambda: fetch(service.host, port, "/healthz") == (200, "ok\n"))
    assert service.end() == 0


def test_no_descriptor_is_left(service: Service) -> None:
    """Nothing can be opened for a while: it says so, goes on, and mends what was broken."""
    service.start()
    service.await_clean()
    limit(service.pid, 3)

    service.host.ip(f"link del {DEVICE[service.family]}")
    wait_until(lambda: service.ended() or service.said(FULL))
    assert not service.ended(), service.log.read_text()
    assert not service.clean()

    limit(service.pid, 1024)
    service.await_clean()
    assert service.end() == 0


@pytest.mark.parametrize("place", [0, 2, 4, 6])
def test_another_configuration_where_no_descriptor_is_left(service: Service, place: int) -> None:
    """Also where the new data plane and its agent get some of what they need. The points are not
    those of a family: every other one is IPv6's."""
    spare = place + (service.family == 6)
    service.start("--take-over")
    service.await_clean()
    limit(service.pid, len(os.listdir(f"/proc/{service.pid}/fd")) + spare)

    service.configure(Port=4799)
    os.kill(service.pid, signal.SIGHUP)
    wait_until(lambda: service.ended() or service.said(FULL) or device_port(service) == 4799)
    assert not service.ended(), service.log.read_text()

    limit(service.pid, 1024)
    wait_until(
        lambda: service.ended() or (device_port(service) == 4799 and service.clean()),
        describe=service.log.read_text,
    )
    assert not service.ended(), service.log.read_text()
    assert service.end() == 0


def test_configurations_that_come_and_go_leave_no_descriptor_open(service: Service) -> None:
    service.start("--take-over")
    service.await_clean()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{service.pid}/fd"))

    def change(*ports: int) -> None:
        for port in ports:
            service.configure(Port=port)
            os.kill(service.pid, signal.SIGHUP)
            wait_until(partial(is_clean_at, service, port))

    change(4801, 4802)
    most = descriptors()
    change(4803, 4804, 4805, 4806)
    # It may be in the middle of a reading, with one more open.
    wait_until(lambda: descriptors() <= most)
    assert service.end() == 0


def is_clean_at(service: Service, port: int) -> bool:
    return device_port(service) == port and service.clean()


def device_port(service: Service) -> int:
    """The device's UDP port, 0 while there is no device."""
    found = [
        one for one in service.host.ip_json("link show") if one["ifname"] == DEVICE[service.family]
    ]
    return int(found[0]["linkinfo"]["info_data"].get("port", 0)) if found else 0


def test_no_memory_ends_it_in_one_line_and_the_kernel_forwards(service: Service) -> None:
    """At the limit of its address space (`ulimit -v`) a thread is made that cannot begin."""
    started(service)
    service.await_clean()
    with open(f"/proc/{service.pid}/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.prlimit(service.pid, resource.RLIMIT_AS, (size, size))

    kept = service.peers
    service.publish(20_000)
    wait_until(service.ended, 4 * LIMIT)  # some attempts, each of which waits for a thread

    assert service.process.wait() == 1
    said = service.log.read_text().splitlines()
    assert sum("error: out of memory" in line for line in said) == 1
    service.peers = kept
    assert service.clean()
