"""Which peers are alive, by the probes of an agent that runs on this node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from msgspec import Struct

from flannel_dp.errors import NotPermitted
from flannel_dp.kernel.netns import NetNS
from flannel_dp.look.asking import NoAgent, ask_agents


class Life(Struct, frozen=True):
    """What an agent's probes say of a peer: ``life`` is "new", "alive", "lossy" or "dead", ``rtt``
    the smoothed round trip in seconds, None where none came back or none is told. ``path_mtu`` is
    what the path takes in bytes where that is less than the device's MTU, else 0."""

    life: str
    rtt: float | None = None
    path_mtu: int = 0

    def __str__(self) -> str:
        trip = f" {1000 * self.rtt:.2f} ms" if self.rtt and self.alive else ""
        return f"{self.life}{trip}{f', path MTU {self.path_mtu}' if self.path_mtu else ''}"

    @property
    def alive(self) -> bool:
        """Whether packets come back."""
        return self.life in ("alive", "lossy")


class Lives(Struct, frozen=True):
    """The lives that an agent has told, by subnet, and that of the ``others``, of which there are
    too many: None where it is unknown."""

    told: Mapping[str, Life]
    others: Life | None = None

    def of(self, subnet: str) -> Life | None:
        """Return what is known of the peer with a subnet."""
        return self.told.get(subnet, self.others)


def ask_lives(run_dir: str, netns: NetNS, devices: Iterable[str]) -> Lives | None:
    """Ask the agent of ``devices`` (in host-gw, of none) which peers are alive; None where no agent
    answers, or it sends no probes."""
    agents: list[dict[str, Any]] = []
    with suppress(NoAgent, NotPermitted, OSError):
        agents = ask_agents(run_dir, netns)
    wanted = {*devices}
    for one in agents:
        probes = one.get("probes")
        if probes and "each" in probes and (not wanted or wanted & {*one.get("devices", ())}):
            return _lives(probes)
    return None


def _lives(probes: Mapping[str, Any]) -> Lives:
    narrow = probes.get("path_mtu", {}).get("peers", ())
    mtus = {one["subnet"]: one["path_mtu"] for one in narrow}
    told = {
        subnet: Life(life, rtt, mtus.get(subnet, 0))
        for lives in probes["each"].values()
        for subnet, (life, rtt) in lives.items()
    }
    counted = [lives for by in probes["lives"].values() for lives in by.items()]
    unwell = sum(number for life, number in counted if life != "alive")
    known = sum(life.life != "alive" for life in told.values())
    return Lives(told, Life("alive") if known >= unwell else None)
