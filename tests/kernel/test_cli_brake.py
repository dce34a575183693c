"""The command and lists that lack everything: exit code 4, and no peer is removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lib.command import SUBNET, Cluster, lease
from tests.lib.lease_documents import kubectl_nodes

HEADER = {"cluster_id": 1, "member_id": 1, "revision": 99, "raft_term": 2}
KEYS = ["L2EvYi9zdWJuZXRzLzEwLjI0MC4xLjAtMjQ=", "L2EvYi9zdWJuZXRzLzEwLjI0MC4yLjAtMjQ="]

EMPTY = {
    "--count-only": ({"header": HEADER, "count": 3}, "etcd counts 3 keys"),
    "--keys-only": ({"header": HEADER, "kvs": [{"key": k} for k in KEYS], "count": 2}, "values"),
    "a wrong prefix": ({"header": HEADER}, "3 of 3"),
    "no nodes": (kubectl_nodes(), "3 of 3"),
    "no header": ({"kvs": [], "count": 0}, "without a revision"),
    "an empty list": ({"leases": []}, "3 of 3"),
}


@pytest.mark.parametrize(("document", "message"), EMPTY.values(), ids=EMPTY)
def test_lists_that_lack_everything_remove_nothing(
    host: Any,
    family: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    document: dict[str, object],
    message: str,
) -> None:
    """The subnet of this node is known from subnet.env."""
    cluster = Cluster(host, family, tmp_path)
    flags = ("--subnet-file", str(tmp_path / "subnet.env"))
    assert cluster.run("sync", *flags) == 0
    before = cluster.state()
    assert len(cluster.subnets()) == 3
    capsys.readouterr()

    cluster.leases.write_text(json.dumps(document))

    assert cluster.run("sync", *flags) == 4
    assert message in capsys.readouterr().err
    assert cluster.state() == before


def other_cluster(family: int, number: int) -> dict[str, Any]:
    """A node of another cluster, which has the same network."""
    key, address = {
        4: ("PublicIP", f"203.0.113.{number}"),
        6: ("PublicIPv6", f"2001:db8:9::{number}"),
    }[family]
    return lease(family, number, Name=f"other{number}", **{key: address})


@pytest.mark.parametrize("which", ["another cluster's", "a part", "one peer less"])
def test_a_list_without_this_nodes_lease_changes_no_peer(
    host: Any,
    family: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    which: str,
) -> None:
    """It is believed where it agrees with what is there, and where this node is new."""
    cluster = Cluster(host, family, tmp_path)
    env = tmp_path / "subnet.env"
    flags = ("--subnet-file", str(env))
    assert cluster.run("sync", *flags) == 0
    before = cluster.state()
    lists = {
        "another cluster's": [other_cluster(family, number) for number in (2, 3, 4)],
        "a part": [lease(family, 3)],
        "one peer less": [lease(family, 2), lease(family, 3)],
    }
    cluster.write(lists[which])

    for command in ("sync", "plan"):
        capsys.readouterr()
        assert cluster.run(command, *flags) == 4
        error = capsys.readouterr().err
        assert "lacks the lease of this node" in error
        assert "--allow-shrink" in error
    assert cluster.state() == before

    assert cluster.run("sync", "--allow-shrink", *flags) == 0
    assert len(cluster.subnets()) == len(lists[which])


def test_a_list_without_this_nodes_lease_may_add_peers(
    host: Any, family: int, tmp_path: Path
) -> None:
    cluster = Cluster(host, family, tmp_path)
    flags = ("--subnet-file", str(tmp_path / "subnet.env"))
    assert cluster.run("sync", *flags) == 0
    cluster.write(lease(family, number) for number in range(2, 7))
    assert cluster.run("sync", *flags) == 0
    assert len(cluster.subnets()) == 5
    given = ("--subnet", SUBNET[family].format(1))
    cluster.write(lease(family, number) for number in (2, 3, 4))
    assert cluster.run("sync", *given) == 0  # the user says who this node is
    assert len(cluster.subnets()) == 3
    assert cluster.run("clean") == 0
    cluster.write([other_cluster(family, 2)])
    assert cluster.run("sync", *flags) == 0  # a node without peers is new
