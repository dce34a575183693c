"""Which program sent a netlink request, by the port that the kernel's event about it names.

A socket's port is the number of its process unless the process has another socket already
(netlink_autobind in net/netlink/af_netlink.c); libnl and pyroute2 add a number above bit 22. What
the kernel chose at random instead says nothing. The number is that of the process in its own PID
namespace, so low ones are looked for in all that /proc shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flannel_dp.kernel.living import sees_all_processes

_PROC = "/proc"

#: Bits of the number of a process in a port (PID_MAX_LIMIT), and the first port of those that the
#: kernel chooses at random.
_BITS, _RANDOM = 22, 1 << 31

#: Numbers below this are given in each PID namespace: they may be those of containers' processes.
_OF_CONTAINERS = 1000

#: So long an answer is good, in seconds, and so many are kept.
_KEPT, _MOST = 10.0, 64

#: So many programs that one number may mean are named.
_NAMED = 3


class _Process(NamedTuple):
    number: int  # in /proc
    name: str
    is_alive: bool


class Programs:
    """Names programs by ports of netlink sockets. For one thread; asked only about what is told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[int, tuple[float, str]] = {}

    def name(self, port: int) -> str:
        """Return ``systemd-networkd (process 712)``, or what else is known of the program that has
        or had the port: ``process 4711 (ended)``. Empty for 0 and where the port says
        nothing. ``/proc/PID/comm``, and ``ss -A netlink -p``."""
        number = _number_of(port)
        if not number:
            return ""
        now = self._clock()
        until, text = self._known.get(port, (now, ""))
        if now < until:
            return text
        text = _told(number, [*_processes(number)])
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[port] = now + _KEPT, text
        return text


def _number_of(port: int) -> int:
    """Return the number of the process that a port stands for; 0 for one that is chosen at
    random."""
    return 0 if port >= _RANDOM else port & ((1 << _BITS) - 1)


def _told(number: int, found: list[_Process]) -> str:
    alive = [one for one in found if one.is_alive]
    if len(alive) == 1:
        return f"{alive[0].name} (process {alive[0].number})"
    if alive:
        names = [*dict.fromkeys(one.name for one in alive)]
        rest = ", ..." if len(names) > _NAMED else ""
        return f"process {number} of a PID namespace (one of {', '.join(names[:_NAMED])}{rest})"
    if found:
        return f"{found[0].name} (process {number}, ended)"
    if not sees_all_processes():
        return f"process {number} (ended, or of another PID namespace)"
    return f"process {number}" if _is_hidden(number) else f"process {number} (ended)"


def _is_hidden(number: int) -> bool:
    """Return whether there is a process that /proc does not show, as with its option hidepid."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return not os.path.exists(f"{_PROC}/{number}/status")


def _processes(number: int) -> Iterator[_Process]:
    """Yield the programs whose number in their own PID namespace this is."""
    if number >= _OF_CONTAINERS:
        one = _read(number, number)
        if one is not None:
            yield one
        return
    try:
        names = os.listdir(_PROC)
    except OSError:
        return
    for name in names:
        if name.isdecimal() and (one := _read(int(name), number)) is not None:
            yield one


def _read(there: int, number: int) -> _Process | None:
    """Return the process of that number in /proc if it is a program whose own number is
    ``number``."""
    try:
        with open(f"{_PROC}/{there}/status", "rb") as file:
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    has_ended = fields.get("State", "").startswith(("Z", "X"))
    if not has_ended and "VmSize" not in fields:
        return None  # a thread of the kernel
    if fields.get("NSpid", str(there)).split()[-1:] != [str(number)]:
        return None
    name = "".join(char if char.isprintable() else "?" for char in fields.get("Name", ""))
    return _Process(there, name, not has_ended)
