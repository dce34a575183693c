"""OwnNode: what this machine is given by its node object, and what it publishes there."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp.cluster.admission import Protected
from flannel_dp.cluster.lease import BackendData, Identity, Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import AuthFailed, ConfigError, NotYet, Unavailable
from flannel_dp.sources import Inbox, Snapshot
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.membership import KubeMembership, Restores
from flannel_dp.sources.kube.own import OwnNode
from tests.lib.apiserver import MERGE, ApiServer, status
from tests.lib.kube import (
    PREFIX,
    node,
)
from tests.lib.stand_ins import Clock
from tests.lib.waiting import LIMIT, wait_until

NAME = "node-00007"
V4 = Identity(public={4: "192.0.2.7"}, macs={4: "02:00:00:00:00:07"}, vni=1)
V6 = Identity(public={6: "2001:db8::7"}, macs={6: "02:00:00:00:06:07"}, vni=1)
DUAL = Identity(public=V4.public | V6.public, macs=V4.macs | V6.macs, vni=1)
BARE: dict[str, Any] = dict.fromkeys(
    ("kube_subnet_manager", "backend_type", "backend_data", "public_ip")
)
BOTH = ["10.244.7.0/24", "fd00:10:244:7::/64"]
SUBNETS = {4: BOTH[0], 6: BOTH[1]}

Own = Callable[..., OwnNode]


@pytest.fixture(name="own")
def own_fixture(options: Callable[..., KubeOptions]) -> Iterator[Own]:
    """``own(**options)``: the node node-00007, unless told otherwise."""
    made: list[OwnNode] = []

    def make(**how: Any) -> OwnNode:
        made.append(OwnNode(options(**({"node_name": NAME} | how))))
        return made[-1]

    yield make
    for each in made:
        each.close()


def config(network: str = "10.244.0.0/16", network6: str = "") -> NetworkConfig:
    document: dict[str, object] = {"EnableIPv4": bool(network), "Backend": {"Type": "vxlan"}}
    if network:
        document["Network"] = network
    if network6:
        document |= {"EnableIPv6": True, "IPv6Network": network6}
    return NetworkConfig.from_json(json.dumps(document))


def notes(server: ApiServer) -> dict[str, str]:
    annotations = server.nodes[NAME]["metadata"]["annotations"]
    return {k.removeprefix(PREFIX): v for k, v in annotations.items() if k.startswith(PREFIX)}


# ---- its name


def test_the_name_is_that_of_the_option_then_of_the_environment(own: Own) -> None:
    environ = {"NODE_NAME": "by-environ", "POD_NAME": "p", "POD_NAMESPACE": "n"}

    assert own(node_name="by-option", environ=environ).node_name() == "by-option"
    assert own(node_name="", environ=environ).node_name() == "by-environ"


def test_the_name_is_where_the_pod_runs(server: ApiServer, own: Own) -> None:
    server.pods["kube-flannel", "ds-x1"] = {"kind": "Pod", "spec": {"nodeName": "by-pod"}}
    environ = {"POD_NAME": "ds-x1", "POD_NAMESPACE": "kube-flannel"}
    mine = own(node_name="", environ=environ)

    assert mine.node_name() == "by-pod"
    assert mine.node_name() == "by-pod"
    assert [seen.path for seen in server.requests] == ["/api/v1/namespaces/kube-flannel/pods/ds-x1"]


@pytest.mark.parametrize("environ", [{}, {"POD_NAME": "p"}, {"POD_NAMESPACE": "n"}], ids=str)
def test_no_name(own: Own, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="POD_NAMESPACE") as caught:
        own(node_name="", environ=environ).node_name()

    assert "NODE_NAME" in caught.value.hint


def test_a_pod_that_runs_nowhere_yet(server: ApiServer, own: Own) -> None:
    server.pods["n", "p"] = {"kind": "Pod", "spec": {}}

    with pytest.raises(Unavailable, match="n/p: its spec has no nodeName"):
        own(node_name="", environ={"POD_NAME": "p", "POD_NAMESPACE": "n"}).node_name()


def test_names_cannot_leave_their_place_in_the_path(server: ApiServer, own: Own) -> None:
    with pytest.raises(Unavailable):
        own(node_name="../namespaces/x?y").lease()

    assert server.last("get").path == "/api/v1/nodes/..%2Fnamespaces%2Fx%3Fy"


def test_an_unknown_node(own: Own) -> None:
    with pytest.raises(Unavailable, match=NAME) as caught:
        own().lease()

    assert "NODE_NAME" in caught.value.hint


# ---- its subnets


@pytest.mark.parametrize(
    ("cidrs", "networks", "subnets"),
    [
        (BOTH[:1], ("10.244.0.0/16", ""), {4: BOTH[0]}),
        (BOTH, ("10.244.0.0/16", "fd00:10:244::/48"), SUBNETS),
        (BOTH[::-1], ("10.244.0.0/16", "fd00:10:244::/48"), SUBNETS),
        (BOTH, ("10.244.0.0/16", ""), {4: BOTH[0]}),
        (BOTH[1:], ("", "fd00:10:244::/48"), {6: BOTH[1]}),
    ],
    ids=["v4", "dual", "dual, v6 first", "v4 of dual", "v6"],
)
def test_own_subnets(
    server: ApiServer, own: Own, cidrs: list[str], networks: tuple[str, str], subnets: object
) -> None:
    server.put(node(7, cidrs=cidrs))

    assert own().own_subnets(config(*networks)) == subnets


def test_a_node_of_an_old_cluster_has_one_pod_cidr(server: ApiServer, own: Own) -> None:
    old = node(7, cidrs=BOTH[:1])
    del old["spec"]["podCIDRs"]
    server.put(old)

    assert own().own_subnets(config()) == {4: BOTH[0]}


@pytest.mark.parametrize(("cidrs", "family"), [([], 4), (BOTH[1:], 4), (BOTH[:1], 6)])
def test_no_pod_cidr(server: ApiServer, own: Own, cidrs: list[str], family: int) -> None:
    server.put(node(7, cidrs=cidrs))
    dual = config("10.244.0.0/16", "fd00:10:244::/48")

    with pytest.raises(Unavailable, match=f"{NAME}: pod cidr not assigned for IPv{family}") as e:
        own().own_subnets(dual)

    assert "--allocate-node-cidrs" in e.value.hint


@pytest.mark.parametrize(
    ("cidrs", "says"),
    [
        (["10.99.7.0/24"], "10.99.7.0/24 is not inside Network 10.244.0.0/16"),
        (["10.0.0.0/8"], "10.0.0.0/8 is not inside Network"),
        ([BOTH[0], "fd99::/64"], "fd99::/64 is not inside IPv6Network fd00:10:244::/48"),
        ([BOTH[0], "10.244.8.0/24"], "two pod CIDRs of IPv4"),
        (["10.244.7/24"], "not a prefix"),
    ],
)
def test_a_pod_cidr_that_cannot_be_used(
    server: ApiServer, own: Own, cidrs: list[str], says: str
) -> None:
    server.put(node(7, cidrs=cidrs))

    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        own().own_subnets(config("10.244.0.0/16", "fd00:10:244::/48"))

    assert NAME in caught.value.message
    assert caught.value.hint


# ---- its addresses


def test_addresses_by_annotation(server: ApiServer, own: Own) -> None:
    server.put(node(7))
    assert own().public_overrides() == own().node_public() == {}

    given = {
        "public_ip_overwrite": "203.0.113.7",
        "public_ipv6_overwrite": "2001:DB8:0::7",
        "node_public_ip": "192.0.2.77",
        "node_public_ipv6": "2001:db8::77",
    }
    server.put(node(7, **given))
    assert own().public_overrides() == {4: "203.0.113.7", 6: "2001:db8::7"}
    assert own().node_public() == {4: "192.0.2.77", 6: "2001:db8::77"}


@pytest.mark.parametrize("text", ["2001:db8::7", "eth0", "192.0.2.7/24"])
def test_an_address_that_is_none(server: ApiServer, own: Own, text: str) -> None:
    server.put(node(7, public_ip_overwrite=text))

    with pytest.raises(ConfigError, match=f"{PREFIX}public-ip-overwrite") as caught:
        own().public_overrides()

    assert text in caught.value.message
    assert NAME in caught.value.message


# ---- what it publishes


def test_vxlan(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH[:1], **BARE))

    assert own().publish(V4, {4: BOTH[0]})

    assert notes(server) == {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:00:07"}',
        "public-ip": "192.0.2.7",
    }
    seen = server.last("patch")
    assert seen.path == f"/api/v1/nodes/{NAME}/status"
    assert seen.content_type == MERGE
    assert seen.patched.keys() == {"metadata"}


def test_a_subnet_that_overlaps_the_underlay_is_not_published(
    server: ApiServer, options: Callable[..., KubeOptions]
) -> None:
    server.put(node(7, cidrs=BOTH[:1], **BARE))
    member = KubeMembership(options(node_name=NAME), "net-conf.json")
    met = Protected("10.244.0.0/20", "the network of eth1", "ip address del 10.244.0.9/20 dev eth1")

    with pytest.raises(NotYet, match=r"10\.244\.7\.0/24 overlaps the network of eth1") as caught:
        member.join(V4, config(), {}, lambda subnets, fresh: {4: met})

    assert caught.value.hint == met.remedy
    assert notes(server) == {}
    assert member.join(V4, config(), {}) == {4: BOTH[0]}
    assert notes(server)["public-ip"] == "192.0.2.7"
    member._node.close()
    member.source.close()


def test_dual_stack(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH, **BARE))
    mine = own()

    mine.publish(DUAL, SUBNETS)

    assert notes(server)["backend-v6-data"] == '{"VNI":1,"VtepMAC":"02:00:00:00:06:07"}'
    assert notes(server)["public-ipv6"] == "2001:db8::7"
    assert mine.lease() == DUAL.lease(SUBNETS, NAME)


def test_ipv6_alone(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH[1:], **BARE))
    mine = own()

    mine.publish(V6, {6: BOTH[1]})

    assert notes(server).keys() == {
        "kube-subnet-manager", "backend-type", "backend-v6-data", "public-ipv6",
    }  # fmt: skip
    assert mine.lease() == V6.lease({6: BOTH[1]}, NAME)


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["v4", "v6", "dual"])
def test_host_gw_publishes_null(server: ApiServer, own: Own, families: tuple[int, ...]) -> None:
    cidrs = {family: SUBNETS[family] for family in families}
    server.put(node(7, cidrs=list(cidrs.values()), **BARE))
    public = {family: DUAL.public[family] for family in families}
    mine = own()

    mine.publish(Identity(public=public, macs={}, backend="host-gw"), cidrs)

    expected = {
        "kube-subnet-manager": "true",
        "backend-type": "host-gw",
        "backend-data": "null",
        "public-ip": public.get(4, "0.0.0.0"),
    }
    if 6 in families:
        expected |= {"backend-v6-data": "null", "public-ipv6": "2001:db8::7"}
    assert notes(server) == expected
    assert mine.lease() == Lease(
        subnet=cidrs.get(4, ""),
        ipv6_subnet=cidrs.get(6, ""),
        public_ip=public.get(4, ""),
        public_ipv6=public.get(6, ""),
        backend_type="host-gw",
        name=NAME,
    )


def test_nothing_is_written_when_nothing_differs(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH, **BARE))
    mine = own()
    assert mine.publish(DUAL, SUBNETS)

    assert not mine.publish(DUAL, SUBNETS)
    assert server.count("patch") == 1

    changed = Identity(public=DUAL.public, macs={**DUAL.macs, 6: "02:00:00:00:06:99"}, vni=1)
    assert mine.publish(changed, SUBNETS)
    assert server.last("patch").patched["metadata"]["annotations"] == {
        f"{PREFIX}backend-v6-data": '{"VNI":1,"VtepMAC":"02:00:00:00:06:99"}'
    }


def test_overrides_are_published_in_place_of_our_addresses(server: ApiServer, own: Own) -> None:
    given: dict[str, Any] = {
        "public_ip_overwrite": "203.0.113.7",
        "public_ipv6_overwrite": "2001:db8:ffff::7",
    }
    server.put(node(7, cidrs=BOTH, **(BARE | given)))
    mine = own()

    mine.publish(DUAL, SUBNETS)

    assert notes(server)["public-ip"] == "203.0.113.7"
    assert notes(server)["public-ipv6"] == "2001:db8:ffff::7"
    assert not mine.publish(DUAL, SUBNETS)


def test_a_wide_vni_is_published_whole(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH[:1], **BARE))
    mine = own()

    mine.publish(Identity(public=V4.public, macs=V4.macs, vni=0x12345), {4: BOTH[0]})

    lease = mine.lease()
    assert isinstance(lease, Lease)
    assert lease.backend_data == BackendData(0x12345, V4.macs[4])


def test_other_prefixes(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH[:1], **BARE))

    own(annotation_prefix="org.example/net").publish(V4, {4: BOTH[0]})

    annotations = server.nodes[NAME]["metadata"]["annotations"]
    assert annotations["org.example/net-public-ip"] == "192.0.2.7"
    assert notes(server) == {}


def test_a_node_made_anew_with_another_pod_cidr(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=["10.244.9.0/24"], **BARE))

    with pytest.raises(Unavailable, match=r"10\.244\.7\.0/24 .* but 10\.244\.9\.0/24"):
        own().publish(V4, {4: BOTH[0]})

    assert server.count("patch") == 0


def test_a_patch_that_is_not_allowed(server: ApiServer, own: Own) -> None:
    server.put(node(7, cidrs=BOTH[:1], **BARE))
    server.fail("patch", status(403, "Forbidden", "nodes is forbidden"))

    with pytest.raises(AuthFailed, match="PATCH /api/v1/nodes/") as caught:
        own().publish(V4, {4: BOTH[0]})

    assert '"patch" of "nodes/status"' in caught.value.hint


# ---- ready


def test_mark_ready(server: ApiServer, own: Own) -> None:
    unavailable = node(7)
    unavailable["status"]["conditions"].append(
        {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}
    )
    server.put(unavailable)
    mine = own()

    assert mine.mark_ready()

    conditions = server.nodes[NAME]["status"]["conditions"]
    assert len(conditions) == len(unavailable["status"]["conditions"])
    told = conditions[-1]
    assert (told["type"], told["status"]) == ("NetworkUnavailable", "False")
    assert told["reason"] == "FlannelIsUp"
    assert told["message"] == "Flannel is running on this node"
    for key in ("lastHeartbeatTime", "lastTransitionTime"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told[key])
    assert server.last("patch").patched.keys() == {"status"}

    assert not mine.mark_ready(), "once is enough"
    assert server.count("patch") == 1


def test_mark_ready_can_be_tried_again(server: ApiServer, own: Own) -> None:
    server.put(node(7))
    server.fail("patch", status(503, "ServiceUnavailable"))
    mine = own()

    with pytest.raises(Unavailable, match="503"):
        mine.mark_ready()

    assert mine.mark_ready()


def test_mark_ready_when_it_is_off(server: ApiServer, own: Own) -> None:
    server.put(node(7))

    assert not own(set_node_network_unavailable=False).mark_ready()

    assert server.requests == []


@pytest.mark.parametrize(
    "data", [b"<html>", b"\xff\xff\xff", b"[" * 100_000, b'{"spec": 7}'], ids=len
)
def test_what_is_no_node(server: ApiServer, own: Own, data: bytes) -> None:
    server.fail("get", lambda handler: handler.answer(200, data))

    with pytest.raises(Unavailable, match="not what was asked for"):
        own().lease()


# ---- restoring annotations


def test_restorations_come_ever_later_and_are_contested_after_three() -> None:
    clock = Clock()
    restores = Restores(clock, first=1.0, calm=300.0)
    assert restores.allowed
    assert restores.seconds_left(True) == 0.0
    pauses = []
    for _ in range(8):
        restores.add()
        assert not restores.allowed
        left = restores.seconds_left(True)
        assert left is not None
        pauses.append(left)
        clock.now += left
        assert restores.allowed
    assert pauses[:2] == pytest.approx([1.0, 2.0], rel=0.25)
    assert max(pauses) <= 75.0, "once a minute, varied by a quarter"
    assert restores.contested

    calm = restores.seconds_left(False)
    assert calm is not None
    clock.now += calm
    assert not restores.contested
    assert restores.seconds_left(False) is None
    restores.add()
    assert not restores.contested
    assert restores.seconds_left(True) == pytest.approx(1.0, rel=0.25)


def test_another_program_that_changes_them_again_and_again_is_told(
    server: ApiServer, options: Callable[..., KubeOptions]
) -> None:
    """As two agents with the name of one node would."""
    server.put(node(7, cidrs=BOTH[:1], **BARE))
    member = KubeMembership(options(node_name=NAME), "net-conf.json")
    member._restores = Restores(first=0.01)
    member.join(V4, config(), {})
    inbox = Inbox()
    keeper = threading.Thread(target=member.keep, args=(inbox,))
    keeper.start()
    try:
        for count in range(3):
            server.put(node(7, cidrs=BOTH[:1], public_ip=f"198.51.100.{count}"))
            member._check_own_lease(Snapshot(LeaseList([], []), "the test", 0.0))
            wait_until(lambda: notes(server)["public-ip"] == "192.0.2.7")
        found: list[Any] = []
        wait_until(lambda: found.append(inbox.take().error) or found[-1])
        assert "changes its flannel annotations again and again" in str(found[-1])
    finally:
        inbox.stop()
        keeper.join(LIMIT)
        member._node.close()
        member.source.close()
        inbox.close()
