"""Plans and reports name the devices that entries are on, another program's, too."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.look.terminal import plain
from flannel_dp.look.text import plan_lines, report_lines
from tests.lib.kernel import stranger
from tests.lib.leases import lease_of, peer, plane, subnet


def test_a_conflict_names_the_foreign_device(host: Any, family: int) -> None:
    """In a plan, in a sync's report, and in an update's."""
    stranger(host, "other0")
    metric = "metric 1024" if family == 6 else ""
    host.ip(f"-{family} route add {subnet(family, 3)} dev other0 proto static {metric}")
    with plane(host, family) as dp:
        leases = [lease_of(host), peer(2), peer(3)]
        plan = dp.plan(leases)
        synced = dp.sync(leases)
        dp.update(removed=[peer(3)])
        updated = dp.update(added=[peer(3)])

    said = f"route {subnet(family, 3)} dev other0 "
    assert said in next(line for line in plan_lines(plan, plain) if line.startswith("!"))
    (found,) = plan.to_json()["conflicts"]
    assert found["foreign_dev"] == "other0"
    for report in (synced, updated):
        assert any(said in line for line in report_lines(report, "in sync", plain))
        (found,) = report.to_json()["conflicts"]
        assert found["foreign_dev"] == "other0"


@pytest.mark.parametrize("made", [False, True], ids=["no device yet", "device"])
def test_a_plan_has_no_ifindex_in_the_place_of_a_name(host: Any, family: int, made: bool) -> None:
    """A device that has yet to be made has its name, and a blackhole is on no device."""
    with plane(host, family, nexthops=False, ip_blackhole_route=True) as dp:
        if made:
            dp.sync([lease_of(host), peer(2)])
            host.ip(f"-{family} route del blackhole {subnet(family, 0)} metric 4294901760")
        plan = dp.plan([lease_of(host), peer(2), peer(3)])
        device = dp.resolver.device_name(family)

    document = plan.to_json()["operations"]
    lines = [*plan_lines(plan, plain)]
    (hole,) = [line for line in lines if "blackhole" in line]
    assert hole == f"+ route {subnet(family, 0)} blackhole metric 4294901760"
    holes = [one["dev"] for one in document if one["entry"].get("type") == 6]
    assert holes == [""]
    assert {one["dev"] for one in document} == {"", device}
    assert not any(" if" in line for line in lines)
