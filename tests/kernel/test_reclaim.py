"""What somebody turned away from us, and what was left half-made, is found again."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import DeviceGone
from flannel_dp.resources.device import writer
from tests.lib.kernel import expected, observed, stranger
from tests.lib.leases import DEVICE, lease_of, peers, plane


@pytest.mark.parametrize("how", ["blackhole", "dev lo", "via 192.0.2.77 dev other0 onlink"])
def test_a_nexthop_of_our_mark_that_was_pointed_elsewhere_is_taken_back(
    host: Any, how: str
) -> None:
    stranger(host, "other0")
    leases = [lease_of(host), *peers(range(1, 6))]
    with plane(host, 4) as dp:
        dp.sync(leases)
        host.ip(f"nexthop replace id 0x5af00300 {how} proto 138")

        report = dp.sync(leases)

        assert report.ok, report.to_json()["failures"]
        assert observed(host, 4) == expected(leases[1:], 4)
        assert dp.sync(leases).writes == 0


def test_a_nexthop_of_another_mark_stays_somebody_elses(host: Any) -> None:
    stranger(host, "other0")
    leases = [lease_of(host), *peers(range(1, 6))]
    host.ip("nexthop add id 0x5af00300 via 192.0.2.77 dev other0 onlink proto 99")
    with plane(host, 4) as dp:
        report = dp.sync(leases)

    assert [failure.entry.id for failure in report.failures if failure.table == "nexthop"] == [
        0x5AF00300
    ]
    (kept,) = [one for one in host.ip_json("nexthop show") if one["id"] == 0x5AF00300]
    assert (kept["dev"], kept["gateway"]) == ("other0", "192.0.2.77")


def test_a_half_made_device_that_was_renamed_meanwhile_is_undone(
    host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, done = writer._verify, []

    def late(*args: Any, **named: Any) -> None:
        if not done:
            done.append(1)
            host.ip(f"link set {DEVICE[family]} name other7")
        verify(*args, **named)

    monkeypatch.setattr(writer, "_verify", late)
    leases = [lease_of(host), *peers(range(1, 6))]
    with plane(host, family) as dp:
        try:
            dp.sync(leases)
        except DeviceGone:
            dp.sync(leases)

        assert observed(host, family) == expected(leases[1:], family)
    assert not any(link["ifname"] == "other7" for link in host.ip_json("link show"))
