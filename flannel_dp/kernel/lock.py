"""One writer per device and network namespace, by flock(2).

The lock is the kernel's, not the file's: a killed process lets go of it, and a file
left behind means nothing. Every user who may open a file may lock it, so that it has mode 0600 in a
directory of 0700. It is never unlinked, because between another process's
open and its flock the name could come to mean a second file, and both would hold "the"
lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

from flannel_dp.errors import Busy, ConfigError, KernelError, NotPermitted, kernel_error
from flannel_dp.kernel.netns import NetNS, netns_identity

DEFAULT_DIRECTORY = "/run/flannel-dp"
#: So many characters of the holder's command are shown.
_COMMAND = 120


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
        if device in ("", ".", "..") or "/" in device or "\0" in device:
            raise ConfigError(
                f"{device!r} cannot be a device name", hint="give it as 'ip link' prints it"
            )
        self.device = device
        self.directory = directory
        self._netns = netns
        self._fd: int | None = None

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
        path = self.path
        fd = self._open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = _holder(fd)
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                raise self._busy(holder) from None
            raise kernel_error(error.errno or errno.EIO, f"lock {path}") from error
        self._fd = fd

    def release(self) -> None:
        """Release the lock; does nothing when it is not held."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def _busy(self, holder: str) -> Busy:
        who = f"process {holder}" if holder else "another process"
        if command := _command(holder):
            who = f"{who} ({command})"
        return Busy(
            f"device {self.device} is held by {who}",
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


def _not_made(error: OSError, operation: str) -> KernelError:
    code = error.errno or errno.EIO
    if code in (errno.EACCES, errno.EPERM):
        return NotPermitted(code, operation, hint="run as root, or name a directory of your own")
    return KernelError(code, operation, hint="name a directory that can be written")


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
