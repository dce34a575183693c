"""How an agent begins and ends, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import DataPlane
from flannel_dp.agent.agent import Agent
from flannel_dp.agent.process import signals
from flannel_dp.errors import NotPermitted
from flannel_dp.reconcile.watch import Watch
from flannel_dp.sources import Inbox
from tests.lib.agents import NUMBERS, AgentNode, Script, Watched
from tests.lib.kernel import everything, expected, observed
from tests.lib.leases import lease_of, peers, plane, subnet
from tests.lib.waiting import LIMIT, NEVER, wait_until


def test_it_stops_at_once_and_the_kernel_keeps_forwarding(host: Any) -> None:
    with AgentNode(host) as node:
        wait_until(node.settled)
        before = everything(host)
        node.agent.stop()
        node.agent.join(LIMIT)
        assert everything(host) == before


def test_it_stops_though_the_source_does_not(host: Any) -> None:
    release = threading.Event()

    class Stubborn(Script):
        def follow(self, inbox: Inbox) -> None:
            inbox.put(self.snapshot())
            release.wait(NEVER)

    watched = Watched(plane(host), Stubborn([lease_of(host), *peers(NUMBERS)]))
    try:
        with watched:
            watched.agent.stop()
            watched.agent.join(LIMIT)
    finally:
        release.set()


def test_it_stops_before_it_was_ever_ready(host: Any) -> None:
    host.ip("link del eth0")
    with plane(host) as dp:
        agent = Agent(dp, Script([lease_of(host), *peers(NUMBERS)])).start()
        wait_until(lambda: agent.status.problems)
        assert not agent.wait_ready(0.0)
        agent.stop()
        agent.join(LIMIT)


def test_as_a_context_manager(host: Any) -> None:
    with plane(host) as dp:
        with Agent(dp, Script([lease_of(host), *peers(NUMBERS)])) as agent:
            assert agent.wait_ready(LIMIT)
        with pytest.raises(AssertionError, match="start"):
            Agent(dp, Script()).join()


def test_join_tells_when_it_is_still_running(host: Any) -> None:
    with (
        plane(host) as dp,
        Agent(dp, Script([lease_of(host)])) as agent,
        pytest.raises(TimeoutError, match=r"within 0\.01 s"),
    ):
        agent.join(0.01)


def test_in_asyncio(host: Any) -> None:
    """Beside other tasks; cancelling waits for the end."""

    async def main(agent: Agent) -> None:
        task = asyncio.create_task(agent.run_async())
        beats = 0
        while not agent.wait_ready(0):
            beats += 1
            await asyncio.sleep(0.001)
        assert beats > 0
        assert not task.done()
        task.cancel()
        async with asyncio.timeout(LIMIT):
            with pytest.raises(asyncio.CancelledError):
                await task

    with plane(host) as dp:
        agent = Agent(dp, Script([lease_of(host), *peers(NUMBERS)]))
        asyncio.run(main(agent))
        assert agent._watch is not None
        with pytest.raises(ValueError, match="closed"):
            agent._watch.fileno()
    assert observed(host, 4) == expected(peers(NUMBERS), 4)


def test_in_asyncio_it_ends_by_stop_as_well(host: Any) -> None:
    async def main(agent: Agent) -> None:
        async with asyncio.timeout(LIMIT):
            task = asyncio.create_task(agent.run_async())
            while not agent.wait_ready(0):
                await asyncio.sleep(0.001)
            agent.stop()
            await task

    with plane(host) as dp:
        asyncio.run(main(Agent(dp, Script([lease_of(host), *peers(NUMBERS)]))))


def refuse(dp: DataPlane, error: Exception) -> Callable[[], None]:
    """Let each writing of tables fail with ``error``, until what is returned is called."""
    kernel, apply = dp.kernel, dp.kernel.apply

    def refusing(*args: Any, **options: Any) -> Any:
        raise error

    kernel.apply = refusing  # type: ignore[method-assign]

    def end() -> None:
        kernel.apply = apply  # type: ignore[method-assign]

    return end


def test_without_permission_at_the_start_it_ends(host: Any) -> None:
    with plane(host) as dp:
        refuse(dp, NotPermitted(1, "add a route", hint="grant CAP_NET_ADMIN"))
        agent = Agent(dp, Script([lease_of(host), *peers(NUMBERS)]))
        with pytest.raises(NotPermitted, match="CAP_NET_ADMIN"):
            agent.run()
        agent = Agent(dp, Script([lease_of(host), *peers(NUMBERS)])).start()
        with pytest.raises(NotPermitted):
            agent.join(LIMIT)


def test_without_permission_later_it_says_so_and_goes_on(node: AgentNode) -> None:
    end = refuse(node.plane, NotPermitted(1, "add a route", hint="grant CAP_NET_ADMIN"))
    node.host.ip(f"route del {subnet(4, 3)}")
    wait_until(lambda: "CAP_NET_ADMIN" in node.status.problems.get("kernel", ""))
    failures = node.status.failures
    wait_until(lambda: node.status.failures > failures)
    end()

    wait_until(node.settled)


def test_an_agent_leaves_nothing_in_the_process(host: Any) -> None:
    def descriptors() -> list[str]:
        names = []
        for fd in os.listdir("/proc/self/fd"):
            try:
                names.append(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:  # the directory's own
                continue
        return sorted(names)

    def once() -> None:
        script = Script([lease_of(host), *peers(NUMBERS)])
        with Watched(plane(host), script):
            pass
        os.close(script._bell)

    once()
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    for _ in range(3):
        once()
    gc.collect()

    assert descriptors() == before
    assert threading.active_count() == threads


def idle(agent: Agent) -> bool:
    """Whether the main thread waits in poll(2), and for nothing that is due within minutes."""
    due = agent._timers.seconds_left(*agent._work.due, agent._turn_due)
    wchan = Path(f"/proc/self/task/{os.getpid()}/wchan").read_text()
    return due is not None and due > 600.0 and "poll" in wchan


def test_a_signal_that_another_thread_gets_is_handled_at_once(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that comes after Python has looked for signals, and before the loop waits: nothing
    interrupts that wait. The main thread blocks the signal here, so that it is never its own, and
    no event of the kernel wakes it."""
    silent = os.eventfd(0, os.EFD_CLOEXEC)
    monkeypatch.setattr(Watch, "fileno", lambda self: silent)
    script = Script([lease_of(host), *peers(NUMBERS)])
    with plane(host) as made:
        agent = Agent(made, script, audit=3600.0)
        seen: list[bool] = []

        def send() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
            try:
                assert agent.wait_ready(LIMIT)
                wait_until(lambda: idle(agent))
                os.kill(os.getpid(), signal.SIGHUP)
                wait_until(lambda: script.refreshes)
                seen.append(True)
            finally:
                agent.stop()

        thread = threading.Thread(target=send)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
        try:
            with signals(agent.stop, agent.refresh) as agent.signal_fd:
                thread.start()
                agent.run()
                thread.join(LIMIT)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            agent.close()
            os.close(silent)
    assert seen == [True]
