"""An agent with a store of its own: what is put into a PushSource is in the kernel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from flannel_dp import Agent, PushSource
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, peer, peers, plane


def test_an_agent_follows_what_is_put_in(
    host: Any, family: int, wait_until: Callable[..., None]
) -> None:
    source = PushSource()
    with plane(host, family) as dataplane, Agent(dataplane, source) as agent:
        assert agent.start() is agent  # once more: there is one loop
        names = [thread.name for thread in threading.enumerate()]
        assert names.count("flannel-dp-agent") == 1
        source.replace_all([lease_of(host), *peers(range(1, 4))])
        assert agent.wait_ready(60)
        assert observed(host, family) == expected(peers(range(1, 4)), family)

        source.put(peer(9))
        source.remove(peer(2))
        left = [peer(1), peer(3), peer(9)]
        wait_until(lambda: observed(host, family) == expected(left, family))
