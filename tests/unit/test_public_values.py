"""Bad values, given to each public name that takes some: ConfigError, which names the parameter and
the value, before anything is asked of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import flannel_dp
from flannel_dp import ConfigError
from flannel_dp._core import decode, dump_request

api: Any = flannel_dp
CONFIG = api.NetworkConfig.from_json('{"Network": "10.240.0.0/12", "Backend": {"Type": "vxlan"}}')
MAC = "02:00:00:00:00:07"

#: What the library returns and raises, and protocols.
RESULTS = {
    *(
        "Change",
        "DeviceChange",
        "DevicePlan",
        "Done",
        "Drift",
        "Family",
        "FollowedSource",
        "LifeChange",
    ),
    *(
        "Outcome",
        "PeerLife",
        "Plan",
        "Reason",
        "Rejection",
        "Repair",
        "Report",
        "Resource",
        "Result",
    ),
    *("BadClaim", "Call", "Delivery", "Explanation", "Identity", "Source"),
    *("Snapshot", "Status", "TablePlan", "TableResult", "View", "PROTOCOL", "__version__"),
}

#: Values that are read where they are used, and what does it.
LATER = {
    "Lease": "a sync rejects the bad one",
    "BackendData": "as Lease",
    "Claims": "filled by the compiled unit",
    "LeaseList": "as Lease",
    "VxlanDevice": "plan_device",
    "Diff": "TypeError for what is no Table",
    "diff_tables": "TypeError for what is no Table",
    "entry_dict": "an entry that was read",
    **dict.fromkeys(("Neighbour", "Fdb", "Nexthop", "Route", "Peer"), "Table.add"),
}


def plane(**keywords: Any) -> Any:
    return api.DataPlane(CONFIG, lock=False, **keywords)


def agent(**keywords: Any) -> Any:
    return api.Agent(plane(), api.FileSource("leases.json"), **keywords)


def kept(*values: Any, **named: Any) -> Any:
    with api.Kernel() as kernel:
        return api.keep(kernel, *values, **named)


def added(kind: str, *values: object) -> None:
    api.Table(kind).add(values)


def asked(*values: Any, **named: Any) -> None:
    """Whatever reads a scope."""
    dump_request(api.Scope(*values, **named))


#: By name: calls, and what the error of each says.
CALLS: dict[str, list[tuple[Callable[[], object], str]]] = {
    "Agent": [
        (lambda: api.Agent(5, api.FileSource("x")), "dataplane is 5"),
        (lambda: api.Agent(plane(), 5), "source is 5"),
        (lambda: agent(audit="x"), "every 'x' seconds"),
        (lambda: agent(audit=0), "every 0 seconds"),
        (lambda: agent(audit=float("nan")), "every nan seconds"),
    ],
    "Backend": [
        (lambda: api.Backend(type="udp"), "type is 'udp'"),
        (lambda: api.Backend(type="vxlan", vni=-1), "vni is -1"),
        (lambda: api.Backend(type="vxlan", port=70000), "port is 70000"),
        (lambda: api.Backend(type="vxlan", mtu="x"), "mtu is 'x'"),
    ],
    "Counters": [
        (lambda: api.Counters("flannel.1"), "devices is 'flannel.1'"),
        (lambda: api.Counters(5), "devices is 5"),
        (lambda: api.Counters([5]), r"devices is \[5\]"),
        (lambda: api.Counters([], 5.5), "netns is 5.5"),
    ],
    "DataPlane": [
        (lambda: api.DataPlane("x"), "config is 'x'"),
        (lambda: plane(resources=[5]), "a resource is 5"),
        (lambda: plane(iface=5), "iface is 5"),
        (lambda: plane(iface_regex=[5]), r"iface_regex is \[5\]"),
        (lambda: plane(public_ip=5), "public_ip is 5"),
        (lambda: plane(subnet=5), "subnet is 5"),
        (lambda: plane(room=-1), "room is -1"),
        (lambda: plane(rules=5), "rules is 5"),
        (lambda: plane(counters="x"), "counters is 'x'"),
        (lambda: plane(subnet_file=5), "subnet_file is 5"),
        (lambda: plane(run_dir=5), "run_dir is 5"),
        (lambda: plane(node_name=5), "node_name is 5"),
        (lambda: plane(take_over="no"), "take_over is 'no'"),
        (lambda: plane(netns=5.5), "netns is 5.5"),
        (lambda: plane().plan(5), "leases is 5"),
        (lambda: plane().sync(None), "leases is None"),
        (lambda: plane().update(5), "leases is 5"),
        (lambda: plane().update((), 5), "removed is 5"),
        (lambda: plane().resync([5]), r"families is \[5\]"),
        (lambda: plane().explain(5), "address is 5"),
    ],
    "DeviceLock": [
        (lambda: api.DeviceLock(5), "device is 5"),
        (lambda: api.DeviceLock("a/b"), "'a/b' cannot be a device name"),
        (lambda: api.DeviceLock("a", 5.5), "netns is 5.5"),
    ],
    "EtcdOptions": [
        (lambda: api.EtcdOptions(endpoints=()), "endpoints is empty"),
        (lambda: api.EtcdOptions(endpoints=("x y",)), "'x y' is not an endpoint"),
    ],
    "EtcdSource": [
        (lambda: api.EtcdSource(5), "options is 5"),
        (lambda: api.EtcdSource("x y"), "'x y' is not an endpoint"),
        (lambda: api.EtcdSource([]), "endpoints is empty"),
    ],
    "KubeOptions": [
        (lambda: api.KubeOptions(page_size=0), "page_size 0"),
        (lambda: api.KubeOptions(api_url="x"), "'x': neither https"),
    ],
    "KubeSource": [(lambda: api.KubeSource(5), "options is 5")],
    "PushSource": [
        (lambda: api.PushSource(5), "leases is 5"),
        (lambda: api.PushSource([5]), "a lease is 5"),
        (lambda: api.PushSource([]).put(5), "a lease is 5"),
        (lambda: api.PushSource([]).remove(5), "a lease is 5"),
        (lambda: api.PushSource([]).trouble(5), "error is 5"),
    ],
    "FileSource": [
        (lambda: api.FileSource(5), "path is 5"),
        (lambda: api.FileSource(None), "path is None"),
    ],
    "Forwarding": [
        (lambda: api.Forwarding(5), "device is 5"),
        (lambda: api.Forwarding("a", room=-1), "room is -1"),
        (lambda: api.Forwarding("a", 5.5), "netns is 5.5"),
    ],
    "Host": [(lambda: api.Host(5.5), "netns is 5.5")],
    "Inbox": [(lambda: api.Inbox(5), "wake is 5")],
    "Keeper": [
        (lambda: api.Keeper(5, api.Table("fdb"), api.fdb_scope(1)), "kernel is 5"),
        (lambda: kept(5, api.fdb_scope(1)), "wanted is 5"),
        (lambda: kept([5], api.fdb_scope(1)), "wanted is 5"),
        (lambda: kept(api.Table("fdb"), 5), "scope is 5"),
        (lambda: kept(api.Table("fdb"), [5]), "scope is 5"),
        (lambda: kept(api.Table("fdb"), api.fdb_scope(1), timeout="x"), "timeout is 'x'"),
    ],
    "Kernel": [
        (lambda: api.Kernel(5.5), "netns is 5.5"),
        (lambda: api.Kernel(rcvbuf=-1), "rcvbuf is -1"),
        (lambda: api.Kernel(-5), "descriptor -5 is not open"),
    ],
    "LinkReader": [(lambda: api.LinkReader(5.5), "netns is 5.5")],
    "NetworkConfig": [
        (lambda: api.NetworkConfig.from_json(5), "data is 5"),
        (lambda: api.NetworkConfig.from_file(None), "path is None"),
        (lambda: CONFIG.with_forwarding("x"), "'x' is not one of kernel, ebpf"),
    ],
    "Prober": [
        (lambda: api.Prober(5), "peers is 5"),
        (lambda: api.Prober(interval="x"), "interval is 'x'"),
        (lambda: api.Prober(interval=0), "an interval of 0 seconds"),
        (lambda: api.Prober(paths=17), "17 paths"),
    ],
    "RulesOptions": [
        (lambda: api.RulesOptions(engine="x"), "engine is 'x'"),
        (lambda: api.RulesOptions(guard="x"), "guard is 'x'"),
    ],
    "Scope": [
        (lambda: asked("route", 5), "family 5 of Scope.* is not that of a route table"),
        (lambda: asked("fdb", 2), "family 2 of Scope.* is not that of a fdb table"),
        (lambda: asked("neighbor", 2), "kind 'neighbor' of Scope"),
        (lambda: asked(5, 2), "kind 5 of Scope"),
        (
            lambda: asked("route", 2, "none0"),
            "route scope: Scope.*device is 'none0', and there is no",
        ),
        (lambda: asked("route", 2, -1), "route scope: Scope.*device=-1"),
        (lambda: asked("route", 2, protocol=256), "route scope: Scope.*protocol=256"),
        (lambda: asked("route", 2, within="x"), "within is not a prefix: 'x'"),
        (lambda: asked("route", 2, within="fd00::/8"), "within 'fd00::/8' is not of family 2"),
        (lambda: asked("nexthop", 2, ids=(5, 4)), r"ids \(5, 4\) .* end before they begin"),
        (lambda: asked("nexthop", 2, ids=5), "nexthop scope: Scope.*ids=5"),
        (lambda: decode(b"", api.PROTOCOL), "kind None of 138"),
    ],
    "StatusBoard": [(lambda: api.StatusBoard(5), "status is 5")],
    "Table": [
        (lambda: api.Table("x"), "unknown kind of table: 'x'"),
        (lambda: api.Table(None), "unknown kind of table: None"),
        (lambda: added("neighbour", 1, "10.0.0.1", "x"), "neighbour entry: .*mac is not a MAC"),
        (lambda: added("neighbour", "none0", "10.0.0.1", MAC), "entry: .*device is 'none0', and"),
        (lambda: added("fdb", 1, MAC, "x"), "fdb entry: .*endpoint is not an IP address: 'x'"),
        (lambda: added("fdb", 1, MAC, b"abc"), "fdb entry: .*endpoint is not an IP"),
        (lambda: added("fdb", 1, b"abc", "10.0.0.1"), "fdb entry: .*mac is not a MAC address"),
        (lambda: added("nexthop", 0, "10.0.0.1", 1), "nexthop entry: .*id is 1 or more"),
        (lambda: added("route", "10.0.0.0/40"), "route entry: .*not a prefix"),
        (lambda: added("peer", "10.0.0.0/24", 5, MAC), "peer entry: .*5"),
        (lambda: api.Table("route").add(5), "route entry: 5"),
    ],
    "Watch": [(lambda: api.Watch(5), "kept is 5")],
    "apply_device": [(lambda: api.apply_device(5), "plan is 5")],
    "decode_leases": [(lambda: api.decode_leases(5, origin="x"), "data is 5")],
    "delete_device": [
        (lambda: api.delete_device(5), "name is 5"),
        (lambda: api.delete_device(""), "interface name ''"),
    ],
    "keep": [(lambda: api.keep(5, api.Table("fdb"), api.fdb_scope(1)), "kernel is 5")],
    "fdb_columns": [(lambda: api.fdb_columns(1, 4, b"", 5), "endpoints is 5")],
    "fdb_scope": [
        (lambda: api.fdb_scope(-1), "device is -1"),
        (lambda: api.fdb_scope(True), "device is True"),
        (lambda: api.fdb_scope("lo", netns="none"), "network namespace none does not exist"),
    ],
    "fdb_table": [(lambda: api.fdb_table(1, [5]), "an entry is 5")],
    "ids_of": [
        (lambda: api.ids_of([-1]), "an id is -1"),
        (lambda: api.ids_of(["x"]), "an id is 'x'"),
    ],
    "neighbour_columns": [
        (lambda: api.neighbour_columns(1, 5, b"", b""), "family is 5"),
        (lambda: api.neighbour_columns(1, 4, b"abc", bytes(6)), "addresses is b'abc'"),
        (lambda: api.neighbour_columns(1, 4, bytes(4), bytes(12)), "different length: 1, 2"),
        (
            lambda: api.neighbour_columns("x", 4, bytes(4), bytes(6)),
            "device is 'x', and there is no such device",
        ),
    ],
    "neighbour_scope": [
        (lambda: api.neighbour_scope(-1, 4), "device is -1"),
        (lambda: api.neighbour_scope("none0", 4), "device is 'none0'"),
        (lambda: api.neighbour_scope(1, 2), "family is 2"),
    ],
    "neighbour_table": [
        (lambda: api.neighbour_table(1, 5), "entries is 5"),
        (lambda: api.neighbour_table(1, [("10.0.0.1", MAC, 5)]), "an entry is .*, 5"),
    ],
    "nexthop_columns": [
        (lambda: api.nexthop_columns(1, 4, 5, bytes(4)), "ids is 5"),
        (lambda: api.nexthop_columns(1, 4, b"abcd", bytes(4)), "the columns make no table"),
    ],
    "nexthop_scope": [
        (lambda: api.nexthop_scope(1, 7), "family is 7"),
        (lambda: api.nexthop_scope(1, ids=5), "ids is 5"),
        (lambda: api.nexthop_scope(1, ids=(7, 5)), r"ids is \(7, 5\)"),
        (lambda: api.nexthop_scope(1, protocol=-1), "protocol is -1"),
    ],
    "nexthop_table": [(lambda: api.nexthop_table(1, {0: "10.0.0.1"}), "id is 1 or more")],
    "peer_scope": [(lambda: api.peer_scope(-1, 4), "map is -1")],
    "peer_table": [(lambda: api.peer_table(1, [("10.0.0.0/24", MAC)]), "an entry is")],
    "plan_device": [(lambda: api.plan_device(None, 5), "want is 5")],
    "watch_all": [(lambda: next(api.watch_all([plane(), 5])), "planes is 5")],
    "route_columns": [
        (lambda: api.route_columns(4, bytes(4), bytes([40]), gateways=bytes(4)), "lengths is 40"),
        (lambda: api.route_columns(4, bytes(4), bytes([24])), "give one of them"),
    ],
    "route_scope": [
        (lambda: api.route_scope(2), "family is 2"),
        (lambda: api.route_scope(4, device=-1), "device is -1"),
        (lambda: api.route_scope(4, within="fd00::/8"), "within is 'fd00::/8'"),
        (lambda: api.route_scope(4, table=-1), "table is -1"),
    ],
    "route_table": [
        (lambda: api.route_table([("10.0.0.0/24", None)]), "the nexthop of 10.0.0.0/24 is None"),
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_value_is_named_with_its_parameter(name: str) -> None:
    for call, said in CALLS[name]:
        with pytest.raises(ConfigError, match=said) as caught:
            call()
        assert caught.value.hint, said


def test_every_public_name_is_in_one_of_the_lists() -> None:
    names = set(flannel_dp.__all__) - RESULTS - LATER.keys() - CALLS.keys()

    errors = {name for name in names if issubclass(getattr(api, name), Exception)}
    assert names == errors
