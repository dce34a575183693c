"""Give up privileges: capability sets, the bounding set, core dumps (capabilities(7)).

The system calls go through libc by ctypes. They are per thread: a process has given something
up when each of its threads has, so each of the others is made to by a signal (csrc/threads.c).
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType

from flannel_dp._core import drop_in_thread
from flannel_dp.errors import ConfigError, kernel_error

#: Names and numbers of include/uapi/linux/capability.h. A kernel may know fewer, or more.
KNOWN: Mapping[str, int] = MappingProxyType(
    {
        "CAP_CHOWN": 0,
        "CAP_DAC_OVERRIDE": 1,
        "CAP_DAC_READ_SEARCH": 2,
        "CAP_FOWNER": 3,
        "CAP_FSETID": 4,
        "CAP_KILL": 5,
        "CAP_SETGID": 6,
        "CAP_SETUID": 7,
        "CAP_SETPCAP": 8,
        "CAP_LINUX_IMMUTABLE": 9,
        "CAP_NET_BIND_SERVICE": 10,
        "CAP_NET_BROADCAST": 11,
        "CAP_NET_ADMIN": 12,
        "CAP_NET_RAW": 13,
        "CAP_IPC_LOCK": 14,
        "CAP_IPC_OWNER": 15,
        "CAP_SYS_MODULE": 16,
        "CAP_SYS_RAWIO": 17,
        "CAP_SYS_CHROOT": 18,
        "CAP_SYS_PTRACE": 19,
        "CAP_SYS_PACCT": 20,
        "CAP_SYS_ADMIN": 21,
        "CAP_SYS_BOOT": 22,
        "CAP_SYS_NICE": 23,
        "CAP_SYS_RESOURCE": 24,
        "CAP_SYS_TIME": 25,
        "CAP_SYS_TTY_CONFIG": 26,
        "CAP_MKNOD": 27,
        "CAP_LEASE": 28,
        "CAP_AUDIT_WRITE": 29,
        "CAP_AUDIT_CONTROL": 30,
        "CAP_SETFCAP": 31,
        "CAP_MAC_OVERRIDE": 32,
        "CAP_MAC_ADMIN": 33,
        "CAP_SYSLOG": 34,
        "CAP_WAKE_ALARM": 35,
        "CAP_BLOCK_SUSPEND": 36,
        "CAP_AUDIT_READ": 37,
        "CAP_PERFMON": 38,
        "CAP_BPF": 39,
        "CAP_CHECKPOINT_RESTORE": 40,
    }
)

TASKS = "/proc/self/task"
#: How long a thread may take to handle a signal, and how often new threads are looked for.
_WAIT_MS, _ROUNDS = 10_000, 100

_VERSION_3 = 0x20080522
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """32 of the 64 bits of each set; two of these in a row, the low halves first."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def effective() -> frozenset[str]:
    """Return the capabilities that this thread can use now; ``cap_41`` for one without a known
    name.

    Equivalent: ``capsh --decode=$(sed -n 's/^CapEff://p' /proc/thread-self/status)``.
    """
    return _names(_get()[0])


