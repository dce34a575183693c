"""The answer to "what happens to a packet to this address": values, text, JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp._core import Claims, parse_address, parse_prefix
from flannel_dp.cluster.lease import printable
from flannel_dp.later import Later
from flannel_dp.look.terminal import Paint, plain

if TYPE_CHECKING:
    from flannel_dp.look import lives
else:
    lives = Later("flannel_dp.look.lives")

_NO_MAC = "00:00:00:00:00:00"


class Step(Struct, frozen=True):
    """One thing a packet needs: what it should be ("" where nothing says), what the
    kernel has ("" for nothing), whether that is right, and what to do if not."""

    name: str
    wanted: str
    held: str
    ok: bool
    text: str = ""


class Owner(Struct, frozen=True):
    """Whose address it is: a lease, or as much of one as the kernel's entries show."""

    name: str
    subnet: str
    public_ip: str
    mac: str = ""


class Explanation(Struct, frozen=True):
    """The answer to "what happens to a packet to ``address``".

    ``verdict`` is one of "peer" (a pod of another node), "own-subnet", "own-address",
    "peer-endpoint" (another node's public address), "refused" (its lease is not accepted),
    "unclaimed" (inside the network, in no lease), "outside-network", or "unknown" (inside the
    network, and no lease was given). ``way`` is how the kernel would send the packet now: "tunnel",
    "direct", "local" or "none". ``ok`` says that this is as it should be. ``blockers`` are firewall
    rules of other programs that stop such packets, or the tunnel's, as far as rules are kept.
    ``life`` is what an agent's probes say of the peer, where one was asked and probes it."""

    address: str
    family: int
    verdict: str
    summary: str
    way: str
    lease: Owner | None = None
    steps: tuple[Step, ...] = ()
    blockers: tuple[str, ...] = ()
    life: lives.Life | None = None

    @property
    def ok(self) -> bool:
        return all(step.ok for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added."""
        return {"schema": 1, "ok": self.ok, **to_builtins(self)}

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the explanation line by line."""
        yield f"{paint(self.address, 'bold')}: {self.summary}"
        longest = max((len(step.name) for step in self.steps), default=0)
        for step in self.steps:
            mark = paint("ok   ", "green") if step.ok else paint("wrong", "red")
            yield f"  {mark}  {step.name:<{longest}}  {step.held or 'none'}"
            margin = " " * (11 + longest)
            if step.wanted and not step.ok:
                yield f"{margin}should be: {step.wanted}"
            if step.text:
                yield f"{margin}{step.text}"
        yield f"path: {_WAYS[self.way]}"
        if self.life is not None:
            said = f"the agent's probes: {self.life}"
            yield said if self.life.alive else paint(said, "red")
        yield from blocked_lines(self.blockers, paint)

    def __str__(self) -> str:
        return "\n".join(self.lines())


def blocked_lines(blockers: Sequence[str], paint: Paint) -> Iterator[str]:
    """Yield the section about firewall rules of other programs; nothing where there are none."""
    if blockers:
        yield paint("blocked by:", "red")
        yield from (f"  {blocker}" for blocker in blockers)


_WAYS = {
    "tunnel": "tunnel (into the vxlan device)",
    "direct": "direct (over the underlay or another device, not encapsulated)",
    "local": "local (delivered on this node)",
    "none": "none (the kernel has no route for it, or drops it)",
}


def length_of(subnet: str) -> int:
    """Return the length of a prefix in text; 0 for ""."""
    return parse_prefix(subnet)[2] if subnet else 0


def holds(prefix: str, address: str) -> bool:
    """Return whether ``prefix`` holds ``address``; False across families."""
    family, base, length = parse_prefix(prefix)
    number, raw = parse_address(address)
    shift = 8 * len(raw) - length
    return family == number and (
        int.from_bytes(base, "big") >> shift == int.from_bytes(raw, "big") >> shift
    )


def find_holder(claims: Claims, address: str) -> int:
    """Return the number of the claim with the longest subnet that holds ``address``, or -1."""
    lengths = sorted(set(memoryview(claims.lengths).tolist()), reverse=True)
    for length in lengths:
        number = claims.find_subnet(f"{address}/{length}")
        if number >= 0:
            return number
    return -1


def owner_of(claims: Claims, number: int) -> Owner:
    """Return one claim as an Owner."""
    mac = claims.mac(number)
    return Owner(
        printable(claims.name(number)),
        claims.subnet(number),
        claims.endpoint(number),
        "" if mac == _NO_MAC else mac,
    )
