"""Leases from the nodes of a Kubernetes cluster, listed once and then watched.

Every node is a lease: its pod CIDRs are the subnets, its annotations the rest
(flannel's pkg/subnet/kube). Needs lightkube, the extra ``[kube]``.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from flannel_dp.backoff import Backoff
from flannel_dp.errors import AuthFailed, Compacted, ConfigError, SourceError, Unavailable, require
from flannel_dp.sources.base import Call, Change, Inbox, Snapshot
from flannel_dp.sources.history import History
from flannel_dp.sources.kube.api import Forbidden, KubeApi, RequestRejected, WatchBody
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.events import METADATA_ONLY, Changes, flooding, lines_of
from flannel_dp.sources.kube.nodes import (
    PATH,
    KubeNode,
    NodeListing,
    NodeReader,
    ResourceVersion,
    get_node,
    list_nodes,
    newest_version,
    went_back,
)
from flannel_dp.sources.limits import IDLE_EVENTS, IDLE_EVENTS_A_SECOND, Allowance

log = logging.getLogger(__name__)

News = Snapshot | Change

#: A watch that ends sooner than this, without an event, counts as a failure.
_SHORT_SECONDS = 1.0

#: A watch that stood so long was a good one, also where nothing happened in it.
_GOOD_SECONDS = 30.0

#: Statuses of a server that has too much to do, and is otherwise as it was.
_BUSY = (429, 503)
_NOT_ACCEPTABLE = 406


class KubeSource:
    """The flannel nodes of a cluster, as its API server has them.

    ``on_news`` gets each delivery of ``follow``, on another thread. The file ``note`` keeps for
    the next process how far the server was.

    Raises ConfigError for a kubeconfig, service account or certificate that cannot be
    used, and when lightkube is not installed. Nothing is asked of the server yet.
    """

    def __init__(
        self,
        options: KubeOptions,
        on_news: Callable[[News], None] = lambda news: None,
        note: str = "",
    ) -> None:
        require(isinstance(options, KubeOptions), "options", options, "KubeOptions")
        self._options = options
        self._on_news = on_news
        self._api = open_api(options)
        self._reader = NodeReader(options.annotation_prefix)
        self._history = History(ResourceVersion, note)

    @property
    def origin(self) -> str:
        """The name of this source in messages."""
        return self._api.origin

    def close(self) -> None:
        """Close what ``snapshot`` left open."""
        self._api.close()

    def snapshot(self) -> Snapshot:
        """List all nodes, like ``kubectl get nodes -o json``.

        Raises Unavailable when the server cannot be reached or does not answer with
        nodes, AuthFailed when it does not let us in or RBAC does not allow it.
        """
        started = time.perf_counter()
        listing = list_nodes(self._api, self._reader, self._options)
        return Snapshot(listing.claims, self.origin, time.perf_counter() - started, consistent=True)

    def follow(self, inbox: Inbox) -> None:
        """Deliver a snapshot, then all that changes, until ``inbox`` says to stop.

        What waits for the network is a thread of its own: neither a connection that is
        being opened nor a name that is being resolved can be cancelled, but no
        caller has to wait for them. Each ``Call.REFRESH`` starts another such thread.
        """
        known: dict[str, bytes] = {}
        while True:
            session = _NodeFollower(
                self._options, self._reader, inbox, self._on_news, self._history, known
            )
            try:
                session.start()
                call = inbox.wait(fds=[session.ended])
            finally:
                session.cancel()
                self._history.write()
            known = dict(session.known)
            if call is Call.STOP:
                return
            if session.error is not None:
                raise session.error


def open_api(options: KubeOptions) -> KubeApi:
    """Return a connection to the API server; a missing lightkube is a ConfigError."""
    try:
        return KubeApi(options)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Kubernetes: the Python module {error.name} is not installed",
            hint="pip install 'flannel-dp[kube]'",
        ) from error


class _Cancelled(Exception):
    """The session's news are not wanted any more."""


class _WholeOnly(Exception):
    """The watch has to be one of whole objects."""


def _listed(digests: dict[str, bytes]) -> NodeListing:
    listing = NodeListing()
    listing.digests = digests
    return listing


