"""Which lease is this node's: a table of evidence, and what follows."""

from __future__ import annotations

import pytest

from flannel_dp.errors import LeaseRejected, SourceError
from flannel_dp.node.identity import (
    Claim,
    Evidence,
    decide,
)

# ---- which lease ------------------------------------------------------------------------

#: 10.244.N.0/24 is node N's, 192.0.2.N its address, and mN its MAC. This node is 1, with 192.0.2.9
#: beside its public address and 198.51.100.1 on another interface.
PUBLIC, ADDRESSES = ("192.0.2.1", "192.0.2.9"), ("192.0.2.1", "192.0.2.9", "198.51.100.1")


def claim(text: str) -> Claim:
    """``"NAME SUBNET ADDRESS [MAC] [!]"``: "b 5 .1 m5" is lease b, 10.244.5.0/24 at 192.0.2.1;
    "!" is a fault."""
    fault = text.endswith("!")
    name, subnet, address, *mac = text.removesuffix("!").split()
    endpoint = f"192.0.2{address}" if address.startswith(".") else address
    mac_text = mac[0] if mac else ""
    return Claim(0, name, f"10.244.{subnet}.0/24", endpoint, mac_text, 0, "broken" * fault)


def known(text: str) -> Evidence:
    """Words such as "given=1 remembered=1 device=1 mac=m1 name=a"."""
    words = dict(word.split("=") for word in text.split())
    return Evidence(
        PUBLIC,
        ADDRESSES,
        f"10.244.{words['given']}.0/24" if "given" in words else "",
        words.get("name", ""),
        f"10.244.{words['remembered']}.0/24" if "remembered" in words else "",
        "/run/subnet.env",
        "flannel.1" if "device" in words or "mac" in words else "",
        words.get("mac", ""),
        (f"10.244.{words['device']}.0",) if "device" in words else (),
    )


OWN, EVIL, PEER = "n1 1 .1 m1", "a 5 .1 m5", "b 1 .2 m2"


