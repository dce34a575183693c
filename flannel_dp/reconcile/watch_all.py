"""Follow the kernel's events of many network namespaces on one thread."""

from __future__ import annotations

import select
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from flannel_dp.errors import SourceError, require
from flannel_dp.reconcile.watch import Watch

if TYPE_CHECKING:
    from flannel_dp.reconcile import drift as drifting
    from flannel_dp.reconcile import watchable
else:
    from flannel_dp.later import Later

    drifting = Later("flannel_dp.reconcile.drift")
    watchable = Later("flannel_dp.reconcile.watchable")

P = TypeVar("P", bound="watchable.Watchable")


def watch_all(
    planes: Iterable[P], *, timeout: float | None = None
) -> Iterator[tuple[P, drifting.Repair]]:
    """Undo, as it happens, changes of other programs to the entries of many data planes; yield the
    data plane and what was done.

    What ``DataPlane.watch`` does for one, on one thread for all of them: one event socket each,
    and nothing that polls. Comes to its end when no event came for ``timeout`` seconds (None:
    never). Every data plane has to be synced first. Raises SourceError where one is not, and as
    ``DataPlane.resync``.
    """
    known = [*planes]
    for plane in known:
        require(hasattr(plane, "known"), "planes", plane, "DataPlane objects")
    for plane in known:
        if not plane.known:
            raise SourceError("there is nothing to watch yet", hint="call sync() of each first")
    with ExitStack() as opened:
        poller, watches = select.epoll(), dict[int, tuple[P, Watch]]()
        opened.callback(poller.close)
        for plane in known:
            watch = opened.enter_context(Watch(plane))
            watch.remember()
            watch.mark_dirty()  # what happened since its sync was not seen
            watches[watch.fileno()] = plane, watch
            poller.register(watch.fileno(), select.EPOLLIN)
        ready = [*watches]
        while ready:
            for fd in ready:
                plane, watch = watches[fd]
                while watch.read():
                    repair = watch.repair()
                    if repair.counts:
                        yield plane, repair
            ready = [fd for fd, _ in poller.poll(timeout)]
