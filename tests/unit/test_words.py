"""The steps of an explanation, from what should be there and what the kernel has."""

from __future__ import annotations

import pytest

from flannel_dp.kernel.route_messages import RouteMatch
from flannel_dp.look import words
from flannel_dp.look.explanation import Owner, Step
from flannel_dp.resources.device.view import DeviceView

DEVICE = DeviceView("flannel.1", 7, up=True, vni=1, port=8472, local="192.0.2.1", lower="eth0")

SUBNET = {4: "10.244.7.0/24", 6: "fd00:10:244:7::/64"}
GATEWAY = {4: "10.244.7.0", 6: "fd00:10:244:7::"}
ENDPOINT = {4: "192.0.2.7", 6: "2001:db8::7"}

families = pytest.mark.parametrize("family", [4, 6])


def route(prefix: str, *, via: str = "", device: int = 7, proto: int = 138) -> RouteMatch:
    return RouteMatch(prefix, via, device, {7: "flannel.1", 2: "eth0"}[device], 0, proto, False)


@families
@pytest.mark.parametrize(
    ("device", "proto", "wider", "ok", "says"),
    [
        (7, 138, False, True, ""),
        (7, 3, False, True, "written by another program; a sync takes it over"),
        (7, 138, True, False, "the packet takes a route to another prefix"),
        (2, 138, False, False, "the route is missing or wrong"),
        (2, 4, True, False, "the route is missing or wrong"),
        (2, 4, False, False, "another program's route blocks it"),
    ],
)
def test_the_route_into_the_tunnel(
    family: int, device: int, proto: int, wider: bool, ok: bool, says: str
) -> None:
    prefix = SUBNET[family]
    if wider:
        prefix = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}[family]
    match = route(prefix, via=GATEWAY[family], device=device, proto=proto)

    step = words.tunnel_route_step(match, DEVICE, SUBNET[family], GATEWAY[family])

    assert step.ok is ok
    assert step.text.startswith(says) if says else not step.text
    assert step.wanted == f"{SUBNET[family]} via {GATEWAY[family]} dev flannel.1"
    assert step.held.startswith(f"{prefix} via {GATEWAY[family]} dev ")


@families
def test_no_route_at_all(family: int) -> None:
    owner = Owner("node7", SUBNET[family], ENDPOINT[family])

    into = words.tunnel_route_step(None, DEVICE, SUBNET[family], GATEWAY[family])
    direct = words.direct_route_step(None, owner, 2, "eth0", in_tunnel=False)

    for step in (into, direct):
        assert (step.held, step.ok) == ("", False)
        assert step.text.startswith("there is no route")


@families
@pytest.mark.parametrize(
    ("device", "in_tunnel", "says"),
    [
        (2, False, ""),
        (7, True, "it goes through the tunnel, and need not"),
        (7, False, "the route is missing or wrong"),
    ],
)
def test_a_direct_route(family: int, device: int, in_tunnel: bool, says: str) -> None:
    owner = Owner("node7", SUBNET[family], ENDPOINT[family])
    match = route(SUBNET[family], via=ENDPOINT[family], device=device)

    step = words.direct_route_step(match, owner, 2, "eth0", in_tunnel=in_tunnel)

    assert step.ok is (says == "")
    assert step.text.startswith(says)


@families
@pytest.mark.parametrize(
    ("via", "device", "says"),
    [
        ("", 2, "is on-link on eth0 (PREFIX): direct"),
        ("", 7, "is on-link on flannel.1, not eth0: not direct"),
        ("10.9.9.9", 2, "is behind gateway 10.9.9.9 (PREFIX): not direct"),
    ],
)
def test_why_a_peer_is_direct_or_not(family: int, via: str, device: int, says: str) -> None:
    match = route(SUBNET[family], via=via, device=device)

    step = words.underlay_step(ENDPOINT[family], match, 2, "eth0")

    assert step.ok
    assert step.held == f"{ENDPOINT[family]} {says.replace('PREFIX', SUBNET[family])}"
    assert "no route carries" in words.underlay_step(ENDPOINT[family], None, 2, "eth0").held


@pytest.mark.parametrize(
    ("held", "wanted", "ok", "text"),
    [
        ("a", "a", True, ""),
        ("a", "", True, ""),
        ("b", "a", False, "not the one of the lease"),
        ("", "a", False, "missing"),
        ("", "", False, "missing"),
    ],
)
def test_an_entry(held: str, wanted: str, ok: bool, text: str) -> None:
    step = words.entry_step("fdb", "key dst", held, wanted)

    assert step.ok is ok
    assert text in step.text
    assert step.wanted == (f"key dst {wanted}" if wanted else "")
    assert step.held == (f"key dst {held}" if held else "")


@pytest.mark.parametrize(
    ("number", "held", "wanted", "ok"),
    [
        (0x5AF40700, "10.244.7.0", "10.244.7.0", True),
        (0x5AF40700, "10.244.8.0", "10.244.7.0", False),
        (0x5AF40700, "", "10.244.7.0", False),
        (77, "10.244.7.0", "10.244.7.0", False),
    ],
)
def test_a_nexthop_object(number: int, held: str, wanted: str, ok: bool) -> None:
    """One that has our gateway and another program's id is not the one a sync makes."""
    assert words.nexthop_step(number, wanted, held, "flannel.1").ok is ok


@families
def test_the_packet_on_the_underlay(family: int) -> None:
    to = {4: "192.0.2.7", 6: "[2001:db8::7]"}[family]
    packet = f"192.0.2.1 -> {to}:8472 vni 1"

    out = words.packet_step(DEVICE, "192.0.2.1", ENDPOINT[family], route(SUBNET[family], device=2))
    loop = words.packet_step(DEVICE, "192.0.2.1", ENDPOINT[family], route(SUBNET[family]))
    lost = words.packet_step(DEVICE, "192.0.2.1", ENDPOINT[family], None)

    assert (out.ok, out.held) == (True, f"{packet}, by {SUBNET[family]} dev eth0")
    assert (loop.ok, lost.ok) == (False, False)
    assert "runs through itself" in loop.text
    assert (lost.wanted, lost.held) == (packet, "")


def test_a_device_with_a_problem_and_one_that_is_missing() -> None:
    down = DeviceView("flannel.1", 7, problem="it is down")
    gone = DeviceView("flannel.1", problem="there is no such device")

    assert words.device_step(gone) == Step("device", "flannel.1", "", False, gone.problem)
    step = words.device_step(down)
    assert step.held.startswith("flannel.1 down, vni ")
    assert not step.held.endswith("it is down")
    assert (step.ok, step.text) == (False, "it is down")
