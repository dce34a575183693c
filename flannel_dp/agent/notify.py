"""Notify systemd of the service's state, as sd_notify(3) does: datagrams to ``$NOTIFY_SOCKET``.

The protocol is a stable one of systemd's ("Interface Portability and Stability Promise"):
lines of ``KEY=VALUE`` in one datagram, to a Unix socket with a path or an abstract name.
Other supervisors (podman, s6's notification helpers) speak it, too.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

from flannel_dp.agent.logs import one_line

log = logging.getLogger(__name__)

#: How long one message may wait for a receiver whose queue is full, in seconds.
TIMEOUT = 1.0
#: A status is one line for people; systemd rejects datagrams over 4096 bytes.
STATUS_BYTES = 1000


class Notifier:
    """Sends to ``address`` ("/run/...", or "@name" for an abstract socket); to None, nothing.

    ``watchdog_seconds`` is the interval within which the service manager wants to hear
    ``watchdog=True`` again, None when it does not; send it about twice as often. One
    thread at a time. Nothing raises: a service that cannot notify goes on.
    """

    def __init__(
        self,
        address: str | None = None,
        watchdog_seconds: float | None = None,
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.address = address
        self.watchdog_seconds = watchdog_seconds
        self._clock_ns = clock_ns
        self._socket: socket.socket | None = None
        self._failing = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] | None = None) -> Notifier:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, and remove them.

        They are removed from ``environ`` (``os.environ`` when None) so that programs we
        start do not speak in our name. The watchdog is ours when WATCHDOG_PID is unset
        or our process id, as in sd_watchdog_enabled(3).
        """
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        interval = environ.pop("WATCHDOG_USEC", "")
        owner = environ.pop("WATCHDOG_PID", "")
        if not address:
            return cls()
        if address[0] not in "/@" or len(address) < 2:
            log.warning(
                "NOTIFY_SOCKET %(socket)s is ignored: neither a path nor an abstract name",
                {"socket": address},
            )
            return cls()
        ours = not owner or owner == str(os.getpid())
        return cls(address, _seconds(interval) if ours else None)

    def send(
        self,
        *,
        ready: bool = False,
        status: str | None = None,
        watchdog: bool = False,
        stopping: bool = False,
        reloading: bool = False,
    ) -> bool:
        """Send all of it in one datagram; return whether it was accepted.

        ``ready``: started, or done with reloading. ``status``: one line that ``systemctl
        status`` shows. ``watchdog``: still alive. ``reloading``: reading everything again;
        ``ready`` ends it. ``stopping``: about to end.
        Equivalent: ``systemd-notify --ready --status=TEXT``.
        """
        lines: list[str] = []
        if reloading:
            # The time keeps a READY of before from being taken for the end of this reload.
            lines += ["RELOADING=1", f"MONOTONIC_USEC={self._clock_ns() // 1000}"]
        if ready:
            lines.append("READY=1")
        if stopping:
            lines.append("STOPPING=1")
        if status is not None:
            text = one_line(status).encode()[:STATUS_BYTES]
            lines.append(f"STATUS={text.decode(errors='ignore')}")
        if watchdog:
            lines.append("WATCHDOG=1")
        if self.address is None or not lines:
            return False
        return self._deliver(self.address, "\n".join(lines).encode())

    def close(self) -> None:
        """Close the socket; sending opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _deliver(self, address: str, message: bytes) -> bool:
        # An abstract name begins with a NUL byte (unix(7)), written as @ in the variable.
        name = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else os.fsencode(address)
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.settimeout(TIMEOUT)
            self._socket.sendto(message, name)
        except OSError as error:
            if not self._failing:
                log.warning(
                    "Cannot notify the service manager at %(socket)s: %(error)s",
                    {"socket": address, "error": error},
                )
            self._failing = True
            return False
        self._failing = False
        return True


def _seconds(microseconds: str) -> float | None:
    """Return WATCHDOG_USEC in seconds; None when it is unset, no number, or zero."""
    if not microseconds:
        return None
    if not (microseconds.isascii() and microseconds.isdecimal()) or not int(microseconds[:20]):
        log.warning(
            "WATCHDOG_USEC %(value)s is ignored: not a positive number", {"value": microseconds}
        )
        return None
    return int(microseconds) / 1e6
