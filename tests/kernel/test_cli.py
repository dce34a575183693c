"""The command on a real kernel: exit codes, both outputs, and nothing touched by mistakes."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from flannel_dp.kernel.lock import DeviceLock
from tests.lib.command import SUBNET, Cluster, lease, net_conf

DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}
TABLES = {"route", "nexthop", "fdb", "neighbour", "peer"}
WORDS = {"added", "replaced", "removed", "unchanged", "failed"}


@pytest.fixture
def cluster(host: Any, family: int, tmp_path: Path) -> Cluster:
    """A node, its network configuration, and leases of four nodes of which it is the first."""
    return Cluster(host, family, tmp_path)


def test_sync_reports_in_json(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    extra = lease(cluster.family, 9, **{"BackendType": "host-gw"})
    cluster.write([*(lease(cluster.family, n) for n in range(1, 5)), extra])

    code = cluster.run("sync", "--output", "json")

    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["schema"] == 1
    assert report["ok"] is True
    assert set(report["tables"]) == TABLES
    assert all(set(row) == WORDS for row in report["tables"].values())
    assert report["tables"]["route"]["added"] == 3
    assert [(one["lease"], one["reason"]) for one in report["rejected"]] == [
        ("node9", "wrong-backend")
    ]
    assert report["conflicts"] == report["failures"] == []
    assert set(report["seconds"]) == {"source", "desired", "snapshot", "diff", "apply", "total"}
    assert report["seconds"]["source"] > 0
    assert report["seconds"]["total"] > report["seconds"]["source"]
    assert len(cluster.subnets()) == 3


def test_second_sync_changes_nothing(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.run("sync") == 0
    before = cluster.state()
    capsys.readouterr()

    assert cluster.run("sync") == 0

    assert "in sync: nothing to change" in capsys.readouterr().out
    assert cluster.state() == before


def test_sync_text_is_an_aligned_table(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("sync") == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["added", "replaced", "removed", "unchanged", "failed"]
    assert {len(line) for line in lines[:5]} == {len(lines[0])}
    assert [line.split()[0] for line in lines[1:5]] == ["route", "nexthop", "neighbour", "fdb"]
    assert any(line.startswith(f"device {cluster.device}: create vxlan") for line in lines)
    assert "\x1b" not in "".join(lines)
    assert lines[-1].startswith("in sync: ")


def test_plan_shows_what_sync_does_and_writes_nothing(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    before = cluster.state()

    assert cluster.run("plan") == 0
    assert cluster.run("plan", "--exit-code") == 10

    assert cluster.state() == before
    out = capsys.readouterr().out
    route = SUBNET[cluster.family].format(2)
    assert f"+ route {route} " in out
    assert f"+ device {cluster.device}: create" in out
    assert cluster.run("sync") == 0
    assert cluster.run("plan", "--exit-code") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to do"


def test_plan_in_json(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.run("plan", "--output=json") == 0

    plan = json.loads(capsys.readouterr().out)
    assert (plan["schema"], plan["empty"]) == (1, False)
    assert sum(one["table"] == "route" for one in plan["operations"]) == 3


def etcd_document(family: int) -> str:
    kvs = []
    for number in range(1, 5):
        values = lease(family, number)
        subnet = values.pop("Subnet", "") or values.pop("IPv6Subnet")
        del values["Name"]
        key = f"/coreos.com/network/subnets/{subnet.replace('/', '-')}"
        kvs.append(
            {
                "key": base64.b64encode(key.encode()).decode(),
                "value": base64.b64encode(json.dumps(values).encode()).decode(),
                "create_revision": number,
            }
        )
    return json.dumps({"kvs": kvs, "count": len(kvs)})


def nodes_document(family: int) -> str:
    items = []
    for number in range(1, 5):
        values = lease(family, number)
        version = "" if family == 4 else "v6"
        data = values["BackendData" if family == 4 else "BackendV6Data"]
        prefix = "flannel.alpha.coreos.com/"
        backend = f"{prefix}backend-{'v6-' if family == 6 else ''}data"
        public = f"{prefix}public-ip{version}"
        items.append(
            {
                "metadata": {
                    "name": f"node{number}",
                    "annotations": {
                        f"{prefix}backend-type": "vxlan",
                        backend: json.dumps(data),
                        public: values[f"PublicIP{version}"],
                        f"{prefix}kube-subnet-manager": "true",
                    },
                },
                "spec": {"podCIDR": SUBNET[family].format(number)},
            }
        )
    return json.dumps({"kind": "List", "items": items})


@pytest.mark.parametrize("document", [etcd_document, nodes_document], ids=["etcd", "kubectl"])
def test_every_form_of_leases_gives_the_same(
    cluster: Cluster, document: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster.run("sync") == 0
    cluster.leases.write_text(document(cluster.family))

    assert cluster.run("plan", "--exit-code") == 0

    assert "nothing to do" in capsys.readouterr().out


def test_leases_from_standard_input(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cluster.leases.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    assert cluster.run("sync", "--leases", "-") == 0

    assert len(cluster.subnets()) == 3


def test_flanneld_spelling_and_environment(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = cluster.host.underlay(cluster.family)
    monkeypatch.setenv("FLANNELD_NET_CONFIG_PATH", str(cluster.net_conf))
    monkeypatch.setenv("FLANNELD_IFACE", "eth0")
    monkeypatch.setenv(
        "FLANNELD_PUBLIC_IP" if cluster.family == 4 else "FLANNELD_PUBLIC_IPV6", address
    )

    code = main(["sync", "-netns", cluster.host.ns, f"-leases={cluster.leases}"])

    assert code == 0
    assert len(cluster.subnets()) == 3


def test_clean_leaves_only_what_was_there_before(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    before = cluster.state()
    assert cluster.run("sync") == 0
    capsys.readouterr()

    assert cluster.run("clean", "--output", "json") == 0

    report = json.loads(capsys.readouterr().out)
    assert report["tables"]["route"]["removed"] == 3
    assert cluster.state() == before
    assert cluster.run("clean") == 0
    assert "clean: nothing to change" in capsys.readouterr().out


def test_conflict_is_listed_and_exits_3(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = SUBNET[cluster.family].format(2)
    metric = "" if cluster.family == 4 else "metric 1024"
    cluster.host.ip(f"-{cluster.family} route add {taken} dev eth0 proto static {metric}")

    code = cluster.run("sync")

    out = capsys.readouterr().out
    assert code == 3
    assert "conflicts (1):" in out
    assert f"route {taken}" in out
    assert "proto static" in out
    assert "not in sync: 1 conflict; " in out
    assert len(cluster.subnets()) == 2
    shown = cluster.host.ip(f"-{cluster.family} route show {taken}")
    assert "proto static" in shown
    assert "dev eth0" in shown


def test_busy_names_the_holder(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    before = cluster.state()

    with DeviceLock(cluster.device, cluster.host.ns):
        codes = [cluster.run("sync"), cluster.run("clean"), cluster.run("plan")]

    assert codes == [5, 5, 0]
    assert f"device {cluster.device} is held by process" in capsys.readouterr().err
    assert cluster.state() == before


def unprivileged(cluster: Cluster, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the cluster without CAP_NET_ADMIN."""
    flags = cluster.arguments(command, "--output", "json", *more)
    at = flags.index("--netns")
    del flags[at : at + 2]
    without = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    program = [sys.executable, "-m", "flannel_dp"]
    return subprocess.run(
        ["ip", "netns", "exec", cluster.host.ns, *without, *program, *flags],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("synced", [False, True], ids=["to write", "in sync"])
def test_a_plan_tells_that_writing_is_not_permitted(
    cluster: Cluster, synced: bool, tmp_path: Path
) -> None:
    """Where there is anything to write: a sync without it succeeds."""
    subnet_file = ("--subnet-file", str(tmp_path / "subnet.env"))
    if synced:
        assert cluster.run("sync", *subnet_file) == 0

    done = unprivileged(cluster, "plan", *subnet_file)

    document = json.loads(done.stdout)
    assert done.returncode == 0
    assert document["ok"] is synced
    failing = [one for one in document["failures"] if one["table"] == "permission"]
    assert len(failing) == (not synced)
    assert all("CAP_NET_ADMIN" in one["detail"] for one in failing)


@pytest.mark.parametrize("command", ["sync", "clean"])
def test_without_the_capability_nothing_happens(cluster: Cluster, command: str) -> None:
    if command == "clean":
        assert cluster.run("sync") == 0
    before = cluster.state()

    done = unprivileged(cluster, command)

    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_code"], error["type"]) == (77, 77, "NotPermitted")
    assert "CAP_NET_ADMIN" in error["hint"]
    assert "hint: " in done.stderr
    assert "CAP_NET_ADMIN" in done.stderr
    assert cluster.state() == before


def test_shrinking_is_refused_unless_allowed(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write(lease(cluster.family, number) for number in range(1, 30))
    assert cluster.run("sync") == 0
    before = cluster.subnets()
    cluster.write(lease(cluster.family, number) for number in (1, 2, 3, 60))
    assert cluster.run("plan") == 0
    assert "26 of 28" in capsys.readouterr().out

    assert cluster.run("sync") == 4
    assert len(cluster.subnets()) == len(before) + 1
    said = capsys.readouterr()
    assert "26 of 28" in said.err
    assert "--allow-shrink" in said.err
    assert "in sync but for removals: " in said.out
    assert cluster.run("sync", "--output", "json") == 4
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["error"]["exit_code"]) == (False, 4)
    assert len(told["report"]["held"][f"IPv{cluster.family}"]) == 26
    cluster.write(lease(cluster.family, number) for number in range(1, 4))
    assert cluster.run("sync", "--allow-shrink") == 0
    assert len(cluster.subnets()) == 2


def test_a_foreign_device_is_replaced_only_on_demand(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    host = cluster.host
    host.ip(f"link add {cluster.device} type vxlan id 77 dev eth0 dstport 4789")
    before = cluster.state()

    assert cluster.run("sync") == 1
    err = capsys.readouterr().err
    assert cluster.device in err
    assert "--take-over" in err
    assert cluster.state() == before
    assert cluster.run("sync", "--take-over") == 0
    assert len(cluster.subnets()) == 3


def test_plain_gateway_routes_on_demand(cluster: Cluster) -> None:
    assert cluster.run("sync", "--no-nexthops") == 0

    assert cluster.host.ip("nexthop show") == ""
    assert len(cluster.subnets()) == 3


def test_first_sync_does_not_load_pyroute2(cluster: Cluster) -> None:
    script = (
        "import sys\nfrom flannel_dp.command.cli import main\n"
        f"assert main({cluster.arguments('sync')!r}) == 0\n"
        "sys.exit(' '.join(sorted({'pyroute2', 'asyncio'} & set(sys.modules))) or None)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    assert "1 device" in done.stdout


def test_unchanged_sync_imports_nothing_heavy(cluster: Cluster) -> None:
    # Other tests may leave notes, and pin something, meanwhile.
    own = ("--run-dir", str(cluster.folder / "run"))
    assert cluster.run("sync", *own) == 0
    script = (
        "import sys\nfrom flannel_dp.command.cli import main\n"
        "from flannel_dp.kernel import lock\n"
        "lock.has_pins = lambda run_dir: False\n"
        f"assert main({cluster.arguments('sync', *own)!r}) == 0\n"
        "heavy = {'pyroute2', 'rich', 'asyncio', 'hashlib', 'email', 'pathlib', 'tempfile'}\n"
        "heavy |= {'flannel_dp.resources.counters', 'flannel_dp.resources.peers.update'}\n"
        "heavy |= {'flannel_dp.look.held', 'flannel_dp.resources.forwarding.ebpf'}\n"
        "heavy |= {'flannel_dp.cluster.rejections', 'flannel_dp.cluster.listings'}\n"
        "heavy |= {'flannel_dp.command.running', 'flannel_dp.command.failing'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_a_family_that_cannot_be_leaves_the_other(
    host: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(host, 4, tmp_path)
    cluster.net_conf.write_text(json.dumps(net_conf(6) | net_conf(4) | {"EnableIPv4": True}))

    code = cluster.run("sync")

    out = capsys.readouterr().out
    assert code == 3
    assert "IPv6: no lease was published with 2001:db8::" in out
    assert "not in sync: 1 failure; " in out
    assert len(cluster.subnets()) == 3


# ---- bad input: a typed error, the documented code, and a kernel as it was ---------

HALF = '{"leases": [{"Subnet": "10.244.1.0/24", "Publ'
BAD = {
    "leases-missing": (4, {"leases": None}, [], ["leases.json", "no such file"]),
    "leases-empty": (4, {"leases": ""}, [], ["leases.json", "is empty"]),
    "leases-half": (4, {"leases": HALF}, [], ["leases.json", "line 1, column"]),
    "leases-malformed": (4, {"leases": '{"leases":\n [}'}, [], ["leases.json", "line 2"]),
    "leases-wrong-type": (4, {"leases": '{"leases": 7}'}, [], ["leases.json", "leases"]),
    "leases-other-document": (4, {"leases": '{"a": 1}'}, [], ["leases.json", "not a list of"]),
    "no-lease-for-us": (4, {"leases": '{"leases": []}'}, [], ["no lease was published with"]),
    "conf-missing": (2, {"net_conf": None}, [], ["net-conf.json", "No such file", "--net-conf"]),
    "conf-empty": (2, {"net_conf": ""}, [], ["net-conf.json", "is empty"]),
    "conf-half": (2, {"net_conf": '{"Network": "10.2'}, [], ["net-conf.json", "line 1"]),
    "conf-wrong-type": (
        2,
        {"net_conf": '{"Network": 7, "Backend": {"Type": "vxlan"}}'},
        [],
        ["net-conf.json", "Network", "expected a string"],
    ),
    "conf-backend": (
        2,
        {"net_conf": '{"Network": "10.244.0.0/16", "Backend": {"Type": "carrier"}}'},
        [],
        ["net-conf.json", "Backend.Type", '"carrier"', '{"Type": "vxlan"}'],
    ),
    "iface-missing": (2, {}, ["--iface", "eth7"], ["'eth7'", "--iface", "eth0"]),
    "iface-impossible": (2, {}, ["--iface", "x" * 40], ["x" * 40]),
    "public-ip-not-ours": (2, {}, ["--public-{}", "{}"], ["not an address of this node"]),
    "public-ip-garbage": (2, {}, ["--public-ip", "banana"], ["--public-ip", "'banana'"]),
    "subnet-garbage": (2, {}, ["--subnet", "banana"], ["--subnet", "banana"]),
    "netns-missing": (2, {}, ["--netns", "no-such-ns"], ["no-such-ns", "does not exist"]),
    "prefix-garbage": (2, {}, ["--kube-annotation-prefix", "A/B/C"], ["'A/B/C'"]),
}


@pytest.mark.parametrize("command", ["sync", "plan"])
def test_bad_input(
    cluster: Cluster, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each on one node, which is at the end as it was."""
    if command == "sync":
        cluster.host.ip("link add flannel.9 type vxlan id 9 dev eth0 dstport 8473")
    before = cluster.state()
    stranger = {4: ("ip", "192.0.2.99"), 6: ("ipv6", "2001:db8::99")}[cluster.family]

    for name, (code, files, given, words) in BAD.items():
        (folder := tmp_path / name).mkdir()
        with_bad = Cluster(cluster.host, cluster.family, folder)
        for attribute, text in files.items():
            path: Path = getattr(with_bad, attribute)
            path.unlink() if text is None else path.write_text(text)
        other = name == "public-ip-not-ours"
        flags = [f"--public-{stranger[0]}", stranger[1]] if other else given

        found = with_bad.run(command, *flags, "--output", "json")

        out, err = capsys.readouterr()
        error = json.loads(out)["error"]
        assert (name, found, error["exit_code"]) == (name, code, code)
        assert err == f"flannel-dp: error: {error['message']}\nhint: {error['hint']}\n", name
        missing = [word for word in words if word not in f"{error['message']} {error['hint']}"]
        assert (name, missing) == (name, [])
    assert cluster.state() == before


def test_a_subnet_file_that_is_a_fifo_is_rejected_at_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody writes into it, and nothing waits for that, under the lock least of all."""
    path = cluster.folder / "subnet.env"
    os.mkfifo(path)
    before = cluster.state()

    assert cluster.run("sync", "--subnet-file", str(path)) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"flannel-dp: error: {path}: not a regular file",
        "hint: name another file with --subnet-file",
    ]
    assert cluster.state() == before


def test_clean_for_flanneld_rewrites_entries_in_place(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the leases at hand, and none of its own: nothing that forwards is removed."""
    assert cluster.run("sync") == 0
    ours = cluster.subnets()
    leases = ["--leases", str(cluster.leases)]
    capsys.readouterr()

    assert cluster.run("clean", "--for-flanneld", *leases) == 0

    assert "ready for flanneld" in capsys.readouterr().out
    family, device = cluster.family, cluster.device
    routes = cluster.host.ip_json(f"-{family} route show dev {device} proto boot")
    assert {one["dst"] for one in routes} == ours
    assert all("gateway" in one for one in routes)
    assert cluster.host.ip("nexthop show") == ""
    assert cluster.run("clean", "--for-flanneld", "--only-rules") == 2
    assert cluster.run("clean", "--for-flanneld") == 2
    assert "where are the leases?" in capsys.readouterr().err
    with DeviceLock(device, cluster.host.ns):
        assert cluster.run("clean", "--for-flanneld", *leases) == 5
        assert cluster.run("clean", "--only-rules") == 0, "flanneld may run by now"
    assert cluster.run("sync") == 0
    assert cluster.subnets() == ours


def test_a_node_is_handed_back_in_spite_of_single_peers(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """One conflicts with a route of another program, two are missing from the leases: an init
    container would try for ever. All that is there of ours has flanneld's form either way."""
    family = cluster.family
    assert cluster.run("sync") == 0
    stranger, *kept = sorted(cluster.subnets())
    words = ["clean", "--for-flanneld", "--leases", str(cluster.leases)]
    cluster.host.ip(f"-{family} route del {stranger}")
    cluster.host.ip(f"-{family} route add {stranger} dev eth0 proto static")
    capsys.readouterr()

    def routes() -> dict[str, str]:
        found = cluster.host.ip_json(f"-{family} route show")
        return {one["dst"]: one["protocol"] for one in found if one["dst"] in {stranger, *kept}}

    assert cluster.run(*words) == 3
    said = capsys.readouterr()
    assert "not ready for flanneld: 1 conflict" in said.out
    assert "with --allow-incomplete this is no error" in said.err
    assert cluster.run(*words, "--allow-incomplete") == 0
    said = capsys.readouterr()
    assert "ready for flanneld but for 1 conflict" in said.out
    assert "conflicts with an existing route (not ours)" in said.out

    cluster.write([lease(family, 1), lease(family, 2)])
    assert cluster.run(*words) == 4
    assert "--allow-incomplete keeps these peers" in capsys.readouterr().err
    assert cluster.run(*words, "--allow-incomplete", "--output", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(names) for names in report["held"].values()] == [2]
    assert any("missing from this list" in text for text in report["warnings"])
    assert routes() == {stranger: "static", **dict.fromkeys(kept, "boot")}
    assert cluster.run("clean", "--allow-incomplete") == 2
    assert "no effect without --for-flanneld" in capsys.readouterr().err
