"""Which interface, address and lease are this node's: tables of evidence, and what follows."""

from __future__ import annotations

import pytest

from flannel_dp.identity import (
    Interface,
    Kept,
    addresses_to_publish,
    default_uplink,
    still_there,
)

ETH0 = Interface(2, "eth0", "", "02:00:00:00:00:02")
LINKS = {
    2: ETH0,
    3: Interface(3, "bond0", "bond", "02:00:00:00:00:03"),
    4: Interface(4, "tap0", "tun", "02:00:00:00:00:04"),
    5: Interface(5, "tun0", "tun"),
    6: Interface(6, "wg0", "wireguard"),
    7: Interface(7, "cilium_vxlan", "vxlan", "02:00:00:00:00:07"),
    8: Interface(8, "flannel.1", "vxlan", "02:00:00:00:00:08", ours=True),
    9: Interface(9, "genev0", "geneve", "02:00:00:00:00:09"),
    10: Interface(10, "sit0", "sit"),
}


@pytest.mark.parametrize(
    ("routes", "name"),
    [
        ([], None),
        ([99], None),
        ([2], "eth0"),
        ([3, 2], "bond0"),
        ([4, 2], "tap0"),
        ([5, 2], "eth0"),
        ([6, 2], "eth0"),
        ([7, 2], "eth0"),
        ([8, 2], "eth0"),
        ([9, 2], "eth0"),
        ([10, 2], "sit0"),
        ([5, 6, 7, 8, 9], None),
    ],
    ids=str,
)
def test_the_first_default_route_that_leads_out_of_no_tunnel(
    routes: list[int], name: str | None
) -> None:
    found = default_uplink(routes, LINKS)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("kept", "stays"),
    [
        (Kept(4, 2, "192.0.2.1"), True),
        (Kept(6, 2, "2001:db8::1"), True),
        (Kept(4, 2, "192.0.2.9"), False),  # the address is gone
        (Kept(4, 99, "192.0.2.1"), False),  # the interface is gone
        (Kept(4, 8, "192.0.2.1"), False),  # our own device
        (Kept(4, 6, "192.0.2.1"), True),  # the user named the tunnel once
    ],
    ids=str,
)
def test_what_is_in_use_stays_while_it_is_there(kept: Kept, stays: bool) -> None:
    found = still_there([kept], LINKS, ["192.0.2.1", "2001:db8::1"])
    assert found == ((kept,) if stays else ())


@pytest.mark.parametrize(
    ("usable", "named", "kept", "best"),
    [
        ("", "", "", ""),
        ("a b", "", "", "a b"),
        ("a b", "", "b", "b a"),
        ("a b", "", "old", "old a b"),  # deprecated, say: in use all the same
        ("a b", "b", "a", "b"),
        ("a b", "b", "", "b"),
        ("a b c", "b c", "c", "c b"),
        ("", "b", "", "b"),
    ],
)
def test_the_address_in_use_comes_first_unless_a_flag_asks_for_another(
    usable: str, named: str, kept: str, best: str
) -> None:
    found = addresses_to_publish(tuple(usable.split()), tuple(named.split()), kept)
    assert found == tuple(best.split())
