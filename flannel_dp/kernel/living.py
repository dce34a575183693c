"""Which network namespaces there are: those of threads, of mounts, and of open descriptors.

The kernel has no list of them (before Linux 6.18), so /proc is read, as lsns(8) does. A namespace
that only a socket keeps is not found: no process can enter that one any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

#: Inode of the first process namespace (PROC_PID_INIT_INO in include/linux/proc_ns.h).
_FIRST_PROCESSES = 0xEFFFFFFC
_PROC = "/proc"
_GONE = (errno.ENOENT, errno.ESRCH, errno.EINVAL)


def sees_all_processes() -> bool:
    """Return whether /proc has every process of this machine, not only those of a container."""
    try:
        return os.stat(f"{_PROC}/self/ns/pid").st_ino == _FIRST_PROCESSES
    except OSError:
        return False


def living_namespaces() -> dict[int, str] | None:
    """Return the network namespaces that there are: inode, and a path to enter by.

    None where this process cannot see all of them: in a container, or without CAP_SYS_PTRACE.
    Equivalent: ``lsns -t net``, and ``ip netns list``.
    """
    if not sees_all_processes():
        return None
    found: dict[int, str] = {}
    mounts: set[str] = set()
    try:
        # The first process last: what others can be entered by as well is entered by them.
        for process in sorted(_numbers(_PROC), key="1".__eq__):
            folder, hides = f"{_PROC}/{process}", process == "1"
            for thread in _numbers(f"{folder}/task"):
                _add(found, f"{folder}/task/{thread}/ns/net", hides)
            for descriptor in _listed(f"{folder}/fd"):
                _add(found, f"{folder}/fd/{descriptor}", hides)
            _add_mounts(found, folder, mounts)
    except PermissionError:
        return None
    return found


def is_process(number: int) -> bool:
    """Return whether there is a process of that number, where all are seen."""
    return not sees_all_processes() or os.path.exists(f"{_PROC}/{number}")


def _numbers(folder: str) -> Iterator[str]:
    yield from (name for name in _listed(folder) if name.isdecimal())


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise


def _add(found: dict[int, str], path: str, hides: bool) -> None:
    """Add what the link at ``path`` names. The first process may be one that ``hides`` it; it is
    in the namespace of the kernel's threads."""
    try:
        link = os.readlink(path)
        number = _inode(link)
        if link == "/":  # of a namespace that is mounted no more, or a directory
            named = os.stat(path)
            number = named.st_ino if named.st_dev == _device() else 0
    except OSError as error:
        if error.errno in _GONE or hides:
            return
        raise
    if number:
        found.setdefault(number, path)


def _add_mounts(found: dict[int, str], folder: str, seen: set[str]) -> None:
    """Add those that are mounted, as ``ip netns add`` does; each mount namespace once."""
    with suppress(OSError):  # without the name the mounts are read, be it once more
        name = os.readlink(f"{folder}/ns/mnt")
        if name in seen:
            return
        seen.add(name)
    try:
        with open(f"{folder}/mountinfo", "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    for line in lines:
        if b" - nsfs " in line:
            # proc_pid_mountinfo(5): the fourth field is what is mounted, the fifth where.
            words = line.split(b" ")
            number = _inode(os.fsdecode(words[3]))
            if number:
                place = words[4].decode("unicode_escape").encode("latin-1")
                found.setdefault(number, f"{folder}/root{os.fsdecode(place)}")


def _device() -> int:
    """Return the device that namespaces' files are on."""
    return os.stat(f"{_PROC}/self/ns/net").st_dev


def _inode(link: str) -> int:
    """Return the inode in ``net:[4026531840]``; 0 for another link."""
    kind, _, rest = link.partition(":[")
    number = rest.removesuffix("]")
    return int(number) if kind == "net" and number.isdecimal() else 0
