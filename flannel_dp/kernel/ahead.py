"""Receive the kernel's tables before they are compared with anything.

On another thread, while this one works out what is wanted (:class:`ReadAhead`): a dump is
the kernel's work, and it is done without the GIL; reading leases needs the GIL and not the
kernel. Once the leases are read, both threads dump: the other one goes on with what it has not
begun, this one begins at the end. With two processors a sync that finds nothing to do takes no
longer than its dumps.

And the main routing table in whole (:class:`RouteReader`), because several ask for a part of it:
routes of other programs decide which leases are accepted, ours are compared, and with direct
routes all of it decides how each peer is reached. The kernel walks all routes for each part.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable

from msgspec import Struct, field

from flannel_dp._core import Channel, Pages, fetch_dump
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.netns import NetNS, open_netns
from flannel_dp.kernel.route_messages import StaticRoute, next_hops, parse_route
from flannel_dp.kernel.socket import NetlinkSocket
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.scopes import address_family
from flannel_dp.threads import Thread

log = logging.getLogger(__name__)


#: Bytes of an entry in a dump, of the longest kind.
_ENTRY = 80

#: Bytes of a route of a family in a dump. Of other programs' routes so many bytes are received,
#: some 8,000: a node with a full BGP table has a hundred times that.
_ROUTE, _OTHERS = {4: 80, 6: 144}, 1 << 20

#: Memory of so many bytes is kept for the next pass: to map it again takes longer than a dump of
#: few routes.
_KEPT = 1 << 18

_WRITTEN = (3, 4)  # RTPROT_BOOT, which is that of "ip route add", and RTPROT_STATIC


class ReadAhead:
    """Dumps that are being received. A context manager: at its end they are ended.

    ``ahead(scope)`` waits for one dump: the pages, or None for a scope that was
    not begun, and no longer will be. A failure here is not reported:
    a caller that gets no pages reads the table itself, and meets the same
    error in a place for it.
    """

    def __init__(self, channel: Callable[[], Channel]) -> None:
        self._channel = channel
        self._threads: list[threading.Thread] = []
        self._dumps: dict[Scope, _Dump] = {}
        self._lock = threading.Lock()
        self.waited = 0.0

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join()
        self._dumps.clear()  # as large as the tables, and of no more use

    def start(self, scopes: Iterable[Scope], entries: int) -> None:
        """Begin to read these scopes, of about so many entries, after those begun before."""
        channel = self._channel()
        before = self._threads[-1] if self._threads else None
        dumps = [_Dump(scope) for scope in scopes]
        self._dumps |= {dump.scope: dump for dump in dumps}
        thread = Thread(
            target=self._run,
            args=(channel, dumps, entries, before),
            name="flannel-dp-read",
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def __call__(self, scope: Scope) -> Pages | None:
        dump = self._dumps.pop(scope, None)
        if dump is None or self._begin(dump):
            return None
        started = time.perf_counter()
        dump.done.wait()
        self.waited += time.perf_counter() - started
        return dump.pages

    def _begin(self, dump: _Dump) -> bool:
        """Return whether this dump is the caller's to make."""
        with self._lock:
            first, dump.begun = not dump.begun, True
        return first

    def _run(
        self, channel: Channel, dumps: list[_Dump], entries: int, before: threading.Thread | None
    ) -> None:
        if before is not None:
            before.join()
        for dump in dumps:
            if not self._begin(dump):
                continue
            try:
                (dump.pages,) = channel.fetch([dump.scope], entries * _ENTRY)
            except FlannelDPError as error:
                log.debug("Cannot read ahead: %(error)s", {"error": error})
            finally:
                dump.done.set()


class _Dump(Struct):
    scope: Scope
    begun: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    pages: Pages | None = None


def open_channel(netns: NetNS) -> Channel:
    """Return a second socket, as one thread at a time may use a Channel."""
    with open_netns(netns) as fd:
        return Channel(fd)


