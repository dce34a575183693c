"""Filters on a device's clsact qdisc (bpf.filters), against what tc says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flannel_dp import Conflict, DeviceGone, KernelError
from flannel_dp._core import BpfMap, BpfProgram
from flannel_dp.bpf import attach, filters, pins
from flannel_dp.bpf.filters import COUNTERS_PRIORITY, Filter, Parent
from tests.lib.bpf import add_device, load_small, tc, use_source
from tests.lib.hosts import Host

NAME = "flannel-dp-test"
ANYTHING = "protocol all u32 match u32 0 0 classid 1:1"
PARENTS: tuple[Parent, ...] = ("ingress", "egress")


@pytest.fixture
def program(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BpfProgram:
    use_source(monkeypatch, tmp_path)
    directory = pins.pin_directory("flannel.1", host.ns, create=True)
    load_small(directory)
    return BpfProgram.open(directory / "see")


def attach_to(index: int, parent: Parent, program: BpfProgram, host: Host) -> bool:
    return attach.attach(index, parent, COUNTERS_PRIORITY, program, NAME, host.ns)


def shown(host: Host, parent: Parent) -> list[tuple[int, str, int]]:
    found = json.loads(tc(host, f"-j filter show dev flannel.1 {parent}") or "[]")
    return [
        (one["pref"], one["options"]["bpf_name"], one["options"]["prog"]["id"])
        for one in found
        if "options" in one
    ]


@pytest.mark.parametrize("parent", PARENTS)
def test_attached_read_back_and_detached(host: Host, program: BpfProgram, parent: Parent) -> None:
    index = add_device(host)

    assert filters.read_filters(index, host.ns) == []
    assert attach_to(index, parent, program, host) is True
    directory = pins.pin_directory("flannel.1", host.ns)
    attach.note_clsact(index, directory)

    expected = Filter(parent, COUNTERS_PRIORITY, 1, "bpf", NAME, program.id)
    assert filters.read_filters(index, host.ns) == [expected]
    assert shown(host, parent) == [(COUNTERS_PRIORITY, NAME, program.id)]
    assert "direct-action" in tc(host, f"filter show dev flannel.1 {parent}")

    assert attach.detach(index, parent, COUNTERS_PRIORITY, NAME, host.ns) is True
    assert attach.detach(index, parent, COUNTERS_PRIORITY, NAME, host.ns) is False
    assert attach.release_clsact(index, directory, host.ns) is True
    assert attach.release_clsact(index, directory, host.ns) is False
    assert "clsact" not in tc(host, "qdisc show dev flannel.1")


def test_an_attached_program_sees_frames(host: Host, program: BpfProgram, family: int) -> None:
    index = add_device(host)
    attach_to(index, "egress", program, host)
    address, peer = ("10.9.0.1/24", "10.9.0.2") if family == 4 else ("fd09::1/64", "fd09::2")
    host.ip(f"addr add {address} dev flannel.1 {'nodad' if family == 6 else ''}")
    host.ip(f"neigh add {peer} lladdr 02:00:00:00:00:02 dev flannel.1")
    frames = BpfMap.open(pins.pin_directory("flannel.1", host.ns) / "frames")
    before = frames.lookup(bytes(4))

    host.exec("python3", "-c", _SEND, peer)

    after = frames.lookup(bytes(4))
    assert before is not None
    assert after is not None
    assert int.from_bytes(after, sys.byteorder) - int.from_bytes(before, sys.byteorder) >= 5


_SEND = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as udp:
    for _ in range(5):
        udp.sendto(b"x", (sys.argv[1], 9))
"""


def test_attaching_again_replaces_ours_in_place(host: Host, program: BpfProgram) -> None:
    index = add_device(host)
    attach_to(index, "egress", program, host)
    directory = pins.pin_directory("flannel.1", host.ns)
    load_small(directory)
    newer = BpfProgram.open(directory / "see")

    assert attach_to(index, "egress", newer, host) is False

    assert shown(host, "egress") == [(COUNTERS_PRIORITY, NAME, newer.id)]


def test_somebody_elses_filter_is_named_and_left_alone(host: Host, program: BpfProgram) -> None:
    index = add_device(host)
    tc(host, "qdisc add dev flannel.1 clsact")
    tc(host, f"filter add dev flannel.1 egress prio {COUNTERS_PRIORITY} {ANYTHING}")
    tc(host, f"filter add dev flannel.1 ingress prio 5 {ANYTHING}")
    before = tc(host, "filter show dev flannel.1 egress")

    with pytest.raises(Conflict, match=rf"filter u32 has priority {COUNTERS_PRIORITY}"):
        attach_to(index, "egress", program, host)
    assert attach_to(index, "ingress", program, host) is False

    assert tc(host, "filter show dev flannel.1 egress") == before
    found = filters.read_filters(index, host.ns)
    assert [(one.parent, one.kind, one.kind == "bpf") for one in found] == [
        ("ingress", "u32", False),  # its table
        ("ingress", "u32", False),
        ("ingress", "bpf", True),
        ("egress", "u32", False),
        ("egress", "u32", False),
    ]
    assert attach.detach(index, "egress", COUNTERS_PRIORITY, NAME, host.ns) is False
    assert attach.detach(index, "ingress", COUNTERS_PRIORITY, NAME, host.ns) is True
    directory = pins.pin_directory("flannel.1", host.ns)
    attach.note_clsact(index, directory)
    assert attach.release_clsact(index, directory, host.ns) is False
    assert tc(host, "filter show dev flannel.1 egress") == before


def test_an_ingress_qdisc_in_the_way_is_a_conflict(host: Host, program: BpfProgram) -> None:
    index = add_device(host)
    tc(host, "qdisc add dev flannel.1 ingress")
    before = tc(host, "qdisc show dev flannel.1")

    with pytest.raises(KernelError, match="clsact"):
        attach_to(index, "egress", program, host)

    assert tc(host, "qdisc show dev flannel.1") == before


def test_a_device_that_is_gone(host: Host, program: BpfProgram) -> None:
    assert filters.read_filters(9999, host.ns) == []
    assert filters.has_clsact(9999, host.ns) is False
    assert attach.detach(9999, "egress", COUNTERS_PRIORITY, NAME, host.ns) is False
    with pytest.raises(DeviceGone):
        attach_to(9999, "egress", program, host)


def test_reading_filters_does_not_load_pyroute2() -> None:
    script = (
        "import sys; from flannel_dp.bpf import attach, filters; print('pyroute2' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(filters.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["False"]


def test_a_clsact_qdisc_of_others_stays(host: Host, program: BpfProgram) -> None:
    index = add_device(host)
    directory = pins.pin_directory("flannel.1", host.ns)
    tc(host, "qdisc add dev flannel.1 clsact")

    assert attach_to(index, "egress", program, host) is False
    attach.detach(index, "egress", COUNTERS_PRIORITY, NAME, host.ns)
    assert attach.release_clsact(index, directory, host.ns) is False

    assert "clsact" in tc(host, "qdisc show dev flannel.1")
