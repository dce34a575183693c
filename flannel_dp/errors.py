"""Every error flannel_dp raises on purpose.

::

    FlannelDPError                     .hint says what to do about it
    ├── ConfigError (also ValueError)  net-conf.json, a flag or an interface is wrong
    │   └── NotYet                     an interface, address, route or file does not exist (yet)
    ├── SourceError                    the leases could not be had, or not be trusted
    │   ├── LeaseRejected              this node's lease cannot be used; .reason is its code
    │   ├── Unavailable                missing, unreadable, half-written, not reachable
    │   ├── Compacted                  the history we were following is gone
    │   ├── AuthFailed                 the source does not let us in
    │   └── ShrinkRefused              most peers are missing at once, and were kept
    ├── Busy                           another instance owns this device
    ├── Unsupported                    this machine, or a table of ours, cannot do that
    └── KernelError                    .errno, .operation, .message (the kernel's own)
        ├── Conflict                   another program's object is in our place
        ├── NotPermitted               CAP_NET_ADMIN is missing
        ├── DumpInterrupted            the table kept changing while it was read
        ├── Overrun                    replies were lost (ENOBUFS)
        └── DeviceGone                 the device disappeared meanwhile
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any


class FlannelDPError(Exception):
    """Base of all errors of this package.

    ``hint`` is one sentence that tells the reader what to do; it is part of
    ``str(error)`` after a dash, so that a plain log line carries it. It names parameters, and
    under the command flags (:mod:`flannel_dp.wording`).
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self._message, self._hint = message, hint

    @property
    def message(self) -> str:
        """What is wrong, without the hint."""
        return _worded(self._message, bare=True)

    @property
    def hint(self) -> str:
        """What to do about it, "" where nothing is known."""
        return _worded(self._hint)

    @hint.setter
    def hint(self, hint: str) -> None:
        self._hint = hint

    def __str__(self) -> str:
        return f"{self.message} - {self.hint}" if self.hint else self.message


def _worded(text: str, *, bare: bool = False) -> str:
    """Return the text with flags or parameters, as its reader knows them."""
    if "--" not in text:
        return text
    from flannel_dp.wording import worded

    return worded(text, bare=bare)


class ConfigError(FlannelDPError, ValueError):
    """The network configuration, an option or an interface cannot be used."""


def require(fits: bool, parameter: str, value: object, takes: str) -> None:
    """Raise ConfigError, which names a parameter and its value, unless it ``fits``; ``takes`` says
    in the hint what the parameter takes."""
    if not fits:
        raise ConfigError(f"{parameter} is {shown(value)}", hint=f"{parameter} takes {takes}")


def shown(value: object) -> str:
    """Return a value in a message, whatever its ``repr`` does."""
    try:
        return repr(value)[:120].encode("utf-8", "backslashreplace").decode()
    except Exception:
        return f"a {type(value).__name__}"


class NotYet(ConfigError):
    """Something that the configuration or an option needs does not exist now and may appear
    later: an interface, an address, a default route, a file, a usable configuration in etcd.

    ``flannel-dp sync --watch`` waits for it; every other ConfigError ends it.
    """


class SourceError(FlannelDPError):
    """The leases could not be read, or what was read cannot be trusted."""


class LeaseRejected(SourceError):
    """The one lease that could be this node's cannot be used; ``reason`` is the code why."""

    def __init__(self, message: str, *, reason: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Unavailable(SourceError):
    """The source is missing, unreadable, half-written or not reachable."""


class Compacted(SourceError):
    """The watched history was compacted; a new list is needed."""


class AuthFailed(SourceError):
    """The source rejected our credentials or permissions."""


class ShrinkRefused(SourceError):
    """A list of leases lacks all or nearly all of the current peers.

    What the list adds and changes was applied; the peers that it lacks are kept. ``report``
    is the Report of that (None where nothing was applied).
    """

    def __init__(self, message: str, *, hint: str = "", report: Any = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


class Busy(FlannelDPError):
    """Another instance holds the lock of this device in this namespace."""


class Unsupported(FlannelDPError):
    """Something was asked for that this kernel, what is installed, or a table cannot do.

    The message names what is missing, and the hint says what to install or to grant. Of
    tables it names the entry that they cannot hold (several destinations of one MAC, a
    ``src_vni``, a route with several paths, ``extern_learn``); nothing was changed then.
    """


class KernelError(FlannelDPError):
    """The kernel rejected an operation.

    ``errno`` is positive, ``operation`` names what was asked of the kernel
    ("add route 10.244.7.0/24"), ``kernel_message`` is the extended
    acknowledgement's text, empty when the kernel gave none.
    """

    def __init__(
        self, errno: int, operation: str, kernel_message: str = "", *, hint: str = ""
    ) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{operation}: {os.strerror(errno)} ({name})"
        if kernel_message:
            text += f": {kernel_message}"
        super().__init__(text, hint=hint)
        self.errno = errno
        self.operation = operation
        self.kernel_message = kernel_message


class Conflict(KernelError):
    """An object that is not ours is where ours would have to be."""


class NotPermitted(KernelError):
    """The process lacks the right to change this network namespace."""


class DumpInterrupted(KernelError):
    """A table kept changing while it was dumped; nothing was planned from it."""


class Overrun(KernelError):
    """The kernel dropped replies or events because we read too slowly."""


class DeviceGone(KernelError):
    """The device an operation was meant for is not there any more."""


_BY_ERRNO: dict[int, tuple[type[KernelError], str]] = {
    _errno.EPERM: (NotPermitted, "run as root or grant CAP_NET_ADMIN"),
    _errno.EACCES: (NotPermitted, "run as root or grant CAP_NET_ADMIN"),
    _errno.EEXIST: (
        Conflict,
        "see what holds the place with 'ip route', 'ip nexthop' or 'ip link'",
    ),
    _errno.ENODEV: (DeviceGone, "sync again: the device is found again or recreated"),
    _errno.ENXIO: (DeviceGone, "sync again: the device is found again or recreated"),
    _errno.EMFILE: (KernelError, "raise the limit on open files (ulimit -n)"),
    _errno.ENFILE: (KernelError, "raise the system's limit on open files (fs.file-max)"),
    _errno.ENOBUFS: (Overrun, "sync again: what was lost is read back first"),
    _errno.EINTR: (DumpInterrupted, "something rewrites this table all the time; try again"),
}


def kernel_error(errno: int, operation: str, kernel_message: str = "") -> KernelError:
    """Build the KernelError subclass that fits ``errno`` (positive), hint included."""
    cls, hint = _BY_ERRNO.get(errno, (KernelError, ""))
    return cls(errno, operation, kernel_message, hint=hint)


#: This process or this machine has no more of something: descriptors, buffers, memory.
SHORTAGES = frozenset({_errno.EMFILE, _errno.ENFILE, _errno.ENOBUFS, _errno.ENOMEM})


def shortage(error: BaseException | None) -> int:
    """Return the errno of SHORTAGES that ``error``, or what it was raised from, stands for; 0 for
    none."""
    while error is not None:
        number = getattr(error, "errno", None)
        if isinstance(error, (OSError, KernelError)) and number in SHORTAGES:
            return int(number or 0)
        error = error.__cause__
    return 0
