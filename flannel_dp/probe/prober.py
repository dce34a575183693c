"""Probe peers again and again, on a thread, and tell when one dies or comes back."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from flannel_dp._core import Table, run_probers
from flannel_dp.errors import ConfigError, FlannelDPError, KernelError, SourceError, require
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS
from flannel_dp.probe.life import LifeChange, MtuChange, PeerLife, Totals
from flannel_dp.probe.line import PacketSockets, PathMtuMode
from flannel_dp.probe.lines import Lines
from flannel_dp.probe.wanted import Wanted, Written, wanted_from, wanted_of
from flannel_dp.threads import Thread

#: Seconds between two looks at what no event tells of.
_CHECK = 1.0

log = logging.getLogger(__name__)

#: The end of an iteration.
_END = object()


class Followed(Protocol):
    """A data plane, as far as probing its peers takes it."""

    @property
    def known(self) -> Mapping[int, Written]: ...
    @property
    def host(self) -> Any: ...
    @property
    def config(self) -> Any: ...
    @property
    def exclusive(self) -> Any: ...
    @property
    def on_written(self) -> list[Callable[[], None]]: ...


class Prober:
    """Prove again and again that packets to each peer come back, with nothing installed there.

    ``peers`` is a :class:`DataPlane` that was synced, whose changes are followed, or a list of
    (address, MAC, device): a peer's address in the overlay and its MAC, as ``ip neigh`` shows
    them, and the device that leads to it. Each peer gets a probe every ``interval`` seconds, by
    ``paths`` UDP source ports in turn. Of many peers the interval is stretched, so that probes take
    less than a megabit a second. A probe is a packet from this node to itself that goes to the
    peer's MAC, and that the peer forwards back (RFC 9747).

    It works on a thread of its own from ``start`` (or ``with``) until ``close``. A peer that stops
    answering is dead within three intervals; one that loses packets is "lossy" and does not
    become dead and alive in turns. Where none answers at all, or this node's interface is down,
    ``problem`` says so and no peer is called dead.

    ``changes`` and ``async for`` give each change of a peer's life. All methods may be called from
    any thread. ``netns`` is the namespace (default: the caller's, or the data plane's), ``sockets``
    are :class:`flannel_dp.probe.line.PacketSockets` that were opened before privileges were
    dropped. ``path_mtu`` says whether the largest packet is searched for that comes back, where
    those of the device's MTU do not ("off": no large ones are sent); with "fix" the caller sees to
    it when ``on_mtu`` is called, and the peer is not lossy. ``on_change``, ``on_mtu``,
    ``on_problem``, and ``on_turn`` at the beginning, after these and after
    each change of the peers, are called on the prober's thread. What one of them raises ends it:
    ``changes``, ``async for`` and ``wait_known`` raise that from then on, and ``problem`` names it.

    Raises ConfigError for a list or an interval that cannot be, SourceError for a data plane before
    its first ``sync``, NotPermitted without CAP_NET_RAW, KernelError. Equivalent: none;
    ``ping -I flannel.1`` proves less, and for one peer.
    """

    def __init__(
        self,
        peers: Followed | Iterable[tuple[str, str, str]] = (),
        *,
        interval: float = 1.0,
        paths: int = 8,
        netns: NetNS = None,
        sockets: PacketSockets | None = None,
        on_change: Callable[[Sequence[LifeChange]], None] = lambda changes: None,
        on_problem: Callable[[str], None] = lambda problem: None,
        on_turn: Callable[[], None] = lambda: None,
        on_mtu: Callable[[Sequence[MtuChange]], None] = lambda changes: None,
        path_mtu: PathMtuMode = "warn",
    ) -> None:
        known = isinstance(peers, Iterable) or hasattr(peers, "known")
        require(known, "peers", peers, "a DataPlane, or tuples of address, MAC and device")
        require(isinstance(interval, (int, float)), "interval", interval, "seconds")
        require(isinstance(paths, int), "paths", paths, "1 to 16")
        require(path_mtu in ("off", "warn", "fix"), "path_mtu", path_mtu, "off, warn or fix")
        if not 0.05 <= interval <= 3600:
            raise ConfigError(
                f"an interval of {interval} seconds is impossible",
                hint="give 0.05 to 3600 seconds",
            )
        if not 1 <= paths <= 16:
            raise ConfigError(f"{paths} paths are impossible", hint="give 1 to 16")
        self._on_change, self._on_problem, self._on_turn = on_change, on_problem, on_turn
        self._on_mtu = on_mtu
        self._lines = Lines(
            netns, interval=interval, paths=paths, sockets=sockets, path_mtu=path_mtu
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: list[Callable[[object], None]] = []
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_wake_fd = weakref.finalize(self, os.close, self._wake_fd)
        self._thread: threading.Thread | None = None
        self._stop = self._ended = False
        self._failure: BaseException | None = None
        self._problem = ""
        self._withheld: dict[tuple[int, str], LifeChange] = {}
        self._withheld_until = 0.0
        self._retry: list[Wanted] | None = None
        self._stack = ExitStack()
        try:
            self._take(peers)
        except BaseException:
            self._lines.close()
            raise

    def _take(self, peers: Followed | Iterable[tuple[str, str, str]]) -> None:
        if isinstance(peers, Iterable):
            with LinkReader(self._lines.netns) as reader:
                self._set(wanted_from(peers, reader))
            return
        followed = peers
        if not followed.known:
            raise SourceError("there are no peers yet", hint="call sync() of the data plane first")
        self._lines.netns = followed.host.netns
        follow = partial(self._follow, followed)
        self._set(self._wanted(followed))
        followed.on_written.append(follow)
        self._stack.callback(followed.on_written.remove, follow)

    def _wanted(self, followed: Followed) -> list[Wanted]:
        with followed.exclusive, LinkReader(self._lines.netns) as reader:
            return wanted_of(followed.known, reader, followed.config.backend.vni)

    def _follow(self, followed: Followed) -> None:
        try:
            self.set(self._wanted(followed))
        except KernelError as error:
            self._tell_problem(str(error))

    # ---- which peers

    def set(self, wanted: Sequence[Wanted]) -> None:
        """Probe exactly these peers from now on. What is known of those that stay is kept."""
        self._command(partial(self._set, [*wanted]))

    def alter(self, family: int, gone: Table, come: Table) -> None:
        """Probe the peers of a family that ``come``, and those no longer that are ``gone``, two
        tables of peers, where all peers of the family are reached the same way. What it costs
        depends on them alone."""
        self._command(partial(self._lines.alter, family, gone, come))

    def _command(self, work: Callable[[], None]) -> None:
        self._commands.put(work)
        self._wake()

    def _set(self, wanted: list[Wanted]) -> None:
        self._retry = None
        try:
            self._lines.set(wanted)
        except FlannelDPError:
            self._retry = wanted
            raise

    # ---- what is known

    @property
    def problem(self) -> str:
        """Why no peer can be proven now, in words: an interface of this node, say. "" for none."""
        return self._problem

    def __len__(self) -> int:
        return len(self._lines)

    def peers(self, *lives: str, most: int | None = None) -> list[PeerLife]:
        """Return what is known of peers: of all, or of those with one of ``lives``, ``most`` at
        most."""
        return self._lines.peers(lives, most)

    def peer(self, subnet: str) -> PeerLife | None:
        """Return what is known of the peer with this subnet (of a list: ADDRESS/32 or /128), None
        where there is none. ValueError for what is no prefix."""
        return self._lines.peer(subnet)

    @property
    def totals(self) -> Totals:
        """The counts of all peers and probes. Costs the same however many there are."""
        return self._lines.totals

    def narrow(self, most: int | None = None) -> list[PeerLife]:
        """Return ``most`` (None: all) of the peers whose path takes less than the device's MTU."""
        return self._lines.narrow(most)

    @property
    def narrow_count(self) -> int:
        """How many such peers there are."""
        return self._lines.narrow_count

    def note_mtus(self, known: Mapping[str, int]) -> None:
        """Take path MTUs as known, by subnet, until they are measured: those of routes, say."""
        self._command(partial(self._lines.note_mtus, dict(known)))

    def then(self, work: Callable[[], None]) -> None:
        """Call ``work`` on the prober's thread, after what was asked for so far is done."""
        self._command(work)

    @property
    def is_complete(self) -> bool:
        """Whether all peers that were asked for are probed; else that is tried again."""
        return self._retry is None

    def wait_known(self, timeout: float) -> bool:
        """Wait until each peer is known to be alive or dead. Return False on a timeout."""
        end = time.monotonic() + timeout
        while self.totals.count("new") or self._failure is not None:
            self._raise_failure()
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def changes(self, timeout: float | None = None) -> Iterator[LifeChange]:
        """Yield each change of a peer's life from the first ``next`` on, until none came for
        ``timeout`` seconds (None: never) or ``close`` was called."""
        box: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._listen(box.put)
        try:
            while (one := box.get(timeout=timeout)) is not _END:
                assert isinstance(one, LifeChange)
                yield one
            self._raise_failure()
        except queue.Empty:
            return
        finally:
            self._listeners.remove(box.put)

    async def __aiter__(self) -> AsyncIterator[LifeChange]:
        """Yield each change of a peer's life, until ``close``: ``async for change in prober``."""
        import asyncio

        loop, box = asyncio.get_running_loop(), asyncio.Queue[object]()

        def put(one: object) -> None:
            loop.call_soon_threadsafe(box.put_nowait, one)

        self._listen(put)
        try:
            while (one := await box.get()) is not _END:
                assert isinstance(one, LifeChange)
                yield one
            self._raise_failure()
        finally:
            self._listeners.remove(put)

    def _listen(self, put: Callable[[object], None]) -> None:
        self._listeners.append(put)
        if self._ended:
            put(_END)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ---- the thread

    def start(self) -> Prober:
        """Begin, on a thread of its own."""
        self._thread = Thread(target=self._run_on_thread, name="flannel-dp-prober", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Have ``run`` return."""
        self._stop = True
        self._wake()

    def close(self) -> None:
        """End the thread and all iterations, and close the sockets."""
        self.stop()
        self._stack.close()
        if self._thread is not None:
            self._thread.join()
        self._end()
        self._lines.close()
        self._wake_fd = -1
        self._close_wake_fd()

    def __enter__(self) -> Prober:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wake(self) -> None:
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _end(self) -> None:
        self._ended = True
        for listener in [*self._listeners]:
            listener(_END)

    def _run_on_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:  # whoever waits for changes is told
            self._failure = error
            self._problem = f"the prober has ended: {type(error).__name__}: {error}"
            log.critical("%(problem)s", {"problem": self._problem}, exc_info=error)
            self._end()

    def run(self) -> None:
        """Probe until ``stop``, in the calling thread."""
        check = time.monotonic()
        self._on_turn()
        while not self._stop:
            wait = max(0.0, check - time.monotonic()) if self._has_to_check else 3600.0
            if run_probers(self._lines.probers, self._wake_fd, wait):
                os.eventfd_read(self._wake_fd)
                self._do_commands()
            self._collect()
            if self._has_to_check and time.monotonic() >= check:
                check = time.monotonic() + _CHECK
                self._check()
            self._on_turn()

    def _do_commands(self) -> None:
        while not self._commands.empty():
            try:
                self._commands.get()()
            except FlannelDPError as error:
                self._tell_problem(str(error))

    @property
    def _has_to_check(self) -> bool:
        return bool(
            self._problem or self._withheld or self._retry is not None or self._lines.lacks_macs
        )

    def _check(self) -> None:
        """Do what nothing wakes for: learn MACs, open again what could not be opened, and look
        whether a problem of this node has ended."""
        if self._retry is not None:
            self._commands.put(partial(self._set, self._retry))
            self._do_commands()
        self._lines.learn()
        if self._problem and self._retry is None:
            self._tell_problem(self._lines.own_problem())
        if self._withheld and not self._problem and time.monotonic() >= self._withheld_until:
            held, self._withheld = [*self._withheld.values()], {}
            self._tell([one for one in held if self._is_dead(one.peer)])

    def _is_dead(self, peer: PeerLife) -> bool:
        now = self.peer(peer.subnet)
        return now is not None and now.life == "dead"

    def _collect(self) -> None:
        """Tell what has changed. Of peers that die while this node is at fault nothing is told."""
        changes, silent = self._lines.changes()
        died = [one for one in changes if one.peer.life == "dead"]
        if (died or silent) and self._retry is None:
            self._tell_problem(self._lines.own_problem())
        told = []
        for one in changes:
            key = (one.peer.family, one.peer.subnet)
            if one.peer.life == "dead" and self._problem:
                self._withheld[key] = one
            elif self._withheld.pop(key, None) is None:
                told.append(one)
        self._tell(told)
        if narrow := self._lines.mtu_changes():
            self._on_mtu(narrow)

    def _tell(self, changes: Sequence[LifeChange]) -> None:
        if not changes:
            return
        self._on_change(changes)
        for listener in [*self._listeners]:
            for one in changes:
                listener(one)

    def _tell_problem(self, problem: str) -> None:
        if problem == self._problem:
            return
        self._problem = problem
        if not problem:
            self._withheld_until = time.monotonic() + 3 * self.totals.interval
        self._on_problem(problem)
