"""Read the kernel's tables on another thread, while this one works out what is wanted.

A dump is the kernel's work, and it is done without the GIL; reading leases needs
the GIL and not the kernel. Once the leases are read, both threads dump: the other one
goes on with what it has not begun, this one begins at the end. With two processors a
sync that finds nothing to do takes no longer than its dumps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from msgspec import Struct, field

from flannel_dp._core import Channel, Pages
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.netns import NetNS, open_netns
from flannel_dp.tables.entries import Scope

log = logging.getLogger(__name__)


#: Bytes of an entry in a dump, of the longest kind.
_ENTRY = 80


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
        thread = threading.Thread(
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
                log.debug("read ahead: %s", error)
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
