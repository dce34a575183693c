"""One writer per device and network namespace, by flock(2).

The lock is the kernel's, not the file's: a killed process lets go of it, and a file
left behind means nothing. Every user who may open a file may lock it, so that it has mode 0600 in a
directory of 0700. Its holder unlinks it when the lock is released. Between another process's open
and its flock the name can come to mean a second file, so the lock counts only if the name still
means the file that was locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from flannel_dp.errors import Busy, ConfigError, KernelError, NotPermitted, kernel_error, require
from flannel_dp.kernel.netns import NetNS, check_netns, netns_identity

DEFAULT_DIRECTORY = "/run/flannel-dp"
#: Beside the locks: what a process of this namespace leaves to the next one.
NOTES = (".lease", ".store")
#: So many characters of the holder's command are shown.
_COMMAND = 120
_ELSEWHERE = "name a directory that can be written: --run-dir, or run_dir= of DataPlane"
#: Attempts to lock a file that other processes release meanwhile.
_ATTEMPTS, _PAUSE = 100, 0.001


class DeviceLock:
    """Holds ``device`` (a name such as ``flannel.1``) in ``netns`` while entered.

    The file is ``DIRECTORY/INODE-DEVICE.lock``, INODE being that of the namespace, so
    that two names of one namespace give one lock; it holds the owner's process id, which
    Busy names with the command of that process.
    Equivalent: ``flock -n FILE COMMAND``.

    Entering raises Busy, naming the holder, when another process (or another DeviceLock
    of this one) has it; NotPermitted or KernelError, naming the directory or file, when
    it cannot be made; ConfigError when ``device`` is no device name or ``netns`` is not
    there.
    """

    def __init__(
        self, device: str, netns: NetNS = None, directory: str = DEFAULT_DIRECTORY
    ) -> None:
        require(isinstance(device, str), "device", device, "a name as 'ip link' prints it")
        check_netns(netns)
        if device in ("", ".", "..") or "/" in device or "\0" in device:
            raise ConfigError(
                f"{device!r} cannot be a device name", hint="give it as 'ip link' prints it"
            )
        self.device = device
        self.directory = directory
        self._netns = netns
        self._fd: int | None = None
        self._locked, self._process = "", 0

    @property
    def path(self) -> str:
        """The lock file of this device in this namespace."""
        return f"{self.directory}/{netns_identity(self._netns)[1]}-{self.device}.lock"

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def __enter__(self) -> DeviceLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or raise; taking it twice through one object raises Busy as well."""
        if self._fd is not None:
            raise self._busy(str(os.getpid()))
        path, holder = self.path, ""
        for _ in range(_ATTEMPTS):
            fd = self._open(path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _means(path, fd):
                    with suppress(OSError):  # a full disk: Busy cannot name this process then
                        os.ftruncate(fd, 0)
                        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    self._fd, self._locked, self._process = fd, path, os.getpid()
                    return
            except OSError as error:
                holder = _holder(fd)
                os.close(fd)
                if error.errno != errno.EWOULDBLOCK:
                    raise kernel_error(error.errno or errno.EIO, f"lock {path}") from error
                if holder and os.path.exists(f"/proc/{holder}"):
                    break
                time.sleep(_PAUSE)  # one that removes a file without a holder has it for a moment
            else:
                os.close(fd)
        raise self._busy(holder) from None

    def taken(self) -> Busy | None:
        """Return the error that ``acquire`` would raise because another object has the lock, None
        where it is free. Makes no file. ``flock -n -s FILE true``."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._busy(_holder(fd))
        finally:
            os.close(fd)
        return None

    def release(self) -> None:
        """Release the lock and remove its file; does nothing when it is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            if self._process == os.getpid():  # a forked process shares the lock: it is not its own
                with suppress(OSError):
                    os.unlink(self._locked)
        finally:
            os.close(fd)

    @property
    def _what(self) -> str:
        """What is locked: a device, or a network in which there is none."""
        return self.device if self.device.startswith("host-gw-") else f"device {self.device}"

    def _busy(self, holder: str) -> Busy:
        who = f"process {holder}" if holder else "another process"
        if holder and (command := _command(holder)):
            who = f"{who} ({command})"
        return Busy(
            f"{self._what} is held by {who}",
            hint="one instance works on a device at a time: stop that one, or wait for it",
        )

    def _open(self, path: str) -> int:
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            if self.directory == DEFAULT_DIRECTORY:  # made by an earlier version, with 0755
                _close_to_others(self.directory)
        except OSError as error:
            raise _not_made(error, f"make lock directory {self.directory}") from error
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
            if os.fstat(fd).st_mode & 0o077:  # every user who may open it may lock it
                with suppress(OSError):
                    os.fchmod(fd, 0o600)
            return fd
        except OSError as error:
            raise _not_made(error, f"open lock file {path}") from error


class DeviceLocks:
    """The locks of several devices in ``netns``, each taken once and kept until ``release``."""

    def __init__(self, netns: NetNS = None, directory: str = DEFAULT_DIRECTORY) -> None:
        self.netns, self.directory = netns, directory
        self._held: dict[str, DeviceLock] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """The devices whose locks are held."""
        return (*self._held,)

    def take(self, devices: Iterable[str]) -> None:
        """Take the locks that are not held yet; raises as ``DeviceLock``, and then takes none."""
        fresh: dict[str, DeviceLock] = {}
        try:
            for name in devices:
                if name not in self._held and name not in fresh:
                    lock = DeviceLock(name, self.netns, self.directory)
                    lock.acquire()
                    fresh[name] = lock
        except BaseException:
            for lock in fresh.values():
                lock.release()
            raise
        self._held |= fresh

    def taken(self, devices: Iterable[str]) -> Busy | None:
        """Return the error that ``take`` would raise because another instance has one of them."""
        fresh = (name for name in devices if name not in self._held)
        found = (DeviceLock(name, self.netns, self.directory).taken() for name in fresh)
        return next(filter(None, found), None)

    def release(self) -> None:
        """Release all of them."""
        while self._held:
            self._held.popitem()[1].release()


def remove_unheld(path: str | os.PathLike[str]) -> bool:
    """Remove a lock file unless a process holds its lock. Return whether it was removed.

    ``flock -n FILE rm FILE``. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _means(os.fspath(path), fd):
            os.unlink(path)
            return True
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
    return False


def has_other_notes(directory: str, netns: NetNS = None) -> bool:
    """Return whether something other than locks, and notes of this namespace, is there.

    Locks that no process holds are removed on the occasion.
    """
    own, found = f"{netns_identity(netns)[1]}-", False
    with suppress(OSError):
        for name in os.listdir(directory):
            if name.endswith(".lock"):
                with suppress(OSError):
                    remove_unheld(f"{directory}/{name}")
            elif (
                name != "bpf"
                and not _is_told(name)
                and not (name.startswith(own) and name.endswith(NOTES))
            ):
                found = True
    return found


def _is_told(name: str) -> bool:
    """Return whether a file is the socket or the history of an agent."""
    return ".sock" in name or ".history" in name


def has_pins(run_dir: str) -> bool:
    """Return whether there may be pins of ours on a bpffs: False only where there are none.

    :mod:`flannel_dp.bpf.pins` knows; this is for a sync that has no use for it, which takes less
    time than that import.
    """
    places = dict.fromkeys(("/sys/fs/bpf", f"{run_dir}/bpf", f"{DEFAULT_DIRECTORY}/bpf"))
    every = (*places, *(f"/proc/1/root{place}" for place in places))
    return any(has_entries(f"{place}/flannel-dp") for place in every)


def has_entries(path: str) -> bool:
    """Return whether something is in a directory; False where it is not there, or not for us to
    see."""
    try:
        return bool(os.listdir(path))
    except OSError:
        return False


def _not_made(error: OSError, operation: str) -> KernelError:
    code = error.errno or errno.EIO
    if code in (errno.EACCES, errno.EPERM):
        return NotPermitted(code, operation, hint=f"run as root, or {_ELSEWHERE}")
    return KernelError(code, operation, hint=_ELSEWHERE)


def _means(path: str, fd: int) -> bool:
    """Return whether the file at ``path`` is the open one."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _holder(fd: int) -> str:
    """Return the process id in a lock file, "" when there is none (yet)."""
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return text if text.isdecimal() else ""


def _command(holder: str) -> str:
    """The command of a process, as ps(1) prints it; "" when it is not known."""
    try:
        with open(f"/proc/{holder}/cmdline", "rb") as file:
            words = file.read(4096).rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    text = b" ".join(words).decode("utf-8", "replace")[:_COMMAND]
    return "".join(one if one.isprintable() else "?" for one in text)


def _close_to_others(directory: str) -> None:
    status = os.stat(directory)
    if status.st_mode & 0o077 and status.st_uid == os.geteuid():
        os.chmod(directory, 0o700)
