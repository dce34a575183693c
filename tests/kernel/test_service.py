"""``flannel-dp sync --watch`` as a process: signals, health, notifications, privileges, logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.kernel import observed
from tests.lib.leases import PROTOCOL, mac, subnet
from tests.lib.service import (
    CAP_NET_ADMIN,
    Service,
    fetch,
    free_port,
)
from tests.lib.waiting import LIMIT

# ---- following ----------------------------------------------------------------


def test_it_follows_the_file_and_repairs_the_kernel(service: Service) -> None:
    service.start("--lease-grace", "0.1")
    service.await_clean()

    service.publish(7)
    service.await_clean()
    service.publish(3)
    service.await_clean()
    service.host.ip(f"-{service.family} route del {subnet(service.family, 2)}")
    service.await_clean()
    broken = service.peers.pop()
    service.write([*service.peers, replace(broken, backend_data=None, backend_v6_data=None)])
    service.await_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_end_it_at_once_and_the_kernel_keeps_forwarding(
    service: Service, number: int
) -> None:
    service.start()
    service.await_clean()

    code = service.end(number)

    assert code == 0, service.log.read_text()
    assert service.clean()


def test_a_broken_file_keeps_the_last_good_state(service: Service) -> None:
    port = free_port(service.host)
    service.start("--healthz-port", str(port))
    service.await_clean()
    before = observed(service.host, service.family)

    service.replace('{"leases": [')
    service.wait(lambda: "degraded" in fetch(service.host, port, "/healthz")[1])

    status, text = fetch(service.host, port, "/healthz")
    assert (status, str(service.leases) in text) == (200, True), text
    assert observed(service.host, service.family) == before
    service.publish(6)
    service.await_clean()
    service.wait(lambda: fetch(service.host, port, "/healthz") == (200, "ok\n"))


def test_a_shrunken_file_is_refused(service: Service) -> None:
    port = free_port(service.host)
    service.publish(40)
    service.start("--healthz-port", str(port))
    service.await_clean()
    before = observed(service.host, service.family)

    service.publish(3)
    service.wait(lambda: "shrink" in fetch(service.host, port, "/healthz")[1])

    assert observed(service.host, service.family) == before
    assert 'flannel_dp_degraded{problem="shrink"} 1.0' in fetch(service.host, port, "/metrics")[1]
    service.publish(39)
    service.await_clean()


def test_with_allow_shrink_it_shrinks(service: Service) -> None:
    service.publish(40)
    service.start("--allow-shrink")
    service.await_clean()

    service.publish(3)
    service.await_clean()


def test_hangup_reads_everything_again(service: Service) -> None:
    service.start("--audit-interval", "3600")
    service.await_clean()

    os.kill(service.pid, signal.SIGHUP)
    service.wait(lambda: service.said("Reading the configuration"))

    service.await_clean()
    assert service.end() == 0


def test_hangup_takes_a_new_network_configuration(service: Service) -> None:
    service.start()
    service.await_clean()

    service.configure(VNI=1, Port=4790)
    os.kill(service.pid, signal.SIGHUP)
    service.wait(lambda: service.said("network configuration has changed"))

    # A port cannot be changed in place: the device of the old one is in the way, and said so.
    service.wait(lambda: service.said("has port 8472, wanted 4790"))
    assert service.end() == 0


def test_hangup_with_a_broken_configuration_changes_nothing(service: Service) -> None:
    service.start()
    service.await_clean()

    service.net_conf.write_text("{")
    os.kill(service.pid, signal.SIGHUP)
    service.wait(lambda: service.said("The new configuration is rejected"))

    service.publish(9)
    service.await_clean()


# ---- health, notifications, logs -------------------------------------------------


def test_health_and_metrics(service: Service) -> None:
    port = free_port(service.host)
    service.start("--healthz-ip", "127.0.0.1", "--healthz-port", str(port))
    service.await_clean()
    service.wait(lambda: fetch(service.host, port, "/readyz")[0] == 200)

    _, text = fetch(service.host, port, "/metrics")
    lines = text.splitlines()
    assert f'flannel_dp_peers{{family="{service.family}",way="tunnel"}} 5.0' in lines
    assert "flannel_dp_ready 1.0" in lines

    service.host.ip(f"-{service.family} route del {subnet(service.family, 2)}")
    service.await_clean()
    counted = 'flannel_dp_drift_repaired_total{kind="route-deleted"} 1.0'
    service.wait(lambda: counted in fetch(service.host, port, "/metrics")[1])


def test_it_is_not_ready_before_the_peers_are_programmed(service: Service) -> None:
    port = free_port(service.host)
    service.leases.unlink()
    service.start("--healthz-port", str(port))
    service.wait(lambda: fetch(service.host, port, "/readyz")[0] == 503)

    service.publish(5)
    service.await_clean()
    service.wait(lambda: fetch(service.host, port, "/readyz")[0] == 200)


def test_systemd_is_told(service: Service) -> None:
    path = service.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(LIMIT)
        service.start(NOTIFY_SOCKET=str(path), WATCHDOG_USEC="200000")
        said: list[str] = []
        while not any("READY=1" in one for one in said):
            said.append(manager.recv(4096).decode())
        assert service.clean(), "ready before the peers were programmed"
        while not any("WATCHDOG=1" in one for one in said):
            said.append(manager.recv(4096).decode())
        while not any(f"STATUS=5 IPv{service.family} peers" in one for one in said):
            said.append(manager.recv(4096).decode())
        code = service.end()
        while not any("STOPPING=1" in one for one in said):
            said.append(manager.recv(4096).decode())
    assert code == 0


def test_logs_in_json(service: Service) -> None:
    service.start("--log-json")
    service.wait(lambda: service.said(" is ready on node "))  # it has begun to read events
    service.host.ip(f"-{service.family} route del {subnet(service.family, 2)}")
    service.wait(lambda: service.said("Drift repaired"))
    service.end()

    lines = [json.loads(line) for line in service.log.read_text().splitlines()]

    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    drift = next(line for line in lines if "Drift repaired" in line["message"])
    assert (drift["fields"]["table"], drift["fields"]["change"]) == ("route", "deleted")
    assert drift["fields"]["after"] in drift["message"]


# ---- one instance, privileges, bad input -------------------------------------------


def test_a_second_instance_is_refused(service: Service) -> None:
    service.start()
    service.await_clean()

    second = programs.run(service.command(), capture_output=True, text=True, check=False)

    assert second.returncode == 5, second.stderr
    assert str(service.pid) in second.stderr
    assert service.clean()


def test_privileges_are_given_up(service: Service) -> None:
    service.start()
    service.await_clean()

    for task in Path(f"/proc/{service.pid}/task").iterdir():
        fields = dict(
            line.split(":\t")
            for line in (task / "status").read_text().splitlines()
            if ":\t" in line
        )
        for name in ("CapEff", "CapPrm", "CapBnd"):
            assert int(fields[name], 16) == CAP_NET_ADMIN, (name, fields[name])
        assert int(fields["CapInh"], 16) == int(fields["CapAmb"], 16) == 0
    # What is left is enough for a device that has to be made again.
    device = "flannel.1" if service.family == 4 else "flannel-v6.1"
    service.host.ip(f"link del {device}")
    service.await_clean()


def test_firewall_rules_are_kept_with_what_is_left(service: Service) -> None:
    command = [word for word in service.command() if word not in ("--firewall", "none")]
    with service.log.open("wb") as log:
        service.process = programs.Popen(
            [*command, "--firewall", "nft", "--ip-masq", "--audit-interval", "0.2"],
            stderr=log,
            stdout=log,
        )
    service.await_clean()
    table = f"{'ip' if service.family == 4 else 'ip6'} flannel-dp"
    tables = ["ip", "netns", "exec", service.host.ns, "nft", "list", "tables"]

    def kept() -> bool:
        return table in subprocess.run(tables, capture_output=True, text=True, check=True).stdout

    service.wait(kept)
    service.host.exec("nft", "delete", "table", *table.split())
    service.wait(kept)


def test_a_port_in_use_is_told(service: Service) -> None:
    def occupy() -> socket.socket:
        taken = socket.socket()
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        return taken

    with call_in_netns(service.host.ns, occupy) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            service.command("--healthz-port", str(port)),
            capture_output=True,
            text=True,
            check=False,
        )

    assert done.returncode == 2, done.stderr
    assert str(port) in done.stderr
    assert "hint:" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--audit-interval", "0"),
        ("--healthz-port", "70000"),
        ("--output", "json"),
        ("--leases", "-"),
        ("--healthz-ip", "nowhere", "--healthz-port", "1"),
    ],
    ids=" ".join,
)
def test_wrong_flags(service: Service, wrong: tuple[str, ...]) -> None:
    done = programs.run(
        service.command(*wrong), capture_output=True, text=True, check=False, timeout=LIMIT
    )

    assert done.returncode == 2, done.stderr
    assert observed(service.host, service.family)["route"] == set()


def test_without_privileges_it_says_what_is_missing(service: Service) -> None:
    inside = [word for word in service.command() if word not in ("--netns", service.host.ns)]
    without = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
    done = subprocess.run(
        ["ip", "netns", "exec", service.host.ns, *without, *inside],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )

    assert done.returncode == 77, done.stderr
    assert "CAP_NET_ADMIN" in done.stderr


def test_entries_carry_the_mark_and_the_own_mac(service: Service) -> None:
    service.start()
    service.await_clean()

    routes = observed(service.host, service.family)["route"]
    assert {route[2] for route in routes} == {PROTOCOL}
    device = "flannel.1" if service.family == 4 else "flannel-v6.1"
    link = service.host.ip_json(f"link show {device}")[0]
    assert link["address"] == mac(service.family, 0)


def test_legacy_rules_that_come_later_are_told_until_a_restart(service: Service) -> None:
    """The agent gave up CAP_NET_RAW at its start, and legacy iptables cannot be read without it."""
    host, port = service.host, free_port(service.host)
    program = "iptables-legacy" if service.family == 4 else "ip6tables-legacy"
    flags = ("--firewall", "auto", "--audit-interval", "1", "--healthz-port", str(port))
    service.start(*flags)
    service.wait(lambda: fetch(host, port, "/readyz")[0] == 200)
    host.exec(program, "-P", "FORWARD", "DROP")

    service.wait(lambda: "firewall: " in fetch(host, port, "/healthz")[1])

    said = fetch(host, port, "/healthz")[1]
    assert program in said
    assert "CAP_NET_RAW" in said
    assert "restart it" in said
    assert service.end() == 0
    service.start(*flags)
    service.wait(lambda: "-j FLANNEL-DP-FWD" in host.exec(f"{program}-save"))
    service.wait(lambda: fetch(host, port, "/readyz")[0] == 200)
    assert fetch(host, port, "/healthz") == (200, "ok\n")
