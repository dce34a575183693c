"""A test run leaves nothing behind, however it ends.

As root, a run has mounts of its own: a /run of its own with its network namespaces, locks and
pins. They are gone when the last process of the run is gone, and the kernel sees to that. A
watcher, for which a pipe closes when the run ends, ends processes that outlived it, whether it
came to its end or was killed, and removes the run's temporary files. A run that comes to its end
has to have cleaned up by itself: ``remains`` lists what is left.

Each worker has locks, notes and pins of its own: what a sync finds of other namespaces makes it
look through all processes for namespaces that are gone, and the other workers' are none of its.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

RUN: Final = Path("/run")
NAMESPACES, STATE, PINS = RUN / "netns", RUN / "flannel-dp", RUN / "flannel-dp" / "bpf"

#: What each worker has in the place of STATE, for the process that forked it to see.
WORKERS: Final = RUN / "flannel-dp-workers"

_MARK: Final = "FLANNEL_DP_TEST_RUN"
_CLONE_NEWNS, _MNT_DETACH = 0x20000, 2
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 20
_BPFFS_MAGIC = 0xCAFE4A11

_libc = ctypes.CDLL(None, use_errno=True)


def isolate() -> bool:
    """Give this process, and all that it starts, mounts of their own; False if they had them.

    To be called before there are threads. For anybody but root it does nothing.
    """
    if os.geteuid() != 0 or _MARK in os.environ:
        return False
    _call("unshare", _CLONE_NEWNS)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    while _is_bpffs("/sys/fs/bpf"):  # the machine's; the first one found would be used
        _call("umount2", b"/sys/fs/bpf", _MNT_DETACH)
    _mount("run", str(RUN), "tmpfs", 0)
    NAMESPACES.mkdir()
    _mount(str(NAMESPACES), str(NAMESPACES), "none", _MS_BIND)
    _mount("none", str(NAMESPACES), "none", _MS_SHARED)  # as "ip netns" has it
    PINS.mkdir(parents=True)
    _mount("bpf", str(PINS), "bpf", 0)
    # The folders that pytest gives to tests stay where they are, to look into failures.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="flannel-dp-tests-")
    os.chmod(os.environ["TMPDIR"], 0o755)  # also for tests as another user
    tempfile.tempdir = None  # it is read again
    _watch()
    return True


def isolate_worker() -> None:
    """Give this process, which was forked from one that is isolated, a STATE of its own."""
    if os.geteuid() != 0:
        return
    own = WORKERS / str(os.getpid())
    own.mkdir(mode=0o755, parents=True, exist_ok=True)
    _call("unshare", _CLONE_NEWNS)
    _mount(str(own), str(STATE), "none", _MS_BIND)
    PINS.mkdir(exist_ok=True)
    _mount("bpf", str(PINS), "bpf", 0)


def note_pins() -> None:
    """Let ``remains`` find the pins that a worker leaves, which are gone with it."""
    if os.geteuid() == 0:
        for path in PINS.glob("*/*"):
            (STATE / f"pin {path.parent.name} {path.name}").touch()


def remains() -> list[str]:
    """What this run has not removed: namespaces, locks, notes, pins and processes."""
    folders = (NAMESPACES, STATE, *(WORKERS.iterdir() if WORKERS.exists() else ()))
    found = [str(path) for folder in folders for path in folder.iterdir()]
    found = [path for path in found if not path.endswith(f"/{PINS.name}")]
    found += [str(path) for path in PINS.glob("*/*")]
    mine = {os.getpid(), os.getppid(), _watcher}
    for pid in _processes():
        if pid not in mine:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            found.append(f"process {pid}: {words.decode(errors='replace')}")
    return sorted(found)


_watcher = 0


def _watch() -> None:
    """Start the process that ends what outlives this one."""
    global _watcher
    ended, alive = os.pipe()  # the write end is this process's alone: programs do not inherit it
    _watcher = os.fork()
    if _watcher:
        os.close(ended)
        os.environ[_MARK] = str(_watcher)
        return
    try:
        os.setsid()
        os.close(alive)
        for number in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.environ[_MARK] = str(os.getpid())
        os.read(ended, 1)
        end = time.monotonic() + 60.0
        while (left := _processes()) and time.monotonic() < end:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    finally:
        os._exit(0)


def _processes() -> list[int]:
    """All processes that were started in this run, by the mark in their environment."""
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                environment = Path(entry.path, "environ").read_bytes()
            except OSError:  # it has ended
                continue
            if mark in environment.split(b"\0"):
                found.append(int(entry.name))
    return found


def _is_bpffs(path: str) -> bool:
    answer = (ctypes.c_long * 64)()  # struct statfs, which begins with the kind
    return not _libc.statfs(os.fsencode(path), answer) and answer[0] & 0xFFFFFFFF == _BPFFS_MAGIC


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{arguments}: {os.strerror(code)}")