def drop_capabilities(
    keep: Iterable[str], *, no_new_privs: bool = True, thread: bool = False
) -> frozenset[str]:
    """Give up every capability but ``keep``, for good, and return what is left.

    The effective, permitted and inheritable sets keep nothing else, the ambient set goes
    with them, and the bounding set is reduced, so that programs started by us, also as
    root, get no more. Cutting the bounding set takes CAP_SETPCAP; ``no_new_privs`` limits
    the programs where that is missing, as in a container, and starts set-user-ID
    files without their owner's rights (PR_SET_NO_NEW_PRIVS). Inheritable and ambient ones
    of ``keep`` stay as they are: without them the firewall programs of a process that is
    not root could do nothing. Capabilities that the process has not are no error, and those
    that the kernel does not know are not kept.
    Equivalent: ``setpriv --bounding-set ... --inh-caps ... --no-new-privs``.

    All threads of the process do so, whatever they are waiting for; with ``thread`` the calling
    one alone. Threads that are started later begin with what is left.

    Raises ConfigError for a name that is not in KNOWN, RuntimeError when another thread blocks
    signals, so that it keeps what it has, and KernelError when the kernel rejects it.
    """
    kept = _mask(keep)
    if not thread:
        _drop_in_others(kept, no_new_privs)
    before = _get()
    if before[0] & 1 << KNOWN["CAP_SETPCAP"]:
        _cut_bounding_set(kept)
    # Ambient capabilities that are no longer inheritable go by themselves.
    effective, permitted, inheritable = (held & kept for held in before)
    _set(effective, permitted, inheritable)
    if no_new_privs:
        _prctl("set no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    return _names(effective)


def set_undumpable() -> None:
    """Disable core dumps, and tracing and reading by other processes of this user.

    So no password of a source gets into a file that a crash leaves (PR_SET_DUMPABLE).
    Programs started by us are dumpable again. Raises KernelError when the kernel rejects it.
    """
    _prctl("set dumpable to 0", _PR_SET_DUMPABLE, 0)


def end_with_parent(number: int) -> None:
    """Get signal ``number`` when the process that started this one ends (PR_SET_PDEATHSIG).

    To be called by the main thread. Raises KernelError when the kernel rejects it.
    """
    _prctl("ask for a signal at the parent's end", _PR_SET_PDEATHSIG, number)


def _mask(names: Iterable[str]) -> int:
    mask = 0
    for name in names:
        if name not in KNOWN:
            raise ConfigError(
                f"capability {name!r} is not known",
                hint="give names of capabilities(7), such as CAP_NET_ADMIN",
            )
        mask |= 1 << KNOWN[name]
    return mask


def _names(mask: int) -> frozenset[str]:
    named = {number: name for name, number in KNOWN.items()}
    return frozenset(named.get(n, f"cap_{n}") for n in range(64) if mask >> n & 1)


def _drop_in_others(kept: int, no_new_privs: bool) -> None:
    """Have all other threads drop; again until none is left that one of them has started
    meanwhile."""
    done: set[str] = set()
    for _ in range(_ROUNDS):
        others = {*os.listdir(TASKS)} - {str(threading.get_native_id())}
        fresh = {task for task in others if task not in done or _held_by(task) & ~kept}
        if not fresh:
            return
        for task in fresh:
            try:
                drop_in_thread(int(task), kept, no_new_privs, _WAIT_MS)
            except OSError as error:
                if error.errno != errno.ETIMEDOUT:
                    raise kernel_error(
                        error.errno or errno.EIO, f"drop capabilities of thread {task}"
                    ) from error
                if _held_by(task) & ~kept:
                    raise RuntimeError(
                        f"thread {task} keeps its capabilities: it blocks signals"
                    ) from None
        done |= fresh
    raise RuntimeError("threads keep their capabilities: new ones are started all the time")


def _held_by(task: str) -> int:
    """Return what a thread of this process has, or could pass on, as a mask; 0 when it has
    ended."""
    try:
        with open(f"{TASKS}/{task}/status", encoding="ascii", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields["CapPrm"], 16) | int(fields["CapInh"], 16)


def _cut_bounding_set(kept: int) -> None:
    libc = _libc()
    for number in range(64):
        held = libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)
        if held < 0:  # EINVAL: beyond the last capability of this kernel
            return
        if held and not kept >> number & 1:
            _prctl(f"drop capability {number} from the bounding set", _PR_CAPBSET_DROP, number)


def _get() -> tuple[int, int, int]:
    """Return effective, permitted and inheritable capabilities of this thread, as masks."""
    data = (_Data * 2)()
    header = _CapHeader(_VERSION_3, 0)
    if _libc().capget(ctypes.byref(header), data) != 0:
        raise _failure("read the capabilities")
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def _set(effective: int, permitted: int, inheritable: int) -> None:
    half = 0xFFFFFFFF
    data = (_Data * 2)(
        _Data(effective & half, permitted & half, inheritable & half),
        _Data(effective >> 32, permitted >> 32, inheritable >> 32),
    )
    header = _CapHeader(_VERSION_3, 0)
    if _libc().capset(ctypes.byref(header), data) != 0:
        raise _failure("drop capabilities")


def _prctl(what: str, option: int, value: int) -> None:
    arguments = [ctypes.c_ulong(n) for n in (value, 0, 0, 0)]
    if _libc().prctl(option, *arguments) != 0:
        raise _failure(what)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _failure(what: str) -> Exception:
    return kernel_error(ctypes.get_errno() or errno.EIO, what)
