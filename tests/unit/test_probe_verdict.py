"""What follows from the evidence about a peer: a table of cases."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.probe.verdict import Evidence, judge

LOST, ALL = (8, 0), (8, 8)

#: Of silent peers.
ECHO, NO_ECHO = (2, 2), (2, 0)


@pytest.mark.parametrize(
    ("evidence", "code", "alive", "side"),
    [
        ({"loop": ALL}, "alive", True, ""),
        ({"loop": ALL, "echo": NO_ECHO}, "alive", True, ""),  # its firewall drops ICMP
        ({"loop": ALL, "path_mtu": 1450}, "alive", True, ""),
        ({"loop": ALL, "path_mtu": 1350}, "mtu", False, "underlay"),
        ({"loop": ALL, "checksum": True, "segments": True}, "alive", True, ""),
        ({"loop": ALL, "checksum": False, "segments": False}, "checksum", False, "peer"),
        ({"loop": ALL, "checksum": True, "segments": False}, "segments", False, "peer"),
        (
            {"loop": ALL, "segments": False, "spoiled_by_all": True, "path_mtu": 1350},
            "segments",
            False,
            "this node",
        ),
        ({"loop": ALL, "state": "missing"}, "not-programmed", False, "this node"),
        ({"loop": (8, 7)}, "loss", True, "peer or underlay"),
        ({"loop": (8, 7), "path_mtu": 1350}, "loss", True, "peer or underlay"),
        ({"loop": (8, 4), "paths": ((4, 0), (4, 4))}, "path-dead", False, "underlay"),
        ({"loop": (8, 3), "paths": ((4, 0), (4, 3))}, "loss", True, "peer or underlay"),
        ({"loop": (2, 1), "paths": ((1, 0), (1, 1))}, "loss", True, "peer or underlay"),
        ({"loop": LOST, "own_problem": "eth0 is down"}, "uplink-down", False, "this node"),
        ({"loop": LOST, "state": "no fdb"}, "not-programmed", False, "this node"),
        ({"loop": LOST, "echo": ECHO}, "peer-does-not-forward", False, "peer"),
        ({"loop": LOST, "echo": NO_ECHO, "refused": True}, "no-vtep", False, "peer"),
        ({"loop": LOST, "echo": ECHO, "detour": True}, "detour", False, "peer"),
        ({"loop": LOST, "other_mac": "02:00:00:00:00:77"}, "wrong-mac", False, "peer"),
        ({"loop": LOST, "outside": True}, "no-way-back", False, "peer or underlay"),
        ({"loop": LOST, "inside": True}, "no-way-out", False, "peer or underlay"),
        ({"loop": LOST, "underlay": True}, "tunnel-dead", False, "peer or underlay"),
        ({"loop": LOST, "underlay": True, "tunnel": False}, "peer-does-not-forward", False, "peer"),
        ({"loop": LOST}, "unreachable", False, "peer or underlay"),
    ],
    ids=str,
)
def test_the_verdict(evidence: dict[str, Any], code: str, alive: bool, side: str) -> None:
    verdict = judge(Evidence(**({"mtu": 1450} | evidence)), "192.0.2.2", 8472, "flannel.1")
    assert (verdict.code, verdict.alive, verdict.side) == (code, alive, side)
    assert verdict.text
    assert bool(verdict.next) == (code != "alive")


def test_texts_name_what_was_seen() -> None:
    def text(**evidence: Any) -> str:
        return judge(Evidence(mtu=1450, **evidence), "192.0.2.2", 8472, "flannel.1").text

    assert text(loop=ALL, path_mtu=1350) == (
        "packets of over 1350 bytes are lost, and flannel.1 takes 1450"
    )
    assert text(loop=LOST, other_mac="02:00:00:00:00:77") == (
        "its vxlan device has the MAC 02:00:00:00:00:77, which its lease does not say"
    )
    assert text(loop=(8, 5)) == "3 of 8 probes are lost"
