"""Run a function in another network namespace without moving the caller there.

Every ``netns=`` argument of this package takes the same values: ``None`` for the
caller's own namespace, a name (``"host1"`` means ``/run/netns/host1``, what
``ip netns add host1`` makes), a path (anything with a slash, such as
``/proc/1234/ns/net``), or an open file descriptor of a namespace.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeAlias, TypeVar

from flannel_dp._core import setns
from flannel_dp.errors import (
    ConfigError,
    KernelError,
    NotPermitted,
    NotYet,
    kernel_error,
    require,
)
from flannel_dp.threads import Thread

NetNS: TypeAlias = str | int | None

NETNS_DIRECTORY = "/run/netns"
OWN_NAMESPACE = "/proc/thread-self/ns/net"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def netns_path(name: str) -> str:
    """Return the file that stands for namespace ``name`` (a name or a path).

    Raises ConfigError when the name is empty, ``.`` or ``..``, or holds a NUL.
    Equivalent: the lookup that ``ip -n NAME`` does.
    """
    if name in ("", ".", "..") or "\0" in name:
        raise ConfigError(
            f"network namespace {name!r} is not a name",
            hint="give a name that 'ip netns list' shows, or a path",
        )
    return name if "/" in name else f"{NETNS_DIRECTORY}/{name}"


def call_in_netns(netns: NetNS, func: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call ``func(*args)`` in ``netns`` and return or raise what it does.

    With ``None`` this is a plain call. Otherwise the call happens on a thread that
    lives only for it: ``setns(2)`` moves one thread, so the caller's thread, and every
    thread started later, stays where it is, and nothing has to be switched back.
    What was opened inside (a netlink socket, a file in /proc/sys/net) stays bound to
    ``netns``. Equivalent: ``ip netns exec NAME ...``, less its mount namespace.

    Raises NotYet when ``netns`` does not exist, ConfigError when it is no network namespace, and
    NotPermitted when the process may not enter it (CAP_SYS_ADMIN).
    """
    if netns is None:
        return func(*args, **kwargs)
    fd = _open(netns)

    def run() -> _R:
        _enter(fd, netns)
        return func(*args, **kwargs)

    try:
        return call_on_thread(run)
    finally:
        os.close(fd)


def enter_netns(netns: str | int) -> None:
    """Move this process there for good; call it before any thread is started.

    For a process that works in one namespace only and gives up the right to enter
    others. Raises as ``call_in_netns``. Equivalent: ``ip netns exec NAME ...``.
    """
    fd = _open(netns)
    try:
        _enter(fd, netns)
    finally:
        os.close(fd)


@contextmanager
def open_netns(netns: NetNS) -> Iterator[int]:
    """Open a descriptor of ``netns`` until the end of the block, -1 for the caller's own.

    Raises ConfigError when there is none of that name.
    """
    if netns is None:
        yield -1
        return
    fd = _open(netns)
    try:
        yield fd
    finally:
        os.close(fd)


def call_on_thread(func: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call ``func(*args)`` on a thread made for it and return or raise what it does.

    For what must not see the caller's thread: its namespace, or its running event loop.
    """
    results: list[_R] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(func(*args, **kwargs))
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=run, name="flannel-dp-call")
    thread.start()
    thread.join()
    if failures:
        # Popped, so that this frame does not keep the error that keeps this frame.
        raise failures.pop()
    return results[0]


def netns_identity(netns: NetNS = None) -> tuple[int, int]:
    """Return ``(st_dev, st_ino)`` of a namespace: equal when two names mean one namespace.

    Source: namespaces(7), "two processes in the same namespace have the same device and
    inode". Equivalent: ``stat -L -c '%d %i' /run/netns/NAME``. Raises as call_in_netns.
    """
    found = call_in_netns(netns, os.stat, OWN_NAMESPACE)
    return found.st_dev, found.st_ino


def check_netns(netns: NetNS) -> None:
    """Raise ConfigError for what can name no namespace."""
    fits = netns is None or isinstance(netns, (str, int))
    require(fits, "netns", netns, "a name, a path, a descriptor or None")


def _open(netns: str | int) -> int:
    """Open ``netns``; a descriptor is duplicated, so that the caller keeps their own."""
    check_netns(netns)
    try:
        if isinstance(netns, int):
            return os.dup(netns)
        return os.open(netns_path(netns), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _open_error(netns, error) from error


def _open_error(netns: str | int, error: OSError) -> ConfigError | KernelError:
    code = error.errno or 0
    if isinstance(netns, int):
        return ConfigError(
            f"file descriptor {netns} is not open, so it names no network namespace",
            hint="pass a descriptor of /proc/PID/ns/net, or a name",
        )
    if code in (errno.ENOENT, errno.ENOTDIR):
        made_by = f"'ip netns add {netns}'" if "/" not in netns else "its owner"
        return NotYet(
            f"network namespace {netns} does not exist ({netns_path(netns)})",
            hint=f"it is made by {made_by}; 'ip netns list' shows those that exist",
        )
    return kernel_error(code, f"open network namespace {netns}")


def _enter(fd: int, netns: str | int) -> None:
    try:
        setns(fd)
    except OSError as error:
        code = error.errno or 0
        if code == errno.EPERM:
            raise NotPermitted(
                code,
                f"enter network namespace {netns}",
                hint="run as root or grant CAP_SYS_ADMIN, or start inside the namespace",
            ) from error
        if code in (errno.EINVAL, errno.EBADF):
            raise ConfigError(
                f"{netns} is not a network namespace",
                hint="a namespace whose 'ip netns add' was interrupted leaves an empty file; "
                "'ip netns delete' removes it",
            ) from error
        raise kernel_error(code, f"enter network namespace {netns}") from error