@pytest.mark.parametrize(
    ("evidence", "claims", "own", "subnet", "address"),
    [
        # Nothing but the address.
        ("", [], None, "", ".1"),
        ("", [OWN], "n1", "1", ".1"),
        ("", ["n1 1 .9 m1"], "n1", "1", ".9"),
        ("", [OWN, "a 5 .1 m5!"], "n1", "1", ".1"),
        ("", [OWN, "a 5 .1"], "n1", "1", ".1"),  # without a MAC nobody reaches it
        ("", ["n1 1 .1"], "n1", "1", ".1"),
        # What agrees wins, whatever sorts first.
        ("given=1", [EVIL, OWN], "n1", "1", ".1"),
        ("remembered=1", [EVIL, OWN], "n1", "1", ".1"),
        ("name=n1", [EVIL, OWN], "n1", "1", ".1"),
        ("device=1 mac=m1", [EVIL, OWN], "n1", "1", ".1"),
        ("device=1 mac=m9", [EVIL, OWN], "n1", "1", ".1"),
        ("mac=m1", [EVIL, OWN], "n1", "1", ".1"),
        ("remembered=1 device=5 mac=m5", [EVIL, OWN], "n1", "1", ".1"),
        ("given=5 remembered=1 device=1 mac=m1 name=n1", [EVIL, OWN], "a", "5", ".1"),
        ("name=n1 remembered=5 device=5", [EVIL, OWN], "n1", "1", ".1"),
        ("remembered=1", ["a 1 .1 m5", OWN], "a", "1", ".1"),  # one subnet: the order decides
        ("remembered=1 device=1 mac=m1", ["a 1 .1 m5", OWN], "n1", "1", ".1"),
        ("remembered=1", ["n1 1 198.51.100.1 m1", EVIL], "n1", "1", "198.51.100.1"),
        # No lease agrees: the evidence stands, and the node goes on.
        ("given=1", [], None, "1", ".1"),
        ("given=1", [EVIL], None, "1", ".1"),
        ("given=1", [EVIL, PEER], None, "1", ".1"),
        ("given=1", ["n1 1 .1 m1!"], None, "1", ".1"),
        ("given=1", ["a 5 198.51.100.1 m5"], None, "1", ".1"),
        ("remembered=1", [], None, "1", ".1"),
        ("remembered=1", ["n1 1 .1 m1!"], None, "1", ".1"),
        # A node that was renumbered: the MAC is its own.
        ("remembered=1 device=1 mac=m5", [EVIL], "a", "5", ".1"),
        ("remembered=7 device=1 mac=m1", [OWN], "n1", "1", ".1"),
        # Its own lease is malformed: what carries another name is another node's.
        ("name=n1 remembered=1", ["n1 1 .1 m1!", EVIL], None, "1", ".1"),
        # A name that no lease has: other evidence agrees, or leases go by their subnets.
        ("name=n9 remembered=1", [OWN], "n1", "1", ".1"),
        ("name=n9", ["10.244.1.0-24 1 .1 m1"], "10.244.1.0-24", "1", ".1"),
        ("name=n9", ["10.244.1.0-24&fd00::-64 1 .1 m1"], "10.244.1.0-24&fd00::-64", "1", ".1"),
        ("name=n9 remembered=1", [], None, "1", ".1"),
        ("remembered=1 device=1 mac=m1", [], None, "1", ".1"),
    ],
)
def test_whose_lease_it_is(
    evidence: str, claims: list[str], own: str | None, subnet: str, address: str
) -> None:
    found = decide(known(evidence), map(claim, claims))

    assert (found.own.name if found.own else None) == own
    assert found.subnet == (f"10.244.{subnet}.0/24" if subnet else "")
    assert found.public_ip == (f"192.0.2{address}" if address.startswith(".") else address)
    others = [
        one
        for one in map(claim, claims)
        if one.name != own and (known(evidence).holds(one) or one.subnet == found.subnet)
    ]
    said = "; ".join(found.warnings)
    assert all(str(one) in said for one in others)
    assert not others or found.subnet in said


@pytest.mark.parametrize(
    ("evidence", "claims", "said"),
    [
        ("given=1", [PEER], "lease b (10.244.1.0/24, public address 192.0.2.2) has the subnet"),
        ("remembered=1", [OWN, PEER], "lease b"),
        ("remembered=5 name=n1", [OWN], "no longer 10.244.5.0/24"),
        ("remembered=1 name=n9", [OWN], "no lease is named n9"),
    ],
)
def test_what_is_rejected_with_this_node_s_subnet_or_name_is_told(
    evidence: str, claims: list[str], said: str
) -> None:
    warnings = decide(known(evidence), map(claim, claims)).warnings
    assert any(said in text for text in warnings), warnings


