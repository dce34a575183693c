"""``str(report)``: what was done and what went wrong, for a person; ``to_dict`` for a program."""

from __future__ import annotations

import json
from array import array

from flannel_dp import Outcome, Rejection, Repair, Report, Route, Unavailable
from flannel_dp._core import Table, diff_tables
from flannel_dp.cluster.rejections import Reason
from flannel_dp.reconcile.drift import Blame, count_result
from flannel_dp.reconcile.plan import DeviceChange
from flannel_dp.tables.entries import Fdb
from flannel_dp.tables.results import TableResult

ROUTE = Route("10.244.7.0/24", nexthop=7)


def troubled() -> Report:
    return Report(
        devices=(DeviceChange("flannel.1", "create", ("vni 1",)),),
        rejected=[Rejection("node9", 4, Reason.OVERLAP, "it overlaps node8")],
        conflicts=[(ROUTE, Route("10.244.7.0/24", gateway="192.0.2.9", device=3, protocol=4))],
        failures=[Outcome("add", "route", ROUTE, 22, "")],
        family_errors={6: Unavailable("no route", hint="add one")},
        problems={"firewall": Unavailable("nft is missing")},
        held={4: ["node5"]},
        warnings=("the clock is wrong",),
        names={3: "eth0"},
        unknown=("node99",),
    )


def test_a_report_that_is_in_sync_says_so_and_counts() -> None:
    report = Report()
    report.tables["route"] = {**report.tables["route"], "added": 1, "unchanged": 4}

    first, counts = str(report).splitlines()

    assert first == "in sync: 1 entry changed, 0.000 s"
    assert " ".join(counts.split()) == ("routes 1 added 0 replaced 0 removed 4 unchanged 0 failed")
    assert str(Report()) == "in sync: 0 entries changed, 0.000 s"


def test_all_that_went_wrong_is_named() -> None:
    assert str(troubled()).splitlines() == [
        "not in sync: 0 entries changed, 0.000 s",
        "device flannel.1: vni 1",
        "rejected node9: it overlaps node8",
        "not known, so not removed: node99",
        "conflict: route 10.244.7.0/24 nhid 7 conflicts with an existing entry (not ours): "
        "route 10.244.7.0/24 via 192.0.2.9 dev eth0 proto static",
        "failed: IPv6: no route - add one",
        "failed: firewall: nft is missing",
        "failed: add route 10.244.7.0/24 nhid 7: Invalid argument (EINVAL)",
        "kept although the leases lack them, IPv4: node5",
        "warning: the clock is wrong",
    ]


def test_a_report_as_plain_values() -> None:
    document = troubled().to_dict()

    assert json.loads(json.dumps(document)) == document
    assert document["unknown"] == ["node99"]
    assert {**document, "unknown": None} == {**troubled().to_json(), "unknown": None}


def test_a_repair_is_readable() -> None:
    desired = Table("fdb")
    desired.add(Fdb(1, "02:00:00:00:00:07", "192.0.2.7"))
    diff, repair = diff_tables(desired, Table("fdb")), Repair()
    count_result(repair, Blame(()), 0, TableResult(diff, array("i", [0])))
    repair.add("route", "changed", 3)

    assert str(repair).splitlines() == [
        "deleted, repaired: fdb 02:00:00:00:00:07 dst 192.0.2.7 dev if1",
        "changed, repaired: 3 of the route table",
    ]
    assert str(Repair()) == "nothing was to be repaired"