class _NodeFollower(threading.Thread):
    """One list, and the watches after it, until it is cancelled.

    ``ended`` can be read once the thread has come to an end by itself, which takes a
    bug: ``error`` is then what it ended with.
    """

    def __init__(
        self,
        options: KubeOptions,
        reader: NodeReader,
        inbox: Inbox,
        on_news: Callable[[News], None],
        history: History[ResourceVersion],
        known: dict[str, bytes],
    ) -> None:
        super().__init__(name="kube-watch", daemon=True)
        self.ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.error: BaseException | None = None
        self._options = options
        self._reader = reader
        self._inbox = inbox
        self._on_news = on_news
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._stream: WatchBody | None = None
        self._api: KubeApi | None = None
        self._changes = Changes(_listed(known), reader, self._fetch)
        self._version = ""
        #: For single nodes, beside the watch; and whether the server gives whole objects only.
        self._beside: KubeApi | None = None
        self._whole = False
        self._history = history
        self._delivered = False
        self._backoff = Backoff(first=0.2, most=options.retry_seconds)
        self._last_pause = 0.0
        self._told = ""

    @property
    def known(self) -> dict[str, bytes]:
        """A digest of each node's lease, by name."""
        return self._changes.known

    def cancel(self, timeout: float = 0.3) -> None:
        """Deliver nothing from now on; ends the thread if it is not in a system call that
        cannot be ended, from which it returns unnoticed."""
        with self._lock:
            self._cancelled.set()
            stream = self._stream
        if stream is not None:
            stream.interrupt()
        if self.ident is not None:  # it was started
            self.join(timeout)
        with self._lock:
            os.close(self.ended)
            self.ended = -1

    def run(self) -> None:
        try:
            self._list_and_watch()
        except _Cancelled:
            pass
        except BaseException as error:  # follow() raises it on its caller's thread
            self.error = error
        finally:
            for api in (self._api, self._beside):
                if api is not None:
                    api.close()
            with self._lock:
                if self.ended >= 0:
                    os.eventfd_write(self.ended, 1)

    def _list_and_watch(self) -> None:
        while not self._cancelled.is_set():
            try:
                self._api = self._api or open_api(self._options)
                if not self._version or self._is_behind(self._api):
                    self._list(self._api)
                self._watch(self._api)
            except _WholeOnly as error:
                self._whole = True
                log.warning(
                    "The watch reads whole objects from now on: %(reason)s", {"reason": error}
                )
            except (SourceError, ConfigError) as error:
                self._pause(error)

    def _list(self, api: KubeApi) -> None:
        started = time.perf_counter()
        listing = list_nodes(api, self._reader, self._options)
        listing.keep_known(self.known)
        same = self._delivered and listing.digests == self.known
        if self._cancelled.is_set():  # another session is the one that counts
            raise _Cancelled
        afresh = self._history.listed(api.origin, ResourceVersion(listing.version))
        if afresh:
            log.warning("The API server is not as it was before: %(reason)s", {"reason": afresh})
        self._changes = Changes(listing, self._reader, self._fetch)
        self._version = listing.version
        if not same:
            took = time.perf_counter() - started
            self._put(Snapshot(listing.claims, api.origin, took, consistent=True, afresh=afresh))
            self._delivered = True

    def _is_behind(self, api: KubeApi) -> bool:
        """Return whether the server is at an earlier state than the watch would begin with: it
        would accept the watch and be silent."""
        return went_back(self._version, newest_version(api))

    def _watch(self, api: KubeApi) -> None:
        """Follow one watch to its end; raises why it ended, unless that was as agreed."""
        # Not all nodes of a cluster shall come back at the same time.
        seconds = max(1, round(self._options.watch_seconds * random.uniform(0.8, 1.0)))
        params: dict[str, str | int] = {
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": seconds,
        }
        started = time.monotonic()
        useful = False
        idle = Allowance(IDLE_EVENTS, IDLE_EVENTS_A_SECOND)
        accept = "application/json" if self._whole else METADATA_ONLY
        with (
            self._can_be_whole(),
            api.watch(PATH, params, rule='"watch" of "nodes"', accept=accept) as stream,
        ):
            self._hold(stream)
            proof = self._prove_later()
            try:
                for lines in lines_of(api, stream.chunks()):
                    about_nodes = self._take(api, lines)
                    if about_nodes and not useful:
                        useful = True
                        self._useful()
                    if not idle.spend(len(lines) - about_nodes):
                        raise flooding(api)
            finally:
                proof.cancel()
                if time.monotonic() - started > _GOOD_SECONDS:
                    self._backoff.reset()
                self._hold(None)
        if not useful and time.monotonic() - started < _SHORT_SECONDS:
            raise Unavailable(
                f"{api.origin}: GET {PATH}?watch: it ended at once",
                hint="check the server and what is between it and this node",
            )

    def _hold(self, stream: WatchBody | None) -> None:
        with self._lock:
            self._stream = stream
            if self._cancelled.is_set():
                raise _Cancelled

    def _prove_later(self) -> threading.Timer:
        """Return a watch counts as healthy when it has stood for as long as the pause before it,
        after a failure that was reported. That the server accepts it proves nothing."""

        def proved() -> None:
            with suppress(_Cancelled):
                self._healthy()

        timer = threading.Timer(self._last_pause, proved)
        timer.daemon = True
        if self._told:
            timer.start()
        else:
            self._healthy()
        return timer

    def _useful(self) -> None:
        """Note that an event was read: the next failure is a first one again."""
        self._backoff.reset()
        self._last_pause = 0.0
        self._healthy()

    def _take(self, api: KubeApi, lines: list[bytes]) -> int:
        """Take events in, and return how many of them are about a node."""
        about_nodes = 0
        try:
            for line in lines:
                if line and not line.isspace():
                    about_nodes += self._changes.see(api, line)
        finally:
            # An error event comes after the others, which are known to us by now.
            change = self._changes.take()
            if change is not None:
                self._put(change)
            if self._changes.version:
                self._version = self._changes.version
                self._history.advanced(ResourceVersion(self._version))
        return about_nodes

    def _fetch(self, name: str) -> KubeNode | None:
        """Ask for one node, beside the watch. Where that is not allowed, whole objects will do."""
        self._beside = self._beside or open_api(self._options)
        try:
            return get_node(self._beside, name)
        except Forbidden as error:
            raise _WholeOnly(error.message) from error

    @contextmanager
    def _can_be_whole(self) -> Iterator[None]:
        try:
            yield
        except RequestRejected as error:
            if error.code == _NOT_ACCEPTABLE and not self._whole:
                raise _WholeOnly(error.message) from error
            raise

    def _pause(self, error: SourceError | ConfigError) -> None:
        """Tell of a failure unless it is the first one, and wait a little longer each time."""
        pause = self._last_pause = self._backoff.next()
        bearable = 1
        if isinstance(error, Compacted):
            # Usual after a broken watch: what could not be read meanwhile is gone.
            bearable = 2
            self._version = ""
        elif isinstance(error, RequestRejected) and error.code not in _BUSY:
            # Its state is not what we take it for, for instance after a restored backup.
            self._version = ""
        if isinstance(error, ConfigError):
            error = Unavailable(error.message, hint=error.hint)
        serious = isinstance(error, AuthFailed) or not self._delivered
        if serious or self._backoff.attempts > bearable:
            self._trouble(error)
        else:
            log.info("The watch of the nodes broke off, resuming: %(error)s", {"error": error})
        if isinstance(error, RequestRejected):
            pause = max(pause, min(error.retry_after, 30.0))
        self._cancelled.wait(pause)

    # ---- the inbox, to which nothing goes after cancel()

    @contextmanager
    def _wanted(self) -> Iterator[None]:
        with self._lock:
            if self._cancelled.is_set():
                raise _Cancelled
            yield

    def _put(self, news: News) -> None:
        with self._wanted():
            self._told = ""
            self._inbox.put(news)
            self._on_news(news)

    def _healthy(self) -> None:
        with self._wanted():
            self._told = ""
            self._inbox.healthy()

    def _trouble(self, error: SourceError) -> None:
        with self._wanted():
            if str(error) != self._told:
                self._told = str(error)
                self._inbox.trouble(error)
