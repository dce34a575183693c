"""A node where everything happens at once, for a while: random hostile edits against a
running agent, by events alone. Then the kernel equals what is wanted, and nothing else
has changed.

FLANNEL_DP_SOAK_ROUNDS makes it longer than three rounds, FLANNEL_DP_SOAK_SEED another one.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from tests.lib.agents import Script, Watched
from tests.lib.kernel import State, everything, expected, observed, stranger
from tests.lib.leases import DEVICE, address, endpoint, lease_of, mac, peers, plane, subnet
from tests.lib.waiting import wait_until

ROUNDS = int(os.environ.get("FLANNEL_DP_SOAK_ROUNDS", "3"))
EDITS = 150  # of a round
PEERS = 300
SEED = int(os.environ.get("FLANNEL_DP_SOAK_SEED", "20260915"))


class Vandal:
    """Random edits of a node. What is done to devices and addresses of others is undone at
    the end of the same edit; what is done to ours is not."""

    def __init__(self, host: Any, seed: int) -> None:
        self._host, self._chance = host, random.Random(seed)
        self.edits: dict[str, int] = {}
        self.history: list[str] = []
        self._kinds: list[tuple[int, Callable[[int], None]]] = [
            (12, self.delete),
            (12, self.replace),
            (8, self.rogue),
            (8, self.foreign_churn),
            (2, self.many),
            (1, self.flap),
            (1, self.down),
            (1, self.rename),
            (1, self.new_mac),
            (1, self.new_mtu),
            (1, self.overlay_address),
            (1, self.delete_device),
            (1, self.underlay_flap),
            (1, self.underlay_address),
            (1, self.underlay_mtu),
        ]

    def edit(self) -> None:
        weights = [weight for weight, _ in self._kinds]
        [(_, kind)] = self._chance.choices(self._kinds, weights)
        family = self._chance.choice((4, 6))
        self.edits[kind.__name__] = self.edits.get(kind.__name__, 0) + 1
        self.history.append(f"{kind.__name__} IPv{family}")
        kind(family)

    # ---- entries

    def _number(self) -> int:
        return self._chance.randrange(1, PEERS + 1)

    def _one(self, family: int) -> str:
        """A deletion of one entry, for ip."""
        number, device = self._number(), DEVICE[family]
        lines = [f"route del {subnet(family, number)}"]
        lines.append(f"neigh del {address(family, number)} dev {device}")
        if family == 4:
            lines.append(f"nexthop del id {0x5A000000 | 240 << 16 | number << 8}")
        return self._chance.choice(lines)

    def delete(self, family: int) -> None:
        if self._chance.random() < 0.3:
            self._bridge(f"fdb del {mac(family, self._number())} dev {DEVICE[family]}")
        else:
            self._ip(family, self._one(family))

    def many(self, family: int) -> None:
        self._ip(family, *(self._one(family) for _ in range(self._chance.randrange(10, 200))))

    def replace(self, family: int) -> None:
        number, other, device = self._number(), self._number(), DEVICE[family]
        metric = "metric 1024" if family == 6 else ""
        via = f"via {address(family, other)} dev {device} onlink"
        lines = [
            f"route replace {subnet(family, number)} dev {device} {metric}",
            f"route replace {subnet(family, number)} {via} {metric}",
            f"neigh replace {address(family, number)} lladdr {mac(family, other)} dev {device}",
        ]
        if family == 4:
            known = 0x5A000000 | 240 << 16 | number << 8
            lines.append(f"nexthop replace id {known} {via} proto 138")
        if self._chance.random() < 0.3:
            where = f"dev {device} dst {endpoint(family, other)} self permanent"
            self._bridge(f"fdb replace {mac(family, number)} {where}")
        else:
            self._ip(family, self._chance.choice(lines))

    def rogue(self, family: int) -> None:
        number, device = 2000 + self._number(), DEVICE[family]
        lines = [
            f"route add {subnet(family, number)} dev {device}",
            f"route add {subnet(family, self._number())} dev {device} metric 77",
            f"neigh add {address(family, number)} lladdr {mac(family, 1)} dev {device}",
            f"nexthop add id {0x5A000000 | number << 8} via {address(4, 9)} dev {DEVICE[4]} onlink "
            "proto 138",
        ]
        where = f"dev {device} dst {endpoint(family, 9)} self permanent"
        if self._chance.random() < 0.4:
            word, lladdr = self._chance.choice(
                [("add", mac(family, number)), ("append", mac(family, self._number()))]
            )
            self._bridge(f"fdb {word} {lladdr} {where}")
        else:
            self._ip(family, self._chance.choice(lines))

    def foreign_churn(self, family: int) -> None:
        prefix = "203.0.113" if family == 4 else "2001:db8:8:"
        bits = 32 if family == 4 else 128
        dot = "." if family == 4 else ":"
        routes = [f"{prefix}{dot}{number}/{bits}" for number in range(1, 30)]
        inside = subnet(family, 3000 + self._number())
        self._ip(
            family,
            *(f"route add {route} dev other0 proto static" for route in routes),
            f"route add {inside} dev other0 proto static",
            f"neigh add {prefix}{dot}99 lladdr 02:bb:bb:bb:bb:bb dev other0",
            "link set other0 mtu 1400",
            "link set other0 mtu 1500",
            f"neigh del {prefix}{dot}99 dev other0",
            f"route del {inside} dev other0",
            *(f"route del {route} dev other0" for route in routes),
        )

    # ---- devices

    def flap(self, family: int) -> None:
        self._ip(family, f"link set {DEVICE[family]} down", f"link set {DEVICE[family]} up")

    def down(self, family: int) -> None:
        self._ip(family, f"link set {DEVICE[family]} down")

    def rename(self, family: int) -> None:
        self._ip(family, f"link set {DEVICE[family]} name renamed{family}")

    def new_mac(self, family: int) -> None:
        self._ip(family, f"link set {DEVICE[family]} address {mac(family, 3000)}")

    def new_mtu(self, family: int) -> None:
        self._ip(family, f"link set {DEVICE[family]} mtu {self._chance.randrange(1280, 1400)}")

    def overlay_address(self, family: int) -> None:
        self._ip(family, f"address flush dev {DEVICE[family]}")

    def delete_device(self, family: int) -> None:
        self._ip(family, f"link del {DEVICE[family]}")

    def underlay_flap(self, family: int) -> None:
        host = self._host
        self._ip(family, "link set eth0 down", "link set eth0 up")
        # IPv6 addresses go when a device goes down.
        self._ip(6, f"address replace {host.ipv6}/64 dev eth0 nodad")

    def underlay_address(self, family: int) -> None:
        host, bits = self._host, 24 if family == 4 else 64
        nodad = "nodad" if family == 6 else ""
        text = f"{host.underlay(family)}/{bits} dev eth0"
        self._ip(family, f"address del {text}", f"address add {text} {nodad}")

    def underlay_mtu(self, family: int) -> None:
        self._ip(family, "link set eth0 mtu 1450", "link set eth0 mtu 1500")

    def _ip(self, family: int, *lines: str) -> None:
        self._batch("ip", f"-{family}", lines)

    def _bridge(self, *lines: str) -> None:
        self._batch("bridge", "-s", lines)

    def _batch(self, program: str, option: str, lines: tuple[str, ...]) -> None:
        """Failures are as good as successes: what is to be deleted may be gone."""
        subprocess.run(
            [program, option, "-n", self._host.ns, "-force", "-batch", "-"],
            input="\n".join(lines) + "\n",
            text=True,
            capture_output=True,
            check=False,
        )


def litter(host: Any) -> None:
    """What others have here: it stays."""
    for name in ("other0", "other1"):
        stranger(host, name)
    host.ip("link add vx9 type vxlan id 9 dev eth0 local 192.0.2.1 dstport 4789 nolearning")
    host.ip("link set vx9 addrgenmode none up")
    host.ip(f"nexthop add id {0x5A000001} dev other1 proto static")
    for family in (4, 6):
        for number in range(4000, 4020):
            host.ip(f"-{family} route add {subnet(family, number)} dev other1 proto static")
            host.ip(f"neigh add {address(family, number)} lladdr {mac(family, 1)} dev other1")
        host.ip(f"-{family} rule add from {subnet(family, 4000)} lookup 100")
    host.bridge(f"fdb add {mac(4, 1)} dev vx9 dst 192.0.2.9 self permanent")


def unclean(host: Any, wanted: dict[int, State]) -> str:
    """What differs, for a person to look at."""
    text = [host.ip("-d link show"), host.ip("nexthop show")]
    for family in wanted:
        try:
            found = observed(host, family)
        except (AssertionError, KeyError) as error:
            text.append(f"IPv{family}: {error}")
            continue
        for table, entries in wanted[family].items():
            more, less = sorted(found[table] - entries), sorted(entries - found[table])
            if more or less:
                text.append(f"IPv{family} {table}: +{more[:3]}.. -{less[:3]}.. of {len(less)}")
    return "\n".join(text[2:] + text[:1])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_random_hostile_edits(host: Any) -> None:
    litter(host)
    leases = [lease_of(host), *peers(range(1, PEERS + 1))]
    wanted = {family: expected(leases[1:], family) for family in (4, 6)}
    vandal = Vandal(host, SEED)

    def clean() -> bool:
        try:
            return all(observed(host, family) == wanted[family] for family in wanted)
        except (AssertionError, KeyError):  # a rogue entry that has not its usual form
            return False

    with Watched(plane(host), Script(leases)) as watched:
        wait_until(clean)
        foreign = everything(host, *DEVICE.values())
        gc.collect()
        before = descriptors(), threading.active_count()
        for _ in range(ROUNDS):
            for _ in range(EDITS):
                vandal.edit()
            try:
                wait_until(clean)
                wait_until(lambda: not watched.status.problems)
            except AssertionError as error:
                error.add_note(f"{watched.status}\n{unclean(host, wanted)}\n{vandal.history[-40:]}")
                raise
            assert everything(host, *DEVICE.values()) == foreign, vandal.edits
        gc.collect()
        wait_until(lambda: (descriptors(), threading.active_count()) == before)
        with plane(host) as fresh:
            assert fresh.plan(leases).is_empty
        status = watched.status

    assert len(vandal.edits) == 15, "there was some of everything"
    assert status.audits <= status.failures, "events did it, and attempts after a failure"
    assert status.syncs == 1
    assert status.ready
    assert sum(status.drift.values()) > 100
    assert everything(host, *DEVICE.values()) == foreign
    assert clean(), "and it stays when the agent has ended"
