"""Hear of changes of one file by its path, whatever happens to the directories above it.

A small use of inotify(7). Libraries that watch files poll a queue every few
milliseconds (watchfiles: every 50); a descriptor that is readable when there is
an event costs nothing while there is none.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_ATTRIB, _CLOSE_WRITE = 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_Q_OVERFLOW = 0x4000
_ONLYDIR, _DONT_FOLLOW, _MASK_ADD = 0x01000000, 0x02000000, 0x20000000

#: A directory on the way: that it goes. What else is in it does not matter, so a busy
#: /tmp wakes no reader.
_WAY = _DELETE_SELF | _MOVE_SELF | _ONLYDIR | _DONT_FOLLOW
#: A directory with a name in it that may change: the file's, a link's, a missing one's.
_ENTRIES = _WAY | _ATTRIB | _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO
#: The file itself, which other names and other mounts may lead to as well.
_FILE = _CLOSE_WRITE | _ATTRIB | _DELETE_SELF | _MOVE_SELF | _DONT_FOLLOW

_LINKS = 40  # as many symbolic links as the kernel follows (path_resolution(7))
_HEAD = struct.Struct("iIII")
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_libc.inotify_rm_watch.argtypes = (ctypes.c_int, ctypes.c_int)

_HINTS = {
    errno.EMFILE: "raise fs.inotify.max_user_instances, or the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
    errno.ENOSPC: "raise fs.inotify.max_user_watches",
    errno.EACCES: "let this user read that directory",
}


def inotify_init1(flags: int) -> int:
    """Return a new inotify descriptor. Raises OSError (EMFILE, ENFILE, ENOMEM)."""
    fd: int = _libc.inotify_init1(flags)
    if fd < 0:
        raise _error("inotify")
    return fd


def watch_hint(error: OSError) -> str:
    """Return what to do about an error of this module; empty where there is nothing to say."""
    return _HINTS.get(error.errno or 0, "")


class FileWatch:
    """A descriptor that becomes readable when a path may lead to something else than before.

    ``arm`` watches every directory that the path leads through now, symbolic links
    included (in a Kubernetes ConfigMap the file is a link into a directory that is
    a link itself), up to the last that exists, and the file. After ``read`` has said
    True: ``arm`` again, and only then read the file, so that nothing is missed.

    inotify does not report changes that another host makes on a network file
    system, and a mount that covers a directory. For one thread. Raises OSError when
    inotify is unavailable, or a directory not be watched (its limits are used up, or
    it cannot be read by us).
    """

    def __init__(self, path: str) -> None:
        if "\0" in path:
            raise OSError(errno.EINVAL, "a null byte in the path", path)
        self._path = path
        self._names: dict[int, set[bytes]] = {}
        self._fd = inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """For poll and ``Inbox.wait``."""
        return self._fd

    def arm(self) -> None:
        """Watch what the path leads through now, and nothing else. Forgets earlier events."""
        for wd in self._names:
            _libc.inotify_rm_watch(self._fd, wd)  # EINVAL: it went with what it watched
        self._names.clear()
        self._events()
        path = self._path if os.path.isabs(self._path) else os.path.join(os.getcwd(), self._path)
        self._add(b"/", _WAY)
        self._walk(b"/", os.fsencode(path).split(b"/")[::-1])

    def read(self) -> bool:
        """Take in what happened; True if it may concern the path."""
        return any(self._concerns(*event) for event in self._events())

    def _walk(self, here: bytes, todo: list[bytes]) -> None:
        """Follow the names in ``todo``, last first, from the real directory ``here``.

        Each is watched before it is read: what comes later is an event.
        """
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                here = os.path.dirname(here)
                continue
            place = os.path.join(here, name)
            if todo and self._add(place, _WAY):
                here = place
                continue
            if not self._add(here, _ENTRIES, name):
                return  # it went meanwhile, and its own watch says so
            target = _target(place)
            if target is None and todo and self._add(place, _WAY):
                here = place  # it came meanwhile
                continue
            if target is None:
                self._add_file(place)
                return
            links += 1
            if links > _LINKS:
                return
            todo += target.split(b"/")[::-1]
            here = b"/" if target.startswith(b"/") else here

    def _add(self, place: bytes, mask: int, *names: bytes) -> bool:
        """Watch a directory, for ``names`` in it too; False if there is none."""
        wd = _libc.inotify_add_watch(self._fd, place, mask | _MASK_ADD)
        if wd >= 0:
            self._names.setdefault(wd, set()).update(names)
            return True
        if ctypes.get_errno() in _GONE:
            return False
        raise _error(os.fsdecode(place))

    def _add_file(self, place: bytes) -> None:
        try:
            self._add(place, _FILE)
        except PermissionError:
            return  # reading it reports that; its directory has an event when it changes

    def _events(self) -> list[tuple[int, int, bytes]]:
        """Return all that is queued: watch, mask, and the name in a directory or nothing."""
        found: list[tuple[int, int, bytes]] = []
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return found
            offset = 0
            while offset < len(data):
                wd, mask, _, length = _HEAD.unpack_from(data, offset)
                offset += _HEAD.size + length
                found.append((wd, mask, data[offset - length : offset].rstrip(b"\0")))

    def _concerns(self, wd: int, mask: int, name: bytes) -> bool:
        if mask & _Q_OVERFLOW:
            return True
        names = self._names.get(wd)
        if names is None:  # of a watch that ``arm`` ended
            return False
        return not name or name in names


def _target(place: bytes) -> bytes | None:
    """Return where a symbolic link leads; None if it is none."""
    try:
        return os.readlink(place)
    except OSError:
        return None


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
