"""Lease objects whose values no lease can have: each is rejected by its name, the others stand."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import BackendData, SourceError
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, mac, peer, peers, plane, replaced

BAD: dict[str, tuple[Any, str]] = {
    "a number for an address": (peer(9, name="n9", public_ip=5, public_ipv6=5), "public_ip is 5"),
    "half a character": (peer(9, name="n\udcff"), "name is"),
    "a negative revision": (peer(9, name="n9", revision=-1), "revision is -1"),
    "a huge revision": (peer(9, name="n9", revision=2**64), "revision is 1844"),
    "a MAC that is none": (
        peer(9, name="n9", **dict.fromkeys(("backend_data", "backend_v6_data"), BackendData(1, 5))),
        "backend_data.vtep_mac is 5",
    ),
    "no struct": (peer(9, name="n9", backend_data={}, backend_v6_data={}), "backend_data is {}"),
    "no lease": ({"subnet": "10.240.9.0/24"}, "is no Lease"),
    "nothing": (None, "None is no Lease"),
    "bytes": (peer(9, name="n9", subnet=b"10.240.9.0/24", ipv6_subnet=b"x"), "subnet is b"),
}


@pytest.mark.parametrize("kind", BAD)
def test_the_others_stand(host: Any, kind: str) -> None:
    bad, words = BAD[kind]
    leases = [bad, lease_of(host), *peers(range(1, 4))]
    with plane(host) as dp:
        for told in (dp.plan(leases), dp.sync(leases)):
            (rejection,) = told.rejected
            assert rejection.reason == "bad-claim"
            assert words in rejection.detail
        for family in (4, 6):
            assert observed(host, family) == expected(peers(range(1, 4)), family)

        report = dp.update(added=[bad, peer(4)])

        assert [one.reason for one in report.rejected] == ["bad-claim"]
        for family in (4, 6):
            assert observed(host, family) == expected(peers(range(1, 5)), family)


@pytest.mark.parametrize("other", ["public_ip", "public_ipv6"])
def test_nothing_is_written_of_a_lease_with_one_malformed_half(host: Any, other: str) -> None:
    """Neither the half that is well formed, nor what is added beside this node's changed lease."""
    own = replaced(lease_of(host), backend_v6_data=BackendData(1, mac(6, 77)))
    with plane(host) as dp:
        dp.sync([lease_of(host), *peers(range(1, 4))])
        report = dp.update(added=[peer(9, name="n9", **{other: 5})])
        with pytest.raises(SourceError, match="has changed"):
            dp.update(added=[peer(8), own])

        assert [one.lease for one in report.rejected] == ["n9"]
        for family in (4, 6):
            assert observed(host, family) == expected(peers(range(1, 4)), family)


def test_an_error_of_anything_else_is_not_hidden(host: Any) -> None:
    with plane(host) as dp, pytest.raises(TypeError, match="of a progress"):
        dp.sync([lease_of(host), *peers([1])], progress=_fail)


def _fail(done: int, total: int) -> None:
    raise TypeError("of a progress")
