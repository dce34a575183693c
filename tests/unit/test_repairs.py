"""What is told of drift: devices in words, and programs by the ports of their sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.repairs import Repairs
from flannel_dp.kernel.programs import Programs
from flannel_dp.look.history import words_of
from flannel_dp.reconcile.drift import Repair, count_report
from flannel_dp.reconcile.plan import DeviceChange
from flannel_dp.reconcile.report import Report
from tests.lib.leases import network_config

#: What a pass did to a device, and what is told of it.
DEVICES = {
    ("adopt", "mtu 1300 -> 1450"): "made it {} mtu 1300; restored {} mtu 1450",
    ("adopt", "learning -> nolearning"): "made it {} learning; restored {} nolearning",
    ("adopt", "address + 10.244.1.0/32"): "deleted {} address 10.244.1.0/32; restored",
    ("adopt", "address - 10.244.9.9/24"): "added {} address 10.244.9.9/24; removed",
    ("adopt", "up"): "made it {} down; restored {} up",
    ("create", "create {} vni 1"): "deleted {}; restored",
    ("none", ""): "",
}


class _Kept:
    """A data plane without peers."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.config = network_config()


def _told(action: str, line: str, port: int) -> list[str]:
    chronicle = Chronicle()
    repair, report = Repair(ports={"flannel.1": port}), Report()
    report.devices = (DeviceChange("flannel.1", action, (line,)),)
    count_report(repair, report)
    kept: Any = _Kept()
    Repairs(kept, Bursts(lambda: 0.0), chronicle).tell(repair)
    return [words_of(event) for event in chronicle.repairs]


@pytest.mark.parametrize(("action", "line"), DEVICES)
def test_tells_what_another_program_did_to_a_device(action: str, line: str) -> None:
    wanted = DEVICES[action, line].replace("{}", "device flannel.1")

    told = _told(action, line.replace("{}", "flannel.1"), 0)

    assert told == ([f"another program {wanted}"] if wanted else [])
    by = f"{_own_name()} (process {os.getpid()})"
    assert _told(action, line, os.getpid())[:1] == ([f"{by} {wanted}"] if wanted else [])


def _own_name() -> str:
    with open("/proc/self/status") as file:
        return file.readline().split("\t")[1].strip()


def test_names_programs_by_the_ports_of_their_sockets() -> None:
    programs, own = Programs(), os.getpid()
    assert programs.name(own) == f"{_own_name()} (process {own})"
    assert programs.name(own + (7 << 22)) == programs.name(own)  # as libnl and pyroute2 do
    assert (programs.name(0), programs.name((1 << 32) - 4097)) == ("", "")  # the kernel's choice

    with subprocess.Popen([sys.executable, "-S", "-c", "pass"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        text = Programs().name(process.pid)  # it has ended, and its number is still its own
        assert text.endswith(f"(process {process.pid}, ended)")
    assert Programs().name(process.pid).startswith(f"process {process.pid} (ended")
