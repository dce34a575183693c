"""The command and lists that lack everything: exit code 4, and no peer is removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lib.command import Cluster
from tests.lib.lease_documents import nodes

HEADER = {"cluster_id": 1, "member_id": 1, "revision": 99, "raft_term": 2}
KEYS = ["L2EvYi9zdWJuZXRzLzEwLjI0MC4xLjAtMjQ=", "L2EvYi9zdWJuZXRzLzEwLjI0MC4yLjAtMjQ="]

EMPTY = {
    "--count-only": ({"header": HEADER, "count": 3}, "etcd counts 3 keys"),
    "--keys-only": ({"header": HEADER, "kvs": [{"key": k} for k in KEYS], "count": 2}, "values"),
    "a wrong prefix": ({"header": HEADER}, "3 of 3"),
    "no nodes": (nodes(), "3 of 3"),
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
