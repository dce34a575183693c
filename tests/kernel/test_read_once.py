"""A pass that finds all right asks the kernel nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from flannel_dp import DataPlane
from flannel_dp.kernel.socket import NetlinkSocket
from flannel_dp.kernel.tables import Kernel
from tests.lib.leases import lease_of, peers, plane

LEASES = range(1, 6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each request was made: a message by its kind and content, a table by its scopes."""
    found: Counter[Any] = Counter()
    ask, diff = NetlinkSocket._ask, Kernel.diff

    def counted_ask(self: NetlinkSocket, kind: int, flags: int, body: bytes, what: str) -> Any:
        found[what, body] += 1
        return ask(self, kind, flags, body, what)

    def counted_diff(self: Kernel, table: Any, *scopes: Any, **rest: Any) -> Any:
        found[table.kind, scopes] += 1
        return diff(self, table, *scopes, **rest)

    monkeypatch.setattr(NetlinkSocket, "_ask", counted_ask)
    monkeypatch.setattr(Kernel, "diff", counted_diff)
    return found


@pytest.mark.parametrize("families", [(4,), (6,), (4, 6)], ids=["ipv4", "ipv6", "dual"])
@pytest.mark.parametrize("what", ["sync", "resync", "plan"])
def test_nothing_is_asked_twice(
    host: Any, asked: Counter[Any], families: tuple[int, ...], what: str
) -> None:
    leases = [lease_of(host), *peers(LEASES)]
    passes: dict[str, Callable[[DataPlane], Any]] = {
        "sync": lambda dp: dp.sync(leases),
        "resync": lambda dp: dp.resync(),
        "plan": lambda dp: dp.plan(leases),
    }
    with plane(host, *families) as dp:
        assert dp.sync(leases).ok
        asked.clear()

        passes[what](dp)

    assert asked
    assert {request: count for request, count in asked.items() if count > 1} == {}
    questions = {request[0] for request in asked}
    # Of the main table all is taken from one dump. A process warns of full neighbour tables once.
    assert not {one for one in questions if "static routes" in one or "routes of table" in one}
    assert ("read the size of the neighbour table" in questions) == (what == "plan")
