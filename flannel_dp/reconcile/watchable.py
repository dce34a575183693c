"""What following the kernel's events takes of a data plane, and what of a device matters to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flannel_dp._core import Claims
from flannel_dp.kernel.tables import Progress
from flannel_dp.reconcile.reconciler import Reconciler
from flannel_dp.tables.entries import EventFilter

if TYPE_CHECKING:
    from flannel_dp.kernel.links import Address, Link
    from flannel_dp.reconcile.report import Report
    from flannel_dp.reconcile.resource import ScopedTable
    from flannel_dp.tables.entries import Scope


class Written(Protocol):
    """What was written of one family, as far as its events are concerned."""

    @property
    def index(self) -> int: ...
    @property
    def uplink(self) -> int: ...
    @property
    def network(self) -> str: ...
    @property
    def subnet(self) -> str: ...
    @property
    def devices(self) -> frozenset[int]: ...
    @property
    def peers(self) -> Claims: ...


class Watchable(Protocol):
    """What is kept in agreement with the kernel, as far as following its events takes it: the
    resources, what was written of each family, and a pass over some of them."""

    @property
    def exclusive(self) -> AbstractContextManager[Any]: ...
    @property
    def families(self) -> tuple[int, ...]: ...
    @property
    def known(self) -> Mapping[int, Written]: ...
    @property
    def state(self) -> Mapping[int, Written]: ...
    @property
    def reconciler(self) -> Reconciler: ...
    @property
    def watches_filters(self) -> bool: ...
    @property
    def on_written(self) -> list[Callable[[], None]]: ...
    def written(self) -> None: ...
    def resync(
        self, families: Iterable[int] | None, *, host: bool, progress: Progress | None
    ) -> Report: ...


def filter_of(kept: Watchable, port: int) -> EventFilter:
    """Return which events the kernel has to send: those that a keeper of tables names itself, or
    those about the families of a data plane. ``port`` is that of the socket that writes."""
    named = getattr(kept, "event_filter", None)
    if isinstance(named, EventFilter):
        return named
    families = kept.known.values()
    tunnels = {f.index for f in families if f.index}
    return EventFilter(
        tunnels=tuple(sorted(tunnels)),
        uplinks=tuple(sorted({f.uplink for f in families} - tunnels)),
        ports=(port,),
        networks=tuple(f.network for f in families),
        every_link={*kept.families} != {*kept.state},
        programs=kept.watches_filters,
    )


def scopes_of_events(one: ScopedTable) -> tuple[Scope, ...]:
    """Return the scopes in which a table's events are compared: those that it names, or those on a
    device or of one type; of a data plane the others are where entries of other layouts may be."""
    named = getattr(one, "told", None)
    return named or tuple(scope for scope in one.scopes if scope.device or scope.type)


class DeviceState(NamedTuple):
    """What of a device matters here; a change of it is drift, or changes what is wanted."""

    link: Link
    addresses: frozenset[tuple[str, int]]


def address_of(address: Address) -> tuple[str, int]:
    return address.address, address.prefixlen


def compared(link: Link, ours: bool) -> tuple[object, ...]:
    """Return what counts of a device: of our own all but its carrier, of an external interface
    what the tunnel depends on."""
    if ours:
        return (link.name, link.kind, link.mtu, link.mac, link.up, link.lower, link.vxlan)
    return (link.name, link.mtu, link.up)
