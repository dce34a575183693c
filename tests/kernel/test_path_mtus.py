"""Routes with an MTU of their own: written, kept, undone, and of use to the packets of pods."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import ConfigError, DataPlane
from flannel_dp.kernel.netns import call_in_netns
from tests.lib.forwarding import Nodes
from tests.lib.leases import network_config
from tests.lib.probed import Probed
from tests.lib.traffic import pod_address
from tests.lib.waiting import LIMIT

#: Bytes of the headers of IP and UDP.
HEADERS = {4: 28, 6: 48}

#: What a socket option is called by family: never fragment; the path MTU that is known.
NEVER = {4: (socket.IPPROTO_IP, 10, 2), 6: (socket.IPPROTO_IPV6, 23, 2)}
KNOWN = {4: (socket.IPPROTO_IP, 14), 6: (socket.IPPROTO_IPV6, 24)}


@pytest.fixture(params=["kernel", "ebpf"])
def probed(request: Any, nodes: Nodes, family: int) -> Iterator[Probed]:
    made = Probed(nodes(3), family, request.param)
    yield made
    made.close()


def mtus(probed: Probed) -> dict[str, int]:
    """The MTUs that routes of the first node have of their own, as ``ip route`` shows them."""
    routes = probed.first.host.ip_json(f"-{probed.family} route show")
    return {
        one["dst"]: metric["mtu"]
        for one in routes
        for metric in one.get("metrics", ())
        if "mtu" in metric
    }


def written(probed: Probed) -> dict[str, int]:
    """What a sync of the first node has to write, by table."""
    plan = probed.planes[0].plan(probed.leases)
    return {table.diff.kind: len(table.diff) for table in plan.tables if len(table.diff)}


def test_an_mtu_is_of_use_and_kept_until_it_is_undone(probed: Probed) -> None:
    packets_that_the_path_does_not_take(probed)
    plane, family = probed.planes[0], probed.family
    one, other = (probed.subnet(node) for node in probed.nodes[1:])
    foreign = {4: "198.51.100.0/24", 6: "2001:db8:99::/64"}[family]
    probed.at(probed.first, f"route add {foreign} dev {probed.first.host.iface} mtu 1300")
    assert plane.set_path_mtus({one: 1350}).ok
    assert mtus(probed) == {one: 1350, foreign: 1300}
    assert plane.path_mtus() == {one: 1350}
    assert (plane.sync(probed.leases).writes, written(probed)) == (0, {})

    # Another program takes it away, and gives one to another peer's route.
    (route,) = probed.first.host.ip_json(f"-{family} route show {one}")
    leads = f"via {route['gateway']} dev {route['dev']} onlink"
    leads = f"nhid {route['nhid']}" if "nhid" in route else leads
    probed.at(probed.first, f"route del {one}", f"route add {one} {leads} proto 138")
    assert mtus(probed) == {foreign: 1300}
    assert written(probed) == {"route": 1}
    assert "mtu 1350" in "\n".join(plane.plan(probed.leases).lines())
    assert plane.sync(probed.leases).ok
    assert mtus(probed) == {one: 1350, foreign: 1300}

    # A lease that changes, comes and goes.
    lease = probed.nodes[1].lease
    field = "backend_data" if family == 4 else "backend_v6_data"
    data = replace(getattr(lease, field), vtep_mac="02:00:00:00:00:77")
    assert plane.update(added=[replace(lease, **{field: data})]).ok
    assert plane.resync().writes == 0
    assert plane.update(removed=[lease]).ok
    assert plane.update(added=[lease]).ok
    assert mtus(probed) == {one: 1350, foreign: 1300}
    assert plane.resync().writes == 0
    assert written(probed) == {}

    if mode_of(probed) == "ebpf":  # in the place of a route that is to be added
        probed.at(probed.first, f"route add {other} dev {probed.device}")
    assert plane.set_path_mtus({one: 1340, other: 1330}).ok
    assert mtus(probed) == {one: 1340, other: 1330, foreign: 1300}
    plane.close()

    # The next process takes what is there, if it is told to; else no route has an MTU.
    with again(probed, path_mtus=True) as taking:
        assert taking.plan(probed.leases).is_empty
        assert taking.sync(probed.leases).writes == 0
        assert taking.path_mtus() == {one: 1340, other: 1330}
        assert taking.set_path_mtus({other: 1330}).ok
        assert mtus(probed) == {other: 1330, foreign: 1300}
    with again(probed) as strict:
        assert strict.sync(probed.leases).ok
        assert mtus(probed) == {foreign: 1300}
        assert strict.sync(probed.leases).writes == 0
        assert strict.set_path_mtus({one: 1350}).ok
        assert strict.clean().ok
    assert mtus(probed) == {foreign: 1300}


def mode_of(probed: Probed) -> str:
    return "ebpf" if probed.planes[0].config.backend.mode == "ebpf" else "kernel"


def again(probed: Probed, **options: Any) -> DataPlane:
    return probed.first.plane(probed.family, forwarding=mode_of(probed), **options)


def packets_that_the_path_does_not_take(probed: Probed) -> None:
    """They are lost; with an MTU of the route their sender is told, and TCP passes."""
    family, narrow = probed.family, probed.second
    narrow.host.ip(f"link set {narrow.host.iface} mtu 1400")
    takes = 1400 - {4: 50, 6: 70}[family]
    target = pod_address(family, narrow.number)
    kind = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    server = call_in_netns(narrow.pod, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    client = call_in_netns(probed.first.pod, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    with server, client:
        server.bind((target, 9))
        server.settimeout(LIMIT)
        client.setsockopt(*NEVER[family])
        client.connect((target, 9))
        large = bytes(1430 - HEADERS[family])
        client.send(large)
        client.send(b"small")
        assert server.recv(2000) == b"small"

        assert probed.planes[0].set_path_mtus({probed.subnet(narrow): takes}).ok
        client.send(large)
        with pytest.raises(OSError, match="too long"):
            send_all(client, large)
        assert client.getsockopt(*KNOWN[family]) == takes
        client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # the answer to the other one
        client.send(bytes(takes - HEADERS[family]))
        assert len(server.recv(2000)) == takes - HEADERS[family]
    sent = bytes(range(256)) * 1024
    assert received(probed.first.pod, narrow.pod, target, sent) == sent


def send_all(client: socket.socket, data: bytes) -> None:
    """Send until that is an error: the kernel's answer is met by what is sent after it."""
    while True:
        client.send(data)


def received(here: str, there: str, target: str, data: bytes) -> bytes:
    """What of ``data`` a TCP server in another namespace receives."""
    kind = socket.AF_INET6 if ":" in target else socket.AF_INET
    with call_in_netns(there, lambda: socket.create_server((target, 0), family=kind)) as server:
        server.settimeout(LIMIT)
        address = server.getsockname()[:2]
        client = call_in_netns(here, lambda: socket.create_connection(address, timeout=LIMIT))

        def send() -> None:
            with client:
                client.sendall(data)

        sender = threading.Thread(target=send)
        sender.start()
        found = bytearray()
        with server.accept()[0] as stream:
            stream.settimeout(LIMIT)
            while part := stream.recv(1 << 16):
                found += part
        sender.join(LIMIT)
    return bytes(found)


@pytest.mark.parametrize(
    "given", [{"10.244.2.0/24": 0}, {"10.244.2.0/24": "1350"}, [1350], {"a": 1350}], ids=str
)
def test_what_is_no_mtu_is_named(given: Any) -> None:
    with DataPlane(network_config(4)) as plane, pytest.raises(ConfigError, match=r"1350|0"):
        plane.set_path_mtus(given)