class RouteReader(NetlinkSocket):
    """Answer questions about whole routing tables of one namespace.

    ``too_large`` are the tables, with their families, that are larger than is worth to be received
    in whole: of those the kernel is asked for each part.
    """

    def __init__(self, netns: NetNS = None) -> None:
        super().__init__(netns)
        self.too_large: set[tuple[int, int]] = set()
        #: Tables of an earlier pass, whose memory may be used again.
        self.spare: dict[tuple[int, int], Pages] = {}
        self._whole: dict[tuple[int, int], Pages] = {}
        #: How long the kernel took for whole tables.
        self.waited = 0.0

    def read_main_table(self, family: int, entries: int) -> None:
        """Receive the main table of family 4 or 6, for ``main_table`` and ``static_routes``. It
        may have about so many ``entries`` of ours.

        Equivalent: ``ip [-4|-6] route show table main``. A failure is not reported: a caller that
        finds no table asks for the part it needs, and meets the same error.
        """
        if (family, nl.RT_TABLE_MAIN) not in self._whole:
            self._receive_table(family, nl.RT_TABLE_MAIN, entries)

    def small_tables(self) -> dict[tuple[int, int], Pages]:
        """Return the tables that were received whose memory is worth to be kept."""
        return {key: pages for key, pages in self._whole.items() if pages.room <= _KEPT}

    def main_table(self, family: int) -> Pages | None:
        """Return the main table as ``read_main_table`` received it; None where it did not."""
        return self._whole.get((family, nl.RT_TABLE_MAIN))

    def static_routes(self, family: int, ours: Collection[int] = ()) -> list[StaticRoute]:
        """Return the unicast routes of the main table that a person, a network manager or a DHCP
        client configured; default routes are among them. Those out of ``ours`` (ifindexes) may
        be left out.

        Equivalent: ``ip [-4|-6] route show table main proto static`` (boot, dhcp). Where the
        table was not received in whole the kernel picks them out, so that only those are copied,
        however many other routes there are. Raises DumpInterrupted, KernelError.
        """
        what = f"dump IPv{family} static routes"
        # DHCPv6 has no routes.
        protocols = [one for one in nl.STATIC_PROTOCOLS if (family, one) != (6, nl.RTPROT_DHCP)]
        whole = self.main_table(family)
        found: list[StaticRoute] = []
        for reply in self._with_protocol(family, nl.RT_TABLE_MAIN, protocols, whole, ours, what):
            route = parse_route(reply, what)
            if route.kind != nl.RTN_UNICAST:
                continue
            hops = tuple((oif, via or "") for oif, via in next_hops(route.attrs, what))
            base = nl.address_text(route.attrs.get(nl.RTA_DST))
            metric = nl.u32(route.attrs.get(nl.RTA_PRIORITY))
            prefix = base or nl.ANY[family]
            found.append(StaticRoute(prefix, route.prefixlen, hops, metric, route.mtu))
        return found

    def written_to_table(self, family: int, table: int) -> list[tuple[int, bytes]]:
        """Return the routes of a table that people or programs wrote, undecoded: those of protocol
        boot or static. None before Linux 4.20, where it would take a dump of all tables.

        Equivalent: ``ip [-4|-6] route show table TABLE proto boot`` and ``static``.
        """
        if not self.filters_dumps:
            return []
        what, whole = f"dump IPv{family} routes of table {table}", self._whole.get((family, table))
        if whole is None:
            whole = self._receive_table(family, table, 0)
        return self._with_protocol(family, table, _WRITTEN, whole, (), what)

    def _receive_table(self, family: int, table: int, entries: int) -> Pages | None:
        if (family, table) in self.too_large:
            return None
        scope = Scope("route", address_family(family), protocol=0, table=table)
        expected = entries * _ROUTE[family]
        self._seq = self._seq % 0xFFFFFFFF + 1
        try:
            pages = fetch_dump(
                self._socket.fileno(),
                self._seq,
                scope,
                expected,
                2 * expected + _OTHERS,
                self.spare.pop((family, table), None),
            )
        except FlannelDPError as error:
            log.debug(
                "Cannot read table %(table)d ahead: %(error)s", {"table": table, "error": error}
            )
            self.abandon()
            return None
        self.waited += pages.seconds
        if not pages.nbytes:
            self.too_large.add((family, table))
            self.abandon()
        if not pages.nbytes or pages.interrupted:
            return None
        self._whole[family, table] = pages
        return pages

    def _with_protocol(
        self,
        family: int,
        table: int,
        protocols: Collection[int],
        whole: Pages | None,
        ours: Collection[int],
        what: str,
    ) -> list[tuple[int, bytes]]:
        """Return the routes of a table that carry one of ``protocols``, undecoded."""
        if whole is not None:
            return [(nl.RTM_NEWROUTE, one) for one in whole.written(bytes(protocols), ours)]
        attributes = nl.attr_u32(nl.RTA_TABLE, table)
        found: list[tuple[int, bytes]] = []
        for protocol in protocols:
            header = nl.RTMSG.pack(nl.af(family), 0, 0, 0, table, protocol, 0, 0, 0)
            found += self.dump(nl.RTM_GETROUTE, header + attributes, what)
        return [one for one in found if self._is_asked_for(one, table, protocols, what)]

    def _is_asked_for(
        self, reply: tuple[int, bytes], table: int, protocols: Collection[int], what: str
    ) -> bool:
        """Return whether a route is one that was asked for: a kernel before 4.20 sends all."""
        route = parse_route(reply, what)
        named = nl.u32(route.attrs.get(nl.RTA_TABLE))
        return route.protocol in protocols and named == table
