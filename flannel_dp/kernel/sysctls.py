"""Read and write ``/proc/sys/net`` of a network namespace.

The files under /proc/sys/net belong to the namespace of the thread that opens them, so
every access goes through ``call_in_netns``. Names are given as path components, because
a device name may hold dots ("flannel.1"), which sysctl(8) would take for separators.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from flannel_dp.errors import ConfigError, KernelError, NotPermitted, kernel_error
from flannel_dp.kernel.netns import NetNS, call_in_netns

ROOT = "/proc/sys/net"

#: No value of /proc/sys is larger than a page.
_MOST = 4096

_FORWARDING = {4: ("ipv4", "ip_forward"), 6: ("ipv6", "conf", "all", "forwarding")}


def read_sysctl(*parts: str, netns: NetNS = None) -> str | None:
    """Return a value without its newline, None when the kernel has no such file.

    ``read_sysctl("ipv6", "conf", "flannel.1", "accept_ra")`` is
    ``sysctl -n net/ipv6/conf/flannel.1/accept_ra``. None is what a kernel without IPv6,
    or a device whose MTU is under 1280 bytes, answers for everything of IPv6.
    Raises ConfigError for a part that is no path component, KernelError (NotPermitted)
    when the file is there and cannot be read.
    """
    path = _path(parts)
    try:
        return call_in_netns(netns, _read, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"read {path}") from error


def write_sysctl(value: str, *parts: str, netns: NetNS = None) -> None:
    """Write ``value``: ``sysctl -w net/PARTS=VALUE``.

    Raises DeviceGone when there is no such file, NotPermitted when it may not be
    written, which is also what a read-only /proc/sys in a container gives.
    """
    path = _path(parts)
    try:
        call_in_netns(netns, _write, path, value)
    except FileNotFoundError as error:
        raise kernel_error(errno.ENODEV, f"write {value} to {path}") from error
    except OSError as error:
        raise _write_error(error, path, value) from error


def can_write_sysctl(*parts: str, netns: NetNS = None) -> bool:
    """Return whether a value exists and can be written; False on a read-only /proc/sys."""
    return call_in_netns(netns, os.access, _path(parts), os.W_OK)


def forwarding_warnings(families: Iterable[int], netns: NetNS = None) -> list[str]:
    """Return a sentence for each family (4 or 6) whose forwarding is off: [] when all is well.

    Without it pods are reached from their own node only. flannel does not set it, and
    this package does not either: it changes how the whole host treats foreign packets.
    Equivalent: ``sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding``.
    """
    found: list[str] = []
    for family in families:
        parts = _FORWARDING[family]
        name = ".".join(("net", *parts))
        value = read_sysctl(*parts, netns=netns)
        if value is None:
            found.append(f"{name} does not exist: this kernel has IPv{family} switched off")
        elif value == "0":
            found.append(
                f"{name} is 0: this node does not forward IPv{family} packets to and from its "
                f"pods; set it with 'sysctl -w {name}=1'"
            )
    return found


def _path(parts: tuple[str, ...]) -> str:
    for part in parts:
        if part in ("", ".", "..") or "/" in part or "\0" in part:
            raise ConfigError(
                f"{part!r} cannot be part of a sysctl name ({'/'.join(parts)!r})",
                hint="give a device name as 'ip link' prints it",
            )
    return "/".join((ROOT, *parts))


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MOST).decode("ascii").strip()
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    # O_CREAT would turn a missing file into EACCES, which says the wrong thing.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode("ascii") + b"\n")
    finally:
        os.close(fd)


def _write_error(error: OSError, path: str, value: str) -> KernelError:
    code = error.errno or errno.EIO
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        name = path.removeprefix("/proc/sys/")
        return NotPermitted(
            code,
            f"write {value} to {path}",
            hint=f"run where /proc/sys may be written, or set it on the host: "
            f"sysctl -w {name}={value}",
        )
    return kernel_error(code, f"write {value} to {path}")
