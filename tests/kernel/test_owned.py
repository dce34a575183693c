"""Two programs on one device, each the owner of the keys that it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flannel_dp import (
    ConfigError,
    Table,
    fdb_scope,
    fdb_table,
    neighbour_scope,
    neighbour_table,
    route_scope,
    route_table,
)
from tests.lib.core_overlay import Overlay
from tests.lib.leases import address, endpoint, mac, subnet


@pytest.fixture
def overlay(host: Any, family: int) -> Iterator[Overlay]:
    made = Overlay(host, family)
    with made.kernel:
        yield made


@pytest.mark.parametrize("kind", ["fdb", "neighbour", "route"])
def test_only_owned_keys_are_touched(overlay: Overlay, family: int, kind: str) -> None:
    index, kernel = overlay.index, overlay.kernel

    def table(*numbers: int, value: int = 0) -> Table:
        if kind == "fdb":
            return fdb_table(index, {mac(family, n): endpoint(family, n + value) for n in numbers})
        if kind == "neighbour":
            pairs = {address(family, n): mac(family, n + value) for n in numbers}
            return neighbour_table(index, pairs)
        routes = {subnet(family, n): address(family, n + value) for n in numbers}
        return route_table(routes, device=index)

    scope = {
        "fdb": fdb_scope(index),
        "neighbour": neighbour_scope(index, family),
        "route": route_scope(family, device=index, exclusive=True),
    }[kind]

    def held() -> set[Any]:
        found = {entry for entry in kernel.read(kind, scope) if _is_plain(entry)}
        return {entry[:3] if kind != "route" else (entry.prefix, entry.gateway) for entry in found}

    def values(*tables: Table) -> set[Any]:
        return {
            entry[:3] if kind != "route" else (entry.prefix, entry.gateway)
            for one in tables
            for entry in one
        }

    first, second = table(1, 2, 3), table(3, 4, value=10)
    assert kernel.sync(first, scope, owned=Table(kind)).counts()["added"] == 3
    result = kernel.sync(second, scope, owned=Table(kind))  # another program's view: 3 is not its

    assert (result.ok, result.counts()["added"], len(result.conflicts)) == (False, 1, 1)
    assert held() == values(first, table(4, value=10))

    changed = table(2, 5, value=20)  # 1 and 3 go, 2 changes, 5 is new; 4 is the other program's
    result = kernel.sync(changed, scope, owned=first)
    counts = result.counts()
    assert (counts["added"], counts["replaced"], counts["removed"]) == (1, 1, 2)
    assert held() == values(changed, table(4, value=10))
    assert kernel.sync(changed, scope, owned=changed).counts()["unchanged"] == 2


def _is_plain(entry: Any) -> bool:
    """What was written, and not what the kernel makes itself (fe80::/64, multicast)."""
    text = str(entry)
    return "fe80" not in text and "ff0" not in text and "33:33" not in text


def test_owned_is_a_table_of_the_same_kind(overlay: Overlay) -> None:
    scope = fdb_scope(overlay.index)
    wrong: list[Any] = [5, Table("route")]
    for owned in wrong:
        with pytest.raises(ConfigError, match="owned is"):
            overlay.kernel.sync(Table("fdb"), scope, owned=owned)