@pytest.mark.parametrize(
    ("evidence", "claims", "named", "flags"),
    [
        pytest.param(
            "",
            ["n1 1 .1 m1", "n2 2 .1 m2", "n3 3 .1 m3"],
            ["n1", "n2", "n3", "10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"],
            ["--subnet", "--node-name", "--iface"],
            id="fr13-one-address-of-three",
        ),
        pytest.param(
            "",
            [OWN, EVIL],
            ["n1", "a", "10.244.1.0/24", "10.244.5.0/24"],
            ["--subnet"],
            id="fr13-one-address-of-two",
        ),
        pytest.param("", [OWN, "a 5 .9 m5"], ["n1", "a"], ["--subnet"], id="fr13-two-addresses"),
        pytest.param(
            "name=n9",
            [OWN],
            ["n9", "lease n1"],
            ["--node-name", "--subnet"],
            id="fr13-name-of-no-lease",
        ),
        pytest.param(
            "",
            ["n2 2 198.51.100.1 m2"],
            ["n2", "198.51.100.1", "192.0.2.1"],
            ["--iface"],
            id="fr14-other-interface",
        ),
        pytest.param(
            "remembered=1",
            ["n2 2 198.51.100.1 m2", "n1 1 .11 m9"],
            ["/run/subnet.env", "10.244.1.0/24", "lease n2", "lease n1"],
            ["--subnet", "remove"],
            id="fr14-stale-file-and-other-interface",
        ),
        pytest.param(
            "remembered=1",
            ["n2 2 198.51.100.1 m2"],
            ["/run/subnet.env", "lease n2", "10.244.1.0/24"],
            ["--subnet", "remove"],
            id="fr14-stale-file",
        ),
        pytest.param(
            "remembered=1",
            ["n2 2 .1 m2"],
            ["/run/subnet.env", "lease n2"],
            ["--subnet", "remove"],
            id="fr14-stale-file-and-own-address",
        ),
        pytest.param(
            "remembered=1 mac=m1",
            [EVIL],
            ["/run/subnet.env", "lease a"],
            ["--subnet"],
            id="fr14-stale-file-and-a-device-of-no-lease",
        ),
        pytest.param(
            "remembered=1 device=1 mac=m1",
            [EVIL],
            ["/run/subnet.env", "lease a"],
            ["--subnet"],
            id="class1-our-lease-is-gone-and-an-impostor-s-there",
        ),
        pytest.param(
            "remembered=1",
            [EVIL, PEER],
            ["/run/subnet.env", "10.244.1.0/24", "lease a", "lease b"],
            ["--subnet"],
            id="class1-our-address-and-our-subnet",
        ),
        pytest.param(
            "remembered=1",
            [PEER],
            ["/run/subnet.env", "lease b", "192.0.2.1"],
            ["--subnet"],
            id="fr30-our-subnet-at-another-address",
        ),
        pytest.param(
            "remembered=1 device=7 mac=m7",
            [],
            ["/run/subnet.env", "10.244.1.0/24", "flannel.1", "10.244.7.0"],
            ["--subnet"],
            id="a-file-and-a-device-that-disagree",
        ),
        pytest.param("", ["a 5 .1 m5!"], ["a", "broken"], [], id="class1-malformed"),
        pytest.param(
            "name=n1",
            ["n1 1 .1 m1!", EVIL],
            ["n1", "broken"],
            [],
            id="class1-malformed-of-our-name",
        ),
        pytest.param(
            "device=1 mac=m1",
            [EVIL],
            ["flannel.1", "10.244.1.0", "m1", "a", "10.244.5.0/24"],
            ["--subnet"],
            id="class1-a-device-of-no-lease",
        ),
        # The address of this node's lease has left the node.
        pytest.param(
            "name=n1",
            ["n1 1 .77 m1"],
            ["n1", "192.0.2.77", "192.0.2.1"],
            ["--public-ip"],
            id="fr30-by-name",
        ),
        pytest.param(
            "remembered=1 device=1 mac=m1",
            ["n1 1 .77 m1"],
            ["192.0.2.77", "192.0.2.1"],
            ["--public-ip"],
            id="fr30-by-file-and-device",
        ),
        pytest.param(
            "device=1 mac=m1",
            ["n1 1 .77 m1"],
            ["192.0.2.77", "flannel.1"],
            ["--public-ip"],
            id="fr30-by-device",
        ),
    ],
)
def test_what_nobody_can_decide_is_an_error_that_names_it(
    evidence: str, claims: list[str], named: list[str], flags: list[str]
) -> None:
    with pytest.raises(SourceError) as caught:
        decide(known(evidence), map(claim, claims))

    assert [part for part in named if part not in caught.value.message] == []
    assert [flag for flag in flags if flag not in caught.value.hint] == []
    assert caught.value.hint
    assert isinstance(caught.value, LeaseRejected) == ("broken" in named)
