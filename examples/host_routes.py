"""Keep static routes of your own beside the overlay: a resource in one module.

::

    from flannel_dp import DataPlane, FileSource, NetworkConfig
    from host_routes import HostRoutes

    routes = [HostRoutes(4, {"198.51.100.0/24": "192.0.2.254"})]
    with DataPlane(NetworkConfig.from_file("net-conf.json"), resources=routes) as dataplane:
        dataplane.sync(FileSource("leases.json").snapshot().claims)

makes the overlay agree with the leases, and ``ip route show proto 139`` with the routes given,
all of them through this node's external interface. ``dataplane.plan`` shows them, an ``Agent``
keeps them, ``dataplane.clean`` removes them. docs/extending.md explains each method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from flannel_dp import (
    Done,
    Family,
    Host,
    Plan,
    Report,
    Resource,
    Result,
    Table,
    TablePlan,
    View,
    route_scope,
    route_table,
)

#: The mark of these routes in the kernel; flannel-dp's own have 138.
PROTOCOL = 139


class RoutesChange(Struct, frozen=True):
    """The difference between the routes wanted and the kernel's. A Plan can print itself."""

    plan: Plan
    names: dict[int, str]
    facts: Mapping[str, Any] = {}  # nothing that a resource after this one has to know

    @property
    def is_empty(self) -> bool:
        return self.plan.is_empty

    def lines(self) -> Iterator[str]:
        return self.plan.lines()


class HostRoutes(Resource[Family, RoutesChange]):
    """Routes of family 4 or 6 as ``{prefix: gateway}``, and no others with our mark.

    ``ip route replace PREFIX via GATEWAY dev UPLINK proto 139``.
    """

    def __init__(self, number: int, routes: Mapping[str, str]) -> None:
        self.name, self.families = f"host routes {number}", (number,)
        self._number, self._routes = number, routes

    def desired(self, view: View) -> Family | None:
        return view.family(self._number)

    def compare(self, host: Host, desired: Family | None, done: Done) -> RoutesChange:
        names, table = {}, Table("route")
        if desired:
            device, names = desired.uplink, {desired.uplink: desired.iface}
            table = route_table(self._routes, device=device, onlink=False, protocol=PROTOCOL)
        scope = route_scope(self._number, protocol=PROTOCOL)
        diff = host.kernel.diff(table, scope)
        return RoutesChange(Plan((TablePlan(diff, (scope,), names),)), names)

    def apply(self, host: Host, change: RoutesChange) -> Result:
        (result,) = host.kernel.apply(change.plan)
        part = Report(
            tables={"route": result.counts()}, failures=[*result.failures()], names=change.names
        )
        return Result(part=part)
