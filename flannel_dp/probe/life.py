"""What is known of a peer that is probed again and again: values."""

from __future__ import annotations

from msgspec import Struct

#: By the constants LIFE_* of the C unit.
LIVES = ("new", "alive", "lossy", "dead")


class PeerLife(Struct, frozen=True):
    """One peer as its probes show it.

    ``life`` is "new" (no answer yet, and not for long), "alive", "lossy" (alive, and more than
    15 % of the probes are lost, all of some source ports, or all that are as large as the device
    takes) or "dead". ``path`` is "tunnel" or
    "direct". ``rtt`` is the smoothed round trip in seconds, ``loss`` the smoothed share that is
    lost, ``last_answer`` how many seconds ago the last answer came (None: never). ``dead_paths``
    are the numbers of source ports that get no answer, of ``paths``; ``lost_size`` is the size in
    bytes of packets that are lost where smaller ones are not, 0 for none: the device's MTU.
    ``path_mtu`` is the size in bytes of the largest packet that came back, where it is known
    (0: not yet), and ``mtu`` the device's.
    """

    family: int
    subnet: str
    endpoint: str
    mac: str
    device: str
    path: str
    life: str
    rtt: float | None
    loss: float
    sent: int
    answered: int
    last_answer: float | None
    paths: int
    dead_paths: tuple[int, ...] = ()
    lost_size: int = 0
    path_mtu: int = 0
    mtu: int = 0

    @property
    def alive(self) -> bool:
        """Whether packets come back."""
        return self.life in ("alive", "lossy")

    @property
    def is_narrow(self) -> bool:
        """Whether the path is known to take less than the device's MTU."""
        return 0 < self.path_mtu < self.mtu

    @property
    def described(self) -> str:
        """What is wrong, in words; "" for nothing."""
        if self.life == "dead":
            ago = f"for {self.last_answer:.1f} s" if self.last_answer is not None else "ever"
            return f"no probe has come back {ago}"
        if self.life != "lossy":
            return ""
        if self.lost_size:
            known = f"its path takes {self.path_mtu} bytes" if self.is_narrow else ""
            lost = f"packets of {self.lost_size} bytes are lost"
            return f"{lost}, {known or 'and smaller ones are not'}"
        if self.dead_paths:
            return f"{len(self.dead_paths)} of {self.paths} source ports get no answer"
        return f"{100 * self.loss:.0f} % of the probes are lost"


class LifeChange(Struct, frozen=True):
    """A peer whose ``life`` was ``before`` and is another one now."""

    peer: PeerLife
    before: str


class MtuChange(Struct, frozen=True):
    """A peer whose path takes less than the device's MTU, or another size than before, or again
    what the device does: ``peer.path_mtu``."""

    peer: PeerLife


class Totals(Struct, frozen=True):
    """Counts of all peers: by life, and by family and life; probes ``sent`` and ``answered`` so
    far; ``trips`` are the round trips by bucket of ``flannel_dp._core.TRIP_BOUNDS`` (and one more),
    ``trip_sum`` their sum in seconds. ``interval`` is the longest between two probes of a peer."""

    lives: dict[int, dict[str, int]]
    sent: int
    answered: int
    trips: tuple[int, ...]
    trip_sum: float
    interval: float

    def count(self, *lives: str) -> int:
        """Return how many peers are in one of these."""
        return sum(by.get(life, 0) for by in self.lives.values() for life in lives)
