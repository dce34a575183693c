"""What a person sees of an overlay that a program forwards: plan, show, explain, and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane, NotPermitted, Unsupported
from flannel_dp.agent.metrics import Exposition
from flannel_dp.agent.status import StatusBoard
from flannel_dp.bpf import helper, loader
from flannel_dp.command.cli import main
from flannel_dp.command.request import Request
from flannel_dp.command.running import ServiceBuild
from flannel_dp.errors import Busy
from flannel_dp.kernel.lock import DeviceLock
from flannel_dp.kernel.netns import call_in_netns, enter_netns
from flannel_dp.look.explain import explain
from flannel_dp.look.show import show
from flannel_dp.look.stats import stats
from flannel_dp.reconcile.watch import Watch
from flannel_dp.resources.forwarding.pinned import remains
from tests.lib.forwarding import config, filters, remove_pins, send_ping
from tests.lib.leases import DEVICE, NETWORK, endpoint, lease_of, mac, peers, subnet
from tests.lib.short import run
from tests.lib.traffic import pod_address
from tests.lib.waiting import wait_until

NUMBERS = range(1, 6)


@pytest.fixture
def dp(host: Any, family: int) -> Iterator[DataPlane]:
    with DataPlane(config(family), iface=host.iface, netns=host.ns) as made:
        yield made
    remove_pins(host)


def test_show_lists_the_peers_of_the_map(dp: DataPlane, host: Any, family: int) -> None:
    leases = [lease_of(host), *peers(NUMBERS)]
    assert "there is no such device" in str(show(dp))
    dp.sync(leases)

    (view,) = show(dp).families

    assert view.device is not None
    assert view.device.external
    assert not view.device.problem
    assert [(p.subnet, p.endpoint, p.mac, p.state, p.way) for p in view.peers] == [
        (subnet(family, n), endpoint(family, n), mac(family, n), "ok", "tunnel") for n in NUMBERS
    ]
    assert view.strays == ()
    assert "forwarded by a program" in str(show(dp))
    assert "vni 1" in str(show(dp))


def test_show_with_leases_says_what_a_sync_would_change(
    dp: DataPlane, host: Any, family: int
) -> None:
    dp.sync([lease_of(host), *peers(NUMBERS)])

    (view,) = show(dp, [lease_of(host), *peers(range(2, 8))]).families

    changes = {peer.subnet: peer.difference for peer in view.peers if peer.difference}
    assert set(changes) == {subnet(family, number) for number in (1, 6, 7)}
    assert "sync removes it" in changes[subnet(family, 1)]
    assert "add peer behind" in changes[subnet(family, 7)]


@pytest.mark.parametrize("damage", ["program", "route", "neighbour"])
def test_what_stops_all_peers_is_named(dp: DataPlane, host: Any, family: int, damage: str) -> None:
    dp.sync([lease_of(host), *peers(NUMBERS)])
    device = DEVICE[family]
    if damage == "program":
        host.exec("tc", "filter", "del", "dev", device, "egress")
    elif damage == "route":
        host.ip(f"-{family} route del {NETWORK[family]} dev {device}")
    else:
        host.ip(f"-{family} neigh flush dev {device} nud permanent")

    (view,) = show(dp).families
    told = explain(dp, pod_address(family, 2))

    assert {peer.state for peer in view.peers} == {f"no {damage}"}
    bad = [step for step in told.steps if not step.ok]
    assert bad
    assert "flannel-dp sync" in bad[0].text
    if damage == "program":
        assert view.device is not None
        assert "not attached (egress)" in view.device.problem


def test_explain_follows_a_packet_through_the_map(dp: DataPlane, host: Any, family: int) -> None:
    dp.sync([lease_of(host), *peers(NUMBERS)])
    host.ip(f"-{family} route add default via {'192.0.2.250' if family == 4 else '2001:db8::250'}")

    told = explain(dp, pod_address(family, 3))

    assert told.verdict == "peer"
    assert [step.name for step in told.steps] == [
        "lease",
        "device",
        "route",
        "neighbour",
        "peer",
        "packet",
    ]
    assert all(step.ok for step in told.steps), str(told)
    assert f"{subnet(family, 3)} behind {endpoint(family, 3)}" in told.steps[4].held
    with DataPlane(dp.config, iface=host.iface, netns=host.ns) as fresh:
        alone = explain(fresh, pod_address(family, 3))
    assert alone.verdict == "peer"
    assert endpoint(family, 3) in alone.summary
    nobody = explain(dp, pod_address(family, 77))
    assert nobody.verdict == "unclaimed"
    assert all(step.ok for step in nobody.steps)
    assert "the program drops it" in str(nobody)


def test_what_the_program_drops_is_told_with_its_reason(
    dp: DataPlane, host: Any, family: int
) -> None:
    """By stats, without counters, and by /metrics."""
    dp.sync([lease_of(host), *peers(NUMBERS)])
    send_ping(host.ns, pod_address(family, 77))
    wait_until(lambda: any(one.packets for one in stats(dp).refused))

    told = stats(dp)

    assert {one.reason: one.packets for one in told.refused if one.packets} == {"no_peer": 1}
    assert "dropped by the forwarding program: 1 no_peer" in str(told)
    assert {"reason": "no_peer", "packets": 1} in [
        {key: one[key] for key in ("reason", "packets")}
        for one in told.to_json()["forwarding_drops"]
    ]
    text, _ = Exposition(StatusBoard(), lambda: dp.counting).render("")
    assert b'flannel_dp_forwarding_drops_total{reason="no_peer"} 1.0' in text
    assert b'flannel_dp_forwarding_drops_total{reason="spoofed"} 0.0' in text


def test_without_the_right_to_look_the_reason_is_told(
    dp: DataPlane, host: Any, family: int
) -> None:
    """A bpffs belongs to root, and does not even say what there is."""
    dp.sync([lease_of(host), *peers(NUMBERS)])
    child = os.fork()
    if not child:
        told = False
        try:
            enter_netns(host.ns)
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            show(DataPlane(dp.config, iface=host.iface))
        except NotPermitted:
            told = True
        finally:
            os._exit(0 if told else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_many_events_of_filters_are_one_look(
    dp: DataPlane, host: Any, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dp.sync([lease_of(host), *peers(NUMBERS)])
    looks: list[int] = []
    not_attached = dp.forwarder.not_attached
    monkeypatch.setattr(
        dp.forwarder, "not_attached", lambda index: looks.append(index) or not_attached(index)
    )
    add = f"filter add dev {DEVICE[family]} egress protocol ip prio"
    with Watch(dp) as watch:
        watch.remember()
        watch.read()
        watch.dirty.clear()
        lines = [f"{add} {20000 + n} u32 match u32 0 0 flowid 1:1" for n in range(50)]
        run("tc", "-batch", "-", stdin="\n".join(lines) + "\n", netns=host.ns)
        assert not watch.read()
        assert len(looks) == 1
        host.exec("tc", "filter", "del", "dev", DEVICE[family], "egress", "prio", "13800")
        assert watch.read()


def test_both_devices_are_held_whoever_forwards(host: Any) -> None:
    """Each kind deletes what the other has."""
    with DataPlane(config(4, 6), iface=host.iface, netns=host.ns) as dp:
        for device in ("flannel.1", "flannel-v6.1"):
            with DeviceLock(device, host.ns), pytest.raises(Busy):
                dp.hold()


# ---- the command ------------------------------------------------------------------------


class Files:
    """net-conf.json (of the kernel's kind) and leases.json, and the command on them."""

    def __init__(self, host: Any, family: int, folder: Path) -> None:
        self.host = host
        self.net_conf, self.leases = folder / "net-conf.json", folder / "leases.json"
        self.net_conf.write_text(config(family, forwarding="kernel").to_json())
        every = [lease_of(host), *peers(NUMBERS)]
        self.leases.write_text('{"leases": [' + ",".join(one.to_json() for one in every) + "]}")

    @property
    def flags(self) -> list[str]:
        here = ["--netns", self.host.ns, "--iface", "eth0", "--firewall", "none"]
        return ["--net-conf", str(self.net_conf), *here]

    def run(self, command: str, *more: str) -> int:
        leases = [] if command == "clean" else ["--leases", str(self.leases)]
        return main([command, *leases, *self.flags, *more])


@pytest.fixture
def files(host: Any, family: int, tmp_path: Path) -> Iterator[Files]:
    yield Files(host, family, tmp_path)
    remove_pins(host)


def test_the_flag_changes_a_node_over(
    files: Files, host: Any, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.run("sync") == 0
    capsys.readouterr()

    assert files.run("plan", "--forwarding", "ebpf") == 0
    planned = capsys.readouterr().out
    assert "forwarding by eBPF: the program can be loaded" in planned
    assert "delete the existing device" in planned
    assert not filters(host, DEVICE[family])

    assert files.run("sync", "--forwarding", "ebpf") == 0
    assert len(filters(host, DEVICE[family])) == 2
    capsys.readouterr()
    assert files.run("plan", "--forwarding", "ebpf", "--output", "json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["empty"]
    assert "the program is loaded" in document["forwarding"]
    assert document["tables"]["peer"]["unchanged"] == len(NUMBERS)

    assert files.run("clean", "--forwarding", "ebpf") == 0
    assert DEVICE[family] not in host.ip("link show")


def test_views_and_clean_know_the_mode_that_the_node_is_in(
    files: Files, host: Any, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the flag nor the configuration has to say it again."""
    document = json.loads(files.net_conf.read_text())
    del document["Backend"]["Forwarding"]
    files.net_conf.write_text(json.dumps(document))
    assert files.run("sync", "--forwarding", "ebpf") == 0
    host.ip(f"-{family} route add default via {'192.0.2.250' if family == 4 else '2001:db8::250'}")
    capsys.readouterr()

    assert files.run("show", "--output", "json") == 0
    (view,) = json.loads(capsys.readouterr().out)["families"]
    assert view["device"]["problem"] == ""
    assert [peer["state"] for peer in view["peers"]] == ["ok"] * len(NUMBERS)
    assert not any(peer["difference"] for peer in view["peers"])
    assert main(["explain", pod_address(family, 2), *files.flags, "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert files.run("sync", "--output", "json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tables"]["peer"]["unchanged"] == len(NUMBERS)
    assert "'--forwarding kernel' goes back" in printed.err
    assert files.run("plan", "--output", "json") == 0
    assert json.loads(capsys.readouterr().out)["empty"]
    request = Request.of({"net_conf": str(files.net_conf), "leases": str(files.leases)})
    agent = call_in_netns(host.ns, ServiceBuild(request).config)
    assert agent.backend.mode == "ebpf"
    assert files.run("sync", "--forwarding", "kernel") == 0
    assert not filters(host, DEVICE[family])
    assert "goes back" not in capsys.readouterr().err
    assert files.run("sync", "--forwarding", "ebpf") == 0
    assert files.run("clean") == 0
    assert DEVICE[family] not in host.ip("link show")
    assert not remains(DEVICE[family], host.ns)


def test_a_mode_that_is_named_is_the_one_that_is_shown(
    files: Files, host: Any, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the configuration or by the flag: the device that is there is wrong then."""
    assert files.run("sync", "--forwarding", "ebpf") == 0
    capsys.readouterr()

    for more in ((), ("--forwarding", "kernel")):
        assert files.run("show", *more) == 0
        assert "it is in collect-metadata mode" in capsys.readouterr().out


def test_without_a_compiler_the_reason_and_a_way_out_are_told(
    files: Files,
    host: Any,
    family: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(helper, "interpreters", lambda: [sys.executable])

    for command in ("plan", "sync"):
        assert files.run(command, "--forwarding", "ebpf") == 1
        said = capsys.readouterr().err
        assert "bcc" in said
        assert "python3-bpfcc" in said
        assert "--forwarding kernel" in said
    assert DEVICE[family] not in host.ip("link show")
    assert files.run("sync") == 0, "everything else works"


def test_without_the_right_to_load_the_reason_is_told(
    dp: DataPlane, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "effective", lambda: frozenset({"CAP_NET_ADMIN"}))

    with pytest.raises(Unsupported, match=r"CAP_BPF.*with_forwarding"):
        dp.sync([lease_of(host), *peers(NUMBERS)])


@pytest.mark.parametrize(
    ("backend", "word"),
    [({"Type": "host-gw"}, "no tunnel"), ({"GBP": True}, "GBP"), ({"Learning": True}, "Learning")],
)
def test_what_does_not_go_together_is_refused(
    files: Files,
    family: int,
    backend: dict[str, Any],
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document = json.loads(files.net_conf.read_text())
    document["Backend"] |= backend
    files.net_conf.write_text(json.dumps(document))

    assert files.run("plan", "--forwarding", "ebpf") == 2

    assert word in capsys.readouterr().err
