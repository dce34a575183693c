"""``flannel-dp sync --watch`` as a service: an agent with signals, health and metrics over HTTP,
systemd's notifications, and no more privileges than it needs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from flannel_dp.agent.address import AddressWatch
from flannel_dp.agent.agent import Agent
from flannel_dp.agent.notify import Notifier
from flannel_dp.agent.probing import Probing
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.process import end_with_supervised, return_large_blocks, signals
from flannel_dp.agent.service_options import ServiceOptions
from flannel_dp.agent.starting import PROBLEM, Ended, Starting
from flannel_dp.agent.status import Status, StatusBoard, peers_in_words
from flannel_dp.agent.supervise import Worker, described
from flannel_dp.agent.telling import Facts, Telling
from flannel_dp.backoff import Backoff
from flannel_dp.cluster.network import other_devices
from flannel_dp.errors import FlannelDPError, SourceError, shortage
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.lock import DeviceLocks
from flannel_dp.locks import tidy_up
from flannel_dp.node.instance import lock_names
from flannel_dp.sources import Inbox

if TYPE_CHECKING:
    from flannel_dp.agent.health import HealthServer
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.dataplane import DataPlane
    from flannel_dp.resources.counters.resource import CountersResource
    from flannel_dp.sources.membership import Membership

log = logging.getLogger(__name__)

#: The loop is stuck when it has not turned for this many audits.
_STUCK_AUDITS = 3


class Build(Protocol):
    """What a service is made of."""

    def config(self) -> NetworkConfig:
        """Return the network configuration as it is now. Raises ConfigError, SourceError."""
        ...

    def join(self, config: NetworkConfig) -> tuple[DataPlane, Membership]:
        """Take part in the cluster from now on. Raises NotYet and SourceError for what may
        come, ConfigError for what is wrong."""
        ...


class Service:
    """Runs agents until a signal ends it. ``build`` makes the data plane and joins the
    cluster, and is asked again when SIGHUP finds another network configuration.

    What a start needs is waited for (``starting``), health being served. SIGTERM, SIGINT and
    SIGQUIT end it within a second, also then, and leave the kernel forwarding; SIGHUP reads
    everything again.
    """

    def __init__(self, build: Build, options: ServiceOptions, notifier: Notifier) -> None:
        self._build, self._options, self._notifier = build, options, notifier
        self.board = StatusBoard()
        self._problems = Problems(self.board)
        self._agent: Agent | None = None
        self._ended = self._reload = False
        self._reread_at = math.inf  # when the configuration is read once more; checked in each turn
        self._rereading = Backoff(1.0, 60.0)
        self._starting = Starting(self.board, notifier)
        #: What the next agent is made of; None where no other is to come.
        self._next: tuple[DataPlane, Membership] | None = None
        self._server: HealthServer | None = None
        self._locks = DeviceLocks(directory=options.run_dir)
        self._address = AddressWatch({})
        self._member: Membership | None = None
        self._rivals = 0
        self._said = ""
        self._stuck_after = _STUCK_AUDITS * options.audit + 30
        self._telling = Telling(
            self.board,
            self._problems,
            self._facts,
            run_dir=options.run_dir,
            state_dir=options.state_dir,
            audit=options.audit,
            stuck_after=self._stuck_after,
        )
        self._beat = 0.0
        self._probing = Probing(self.board, options.probe, self._telling.chronicle)
        self._telling.probes = self._probing.document
        self._keeper: Inbox | None = None  # while the node waits for being called ready

    def run(self) -> None:
        """Run to the end. Raises ConfigError, Busy and NotPermitted where a start is impossible and
        waiting does not help."""
        from flannel_dp.kernel.capabilities import set_undumpable

        return_large_blocks()
        set_undumpable()
        with ExitStack() as stack:
            stack.callback(self._locks.release)
            stack.callback(self._close_health)
            stack.callback(self._telling.close)
            self._starting.signal_fd = stack.enter_context(signals(self._end, self.reload))
            with suppress(Ended):
                end_with_supervised(self.stop)
                self._next = self._starting.until(self._start)
                self._prepare_counters(self._next[0].counters)
                stack.callback(self._probing.close)
                self._probing.open()
                self._starting.until(self._drop)
                while self._next is not None and not self._ended:
                    self._run_next()
            self._notifier.send(stopping=True)
        log.info("Stopped; the kernel keeps forwarding")

    def stop(self) -> None:
        """End as a signal would."""
        self._ended = True
        self._starting.end()
        if self._agent is not None:
            self._agent.stop()

    def _end(self) -> None:
        self.stop()
        self._starting.interrupt()

    def reload(self) -> None:
        """Read everything again: configuration, leases, kernel. From any thread."""
        self._reload = True
        self._starting.retry()
        if self._agent is not None:
            self._agent.refresh()

    # ---- before the start

    def _start(self) -> tuple[DataPlane, Membership]:
        """Return everything that a start needs, in this order: nothing is published before health
        can be asked for and before the node can be reached."""
        self._serve_health()
        self._telling.start(self._drop_of_thread)
        self._reload = False
        return self._join(self._build.config())

    def _join(self, config: NetworkConfig) -> tuple[DataPlane, Membership]:
        """Open what the configuration needs, the locks first: a second instance must not touch the
        first one's lease."""
        names, is_first = lock_names(config, LinkReader), not self._locks.held
        self._locks.take(names)
        self._telling.name(self._locks.held)
        if is_first:
            tidy_up(self._options.run_dir, None, other_devices(config))
        plane, member = self._build.join(config)
        member.on_config_change(self.reload)
        return plane, member

    def _serve_health(self) -> None:
        """Bind, and serve from now on. The threads of it have no more privileges than the
        process keeps, while this one still has what opening the rest may take."""
        if self._options.healthz_port is None or self._server is not None:
            return
        from flannel_dp.agent.health import HealthServer

        self._server = HealthServer(
            self.board,
            self._options.healthz_ip,
            self._options.healthz_port,
            stuck_after=self._stuck_after,
            now=time.monotonic,
            counting=lambda: self._agent.plane.counting if self._agent else None,
            probing=lambda: self._probing.prober,
        )
        self._server.start(self._drop_of_thread)
        log.info(
            "Health is served at %(address)s, port %(port)d",
            {"address": self._options.healthz_ip, "port": self._server.port},
        )

    def _close_health(self) -> None:
        if self._server is not None:
            self._server.close()

    def _facts(self) -> Facts:
        """Return what is known by now, from any thread."""
        if self._agent is None:
            return Facts(self._locks.held, None, {})
        return Facts(self._locks.held, self._agent.plane.config, self._agent.plane.known)

    def _prepare_counters(self, counters: CountersResource) -> None:
        """Load programs now: the rights for it are about to be given up."""
        try:
            counters.prepare()
        except (FlannelDPError, OSError) as error:
            log.warning("Packets are not counted: %(error)s", {"error": error})
            self._problems.note("counters", str(error), told=True)

    def _drop(self) -> None:
        from flannel_dp.kernel.capabilities import drop_capabilities

        if self._options.keep is not None:
            drop_capabilities(self._options.keep)

    def _drop_of_thread(self) -> None:
        from flannel_dp.kernel.capabilities import drop_capabilities

        if self._options.keep is not None:
            drop_capabilities(self._options.keep, thread=True)

    # ---- one agent

    def _run_next(self) -> None:
        """Run the next agent until it is stopped. One for which there is no descriptor, for
        instance, is tried again."""
        assert self._next is not None
        (plane, member), self._next = self._next, None
        watchdog = self._notifier.watchdog_seconds
        with plane:
            while not self._ended:
                self._address = AddressWatch(member.published)
                self._member, self._rivals = member, 0
                try:
                    with self._keeping(member) as keeper, self._probing.running(plane):
                        agent = Agent(
                            plane,
                            member.source,
                            **self._options.of_agent(),
                            board=self.board,
                            on_ready=partial(self._programmed, keeper),
                            on_peers=self._probing.follow,
                            on_turn=self._turn,
                            alarm=watchdog / 2 if watchdog else None,
                            chronicle=self._telling.chronicle,
                        )
                        agent.signal_fd = self._starting.signal_fd
                        self._run_agent(agent)
                except Exception as error:
                    self._starting.pause(error)
                else:
                    return

    def _run_agent(self, agent: Agent) -> None:
        self._agent = agent
        self._probing.on_change = agent.nudge
        try:
            if not self._ended:
                agent.run()
        finally:
            agent.close()

    @contextmanager
    def _keeping(self, member: Membership) -> Iterator[Inbox]:
        """Keep this node's lease on a thread of its own."""
        box = Inbox(lambda: self._note_lease(box))

        def report(text: str) -> None:
            box.trouble(SourceError(text, hint="the agent tries again; the log has the traceback"))

        keeper = Worker("lease", lambda: member.keep(box), board=self.board, on_failure=report)
        keeper.start()
        try:
            yield box
        finally:
            keeper.stop()
            box.stop()
            keeper.join(0.5)
            self._note_lease(box)
            if not keeper.alive:
                box.close()

    def _note_lease(self, box: Inbox) -> None:
        error = None if box.stopping else box.take().error  # a problem ends with its keeper
        self._problems.note("lease", error and f"cannot refresh this node's lease: {error}")

    def _programmed(self, keeper: Inbox) -> None:
        """All peers are programmed: the node is ready, unless it is to wait for their answers."""
        self._keeper = keeper
        self._probing.programmed()
        self._call_ready()

    def _call_ready(self) -> None:
        if self._keeper is not None and self._probing.ready():
            keeper, self._keeper = self._keeper, None
            self._ready(keeper)

    def _ready(self, keeper: Inbox) -> None:
        keeper.refresh()
        self._notifier.send(ready=True, status=_in_words(self.board.status))

    def _turn(self) -> float | None:
        """Do what is due beside the agent's work; return the seconds until it is again."""
        self.board.problem(PROBLEM, None)  # of an agent that could not begin
        if self._reload or time.monotonic() >= self._reread_at:
            self._reload, self._reread_at = False, math.inf
            self._reread()
        self._publish_address()
        self._contest()
        self._call_ready()
        status = self.board.status
        words = _in_words(status)
        now = time.monotonic()
        watchdog = self._notifier.watchdog_seconds
        due = watchdog is not None and now - self._beat >= watchdog / 3
        beat = due and not status.ended  # else a restart is what helps
        if beat:
            self._beat = now
        if beat or words != self._said:
            self._notifier.send(watchdog=beat, status=words if words != self._said else None)
            self._said = words
        self._probing.flush()
        at = min(self._reread_at, self._address.due, self._probing.due)
        return max(0.0, at - now) if at < math.inf else None

    def _reread(self) -> None:
        """Read the configuration after SIGHUP; the agent reads leases and kernel again."""
        assert self._agent is not None
        log.info("Reading the configuration, the leases and the kernel again")
        ready = self.board.status.serves  # else the first convergence says so
        if ready:
            self._notifier.send(reloading=True)
        try:
            config = self._build.config()
            moved = self._member is not None and self._member.moved
            if moved or config != self._agent.plane.config:
                if not moved:
                    log.info("The network configuration has changed")
                self._next = self._join(config)
                self._agent.stop()
            self._problems.note("config", None, told=True)
            self._rereading.reset()
        except FlannelDPError as error:
            log.error(
                "The new configuration is rejected, the old one stays: %(error)s", {"error": error}
            )
            self._problems.note("config", str(error), told=True)
            self._reread_later(error)
        except Exception as error:  # an unexpected error in a configuration ends nothing
            log.exception("The new configuration is rejected, the old one stays")
            self._problems.note("config", described(error), told=True)
            self._reread_later(error)
        if ready:
            self._notifier.send(ready=True)

    def _reread_later(self, error: Exception) -> None:
        """Read the configuration again by itself where another time it may be readable."""
        if isinstance(error, SourceError) or shortage(error):
            self._reread_at = time.monotonic() + self._rereading.next()

    def _publish_address(self) -> None:
        """Publish the lease with the node's address where that has changed, and go on with a
        data plane of that address. Subnet and MAC stay, and so does what the kernel has."""
        if self._agent is None or self._ended or self._next is not None:
            return
        plane = self._agent.plane
        changes = self._address.changes(
            {n: state.family.admission.node.public_ip for n, state in plane.known.items()},
            plane.resolver,
            troubled=self.board.status.degraded,
        )
        if not changes:
            return
        log.warning(
            "The address of this node has changed: %(changes)s; publishing the lease again",
            {"changes": ", ".join(map(str, changes))},
        )
        try:
            self._next = self._join(plane.config)
        except FlannelDPError as error:
            self._address.failed()
            self._problems.note(
                "address", f"the lease still has {changes[0].old or 'none'}: {error}", told=True
            )
            log.warning("Cannot publish the new address: %(error)s", {"error": error})
        else:
            self._problems.note("address", None, told=True)
            self._agent.stop()

    def _contest(self) -> None:
        """Show the peers that this node is alive, once for each further lease that has its MAC."""
        rivals = self.board.status.rejected.get("own-mac", 0)
        if rivals > self._rivals and self._member is not None:
            log.warning("Another lease has the MAC of this node; writing this node's lease again")
            self._member.contest()
        self._rivals = rivals


def _in_words(status: Status) -> str:
    """Return the line for ``systemctl status``."""
    text = peers_in_words(status.peers) or "waiting for leases"
    if status.degraded:
        text += "; degraded: " + "; ".join(sorted(status.problems))
    return text
