"""Where our maps and programs are pinned: a directory on a bpffs for each device.

``ROOT/flannel-dp/NAMESPACE-DEVICE``, ROOT being a bpffs. A pin holds its map or program
when no process does, which is how they outlive their loader; unlinking lets go.
They do not outlive the kernel: after a reboot there is nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from flannel_dp._core import BpfMap
from flannel_dp.errors import FlannelDPError, KernelError, NotPermitted, kernel_error
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, call_in_netns, netns_identity

#: linux/magic.h; ``_compile.py`` has its own, as it can import nothing of this package.
BPFFS_MAGIC = 0xCAFE4A11
OWN_MOUNT = f"{DEFAULT_DIRECTORY}/bpf"
SYSTEM_MOUNT = "/sys/fs/bpf"
FOLDER = "flannel-dp"

_SO_NETNS_COOKIE = 71
_INIT_ROOT = "/proc/1/root"


def pin_directory(
    device: str, netns: NetNS = None, create: bool = False, *, run_dir: str = DEFAULT_DIRECTORY
) -> Path:
    """Return the directory of ``device``'s pins, which is made, its bpffs too, if ``create`` is
    set.

    Of the visible bpffs the one that has the directory is used, else the first: the
    system's, or one of our own. `ip netns exec` gives each command a mount namespace
    whose /sys is fresh and whose mounts vanish with it, so that both are searched in
    process 1's namespace as well, and made there, below ``run_dir``. Without a bpffs, and
    without ``create``, the path is where it would be.

    Raises NotPermitted or KernelError where it cannot be made, ConfigError for ``netns``.
    Equivalent: ``mount -t bpf bpf /run/flannel-dp/bpf; mkdir -m 700 ...``.
    """
    name = f"{FOLDER}/{namespace_key(netns)}-{encode(device)}"
    roots = find_roots(run_dir)
    for root in roots:
        try:
            if (root / name).is_dir():
                return root / name
        except OSError as error:
            raise _failure(error, f"look for {root / name}") from error
    if not create:
        return (roots[0] if roots else Path(own_mount(run_dir))) / name
    root = roots[0] if roots else mount_bpffs(run_dir)
    try:
        (root / FOLDER).mkdir(0o700, exist_ok=True)
        (root / name).mkdir(0o700, exist_ok=True)
    except OSError as error:
        raise _failure(error, f"make {root / name}") from error
    return root / name


def own_mount(run_dir: str) -> str:
    """Return where a bpffs of our own is mounted."""
    return OWN_MOUNT if run_dir == DEFAULT_DIRECTORY else f"{run_dir}/bpf"


def find_roots(run_dir: str = DEFAULT_DIRECTORY) -> list[Path]:
    """Return every bpffs that pins of ours may be on, the preferred one first; that of the default
    ``run_dir`` too, where an instance that was started without one has them."""
    places = dict.fromkeys((SYSTEM_MOUNT, own_mount(run_dir), OWN_MOUNT))
    seen: dict[int, Path] = {}
    for path in [*places, *(_INIT_ROOT + place for place in places)]:
        if filesystem(path) == BPFFS_MAGIC:
            with contextlib.suppress(OSError):
                seen.setdefault(os.stat(path).st_dev, Path(path))
    return list(seen.values())


def has_others(netns: NetNS, devices: Iterable[str], run_dir: str = DEFAULT_DIRECTORY) -> bool:
    """Return whether there are pins for other namespaces or devices than these."""
    key = namespace_key(netns)
    ours = {f"{key}-{encode(device)}" for device in devices}
    with contextlib.suppress(OSError):
        for root in find_roots(run_dir):
            folder = root / FOLDER
            if folder.is_dir() and not ours.issuperset(os.listdir(folder)):
                return True
    return False


def mount_bpffs(run_dir: str = DEFAULT_DIRECTORY) -> Path:
    """Mount a bpffs of our own, for process 1 and for us to see, and return where.

    Done by a process that lives only for that, because a mount namespace is entered by
    whole processes. Raises NotPermitted (CAP_SYS_ADMIN), KernelError.
    """
    from flannel_dp.bpf.helper import call_helper  # rarely needed: imports subprocess

    elsewhere, place = not _same_mounts(), own_mount(run_dir)
    try:
        call_helper({"do": "mount", "at": place, "init": elsewhere})
    except KernelError:
        if not elsewhere:
            raise
        # A container may not enter the namespace of a process 1 that is not its own.
        call_helper({"do": "mount", "at": place, "init": False})
    roots = find_roots(run_dir)
    if not roots:
        raise KernelError(errno.ENODEV, f"mount a bpffs at {place}")
    return roots[0]


def _same_mounts() -> bool:
    try:
        return os.readlink("/proc/1/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return True


def remove(directory: Path, *names: str) -> list[str]:
    """Unlink pins in ``directory``, all or those of ``names``, then it, if nothing is left.

    Returns the names of what was there. What is gone already is no error; what was not
    pinned by us stays only because of its name. Raises NotPermitted, KernelError.
    """
    gone = []
    try:
        for path in sorted(directory.iterdir()):
            if names and path.name not in names:
                continue
            with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                path.rmdir() if path.is_dir() else path.unlink()
                gone.append(path.name)
        with contextlib.suppress(OSError):
            directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _failure(error, f"remove pins in {directory}") from error
    return gone


def open_map(path: Path, type: int, key_size: int, value_size: int) -> BpfMap | None:
    """Return the map that is pinned at ``path``; None where nothing is.

    Raises Conflict where another object is pinned: a map of another type, or no map.
    Equivalent: ``bpftool map show pinned PATH``.
    """
    try:
        found = BpfMap.open(path)
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        if os.path.isdir(path):
            raise foreign(path, "a directory is there") from error
        raise
    kind = kind_of(found)
    if kind != "bpf-map":
        raise foreign(path, f"a {kind} is pinned there")
    has = (found.type, found.key_size, found.value_size)
    if has != (type, key_size, value_size):
        raise foreign(
            path,
            f"the map {found.name or found.id} there is of type {has[0]} with keys of {has[1]} and "
            f"values of {has[2]} bytes, not of type {type} with {key_size} and {value_size}",
        )
    return found


def kind_of(opened: BpfMap) -> str:
    """Return what a descriptor that came from a pin is: "bpf-map", "bpf-prog" or "bpf-link"."""
    return os.readlink(f"/proc/self/fd/{opened.fileno()}").rpartition(":")[2].strip("[]")


def foreign(path: Path, why: str) -> FlannelDPError:
    """Return the Conflict for what holds the place of a pin of ours."""
    error = kernel_error(errno.EEXIST, f"use the pin {path}", why)
    error.hint = f"it is not ours: see 'bpftool map show pinned {path}', and remove it by hand"
    return error


def namespace_key(netns: NetNS = None) -> str:
    """Return a name for a network namespace that no other has until the next boot, with Linux 5.14.

    Before there was a cookie (SO_NETNS_COOKIE) it is made of the inode, whose number is
    used again when the namespace is gone.
    """
    cookie = call_in_netns(netns, _cookie)
    return f"c{cookie}" if cookie else f"i{netns_identity(netns)[1]}"


def _cookie() -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        try:
            raw = asked.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError:
            return 0
    return int(struct.unpack("=Q", raw)[0])


def encode(device: str) -> str:
    """Return a device's name without dots: a bpffs keeps names with one for itself."""
    return device.replace("%", "%25").replace(".", "%2e")


@cache
def _libc() -> ctypes.CDLL:
    """The C library, opened once: each time makes a class."""
    return ctypes.CDLL(None)


def filesystem(path: str) -> int:
    """Return the magic number of the file system at ``path`` (statfs(2)); 0 where there is
    nothing."""
    answer = (ctypes.c_long * 64)()  # struct statfs begins with it
    failed = _libc().statfs(os.fsencode(path), answer)
    return 0 if failed else answer[0] & 0xFFFFFFFF


def _failure(error: OSError, operation: str) -> KernelError:
    code = error.errno or errno.EIO
    if code in (errno.EACCES, errno.EPERM):
        return NotPermitted(code, operation, hint="run as root: a bpffs belongs to it")
    return kernel_error(code, operation)
