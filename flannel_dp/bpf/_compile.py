"""The short-lived process that compiles, loads and pins, and mounts a bpffs.

Run by path, under whichever interpreter can import bcc: it needs that and the standard
library. One JSON object on standard input says what to do, one on standard output what
became of it; what bcc and the verifier print goes to standard error. See ``loader``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

BPFFS_MAGIC = 0xCAFE4A11

_CLONE_NEWNS = 0x00020000
_MOUNT_FLAGS = 2 | 4 | 8  # nosuid, nodev, noexec
_SCHED_CLS, _RAW_TRACEPOINT = 3, 17
_UNFINISHED = "%new"


class Refused(Exception):
    """It cannot be done; by ``kind`` the parent chooses a hint."""

    def __init__(self, kind: str, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.kind, self.code = kind, code


# ---- mounting ------------------------------------------------------------------


def mount(request: dict[str, Any]) -> dict[str, Any]:
    """Mount a bpffs at ``at``, in the mount namespace of process 1 if ``init`` is set."""
    path, libc = request["at"], ctypes.CDLL(None, use_errno=True)
    if request["init"]:
        fd = os.open("/proc/1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        if libc.setns(fd, _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "enter the mount namespace of process 1")
    os.makedirs(path, mode=0o700, exist_ok=True)
    above = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(above, fcntl.LOCK_EX)  # two at a time would hide each other's
    if filesystem(path) != BPFFS_MAGIC and libc.mount(
        b"bpf", os.fsencode(path), b"bpf", _MOUNT_FLAGS, b"mode=0700"
    ):
        raise OSError(ctypes.get_errno(), f"mount a bpffs at {path}")
    return {}


def filesystem(path: str) -> int:
    """Return the magic number of the file system that ``path`` is on; 0 where there is nothing."""
    answer = (ctypes.c_long * 64)()  # struct statfs, which begins with it
    failed = ctypes.CDLL(None).statfs(os.fsencode(path), answer)
    return 0 if failed else answer[0] & 0xFFFFFFFF


# ---- compiling -----------------------------------------------------------------


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Compile ``source``, reuse or make its maps, load its programs, and pin them all.

    What is new is pinned under another name, and renamed when all of it exists: a process
    that is killed half-way leaves nothing under a final name.
    """
    bcc = _bcc()
    answer, flags = _from_btf(request["offsets"], request["enums"])
    flags += [f"-D{name}={value}" for name, value in request["defines"].items()]
    maps: dict[str, str] = request["maps"]
    programs: dict[str, dict[str, str]] = {
        name: one
        for name, one in request["programs"].items()
        if not one["needs"] or answer["enums"][one["needs"]]
    }
    new = [path for path in maps.values() if not os.path.lexists(path)]
    new += [one["path"] for one in programs.values()]
    _unlink(new)
    for name, path in maps.items():
        flags.append(f'-D{name.upper()}_PIN="{path}{_UNFINISHED if path in new else ""}"')
    try:
        with kernel_headers():
            module = _compile(bcc, request["source"], flags)
        for name, one in programs.items():
            _pin(bcc, module, name, one["kind"], one["path"] + _UNFINISHED)
        for path in new:
            os.rename(path + _UNFINISHED, path)
    except BaseException:
        _unlink(new)
        raise
    return answer


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Return whether there is a compiler and what it wants; nothing is loaded."""
    bcc = _bcc()
    with kernel_headers():
        headers = os.environ.get("BCC_KERNEL_SOURCE") or f"Linux {os.uname().release}"
        if headers.startswith(tempfile.gettempdir()):
            headers = os.path.basename(os.path.realpath(f"{headers}/include/generated/../.."))
    return {"bcc": bcc.__version__, "headers": headers}


def _unlink(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + _UNFINISHED)


def _bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise Refused("no bcc", str(error)) from error
    if not hasattr(bcc, "BPF"):  # PyPI has a package of that name that is something else
        raise Refused("no bcc", f"{bcc.__file__} is not the BPF Compiler Collection")
    return bcc


def _from_btf(offsets: dict[str, str], enums: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return offsets as definitions for the compiler, and enums for the answer; an enum that this
    kernel does not have is empty, and ``HAS_NAME`` is not defined."""
    answer: dict[str, Any] = {"enums": {}}
    flags: list[str] = []
    if not offsets and not enums:
        return answer, flags
    from flannel_dp.bpf._btf import Btf

    try:
        types = Btf()
        flags += [f"-D{name}={types.offset(path)}" for name, path in offsets.items()]
    except OSError as error:
        raise Refused("no BTF", f"{error.filename}: {error.strerror}") from error
    except (ValueError, LookupError) as error:
        raise Refused("no BTF", f"not in the kernel's BTF: {error}") from error
    for name in enums:
        try:
            answer["enums"][name] = types.enumerators(name)
            flags.append(f"-DHAS_{name.upper()}")
        except LookupError:
            answer["enums"][name] = {}
    return answer, flags


def _compile(bcc: Any, source: str, flags: list[str]) -> Any:
    with open(source) as file:
        text = file.read()
    ctypes.set_errno(0)
    try:
        return bcc.BPF(text=text, cflags=[*flags, "-Wno-everything"])
    except Exception as error:  # bcc has no other
        raise _failure("compile", f"{os.path.basename(source)}: {error}") from error


def _pin(bcc: Any, module: Any, name: str, kind: str, path: str) -> None:
    """Load one program and pin it; of a tracepoint's the attachment is pinned."""
    point = kind.partition(":")[2]
    ctypes.set_errno(0)
    try:
        loaded = module.load_func(name, _RAW_TRACEPOINT if point else _SCHED_CLS)
    except Exception as error:
        raise _failure("load", str(error)) from error
    fd = loaded.fd
    if point:
        fd = bcc.lib.bpf_attach_raw_tracepoint(fd, point.encode())
        if fd < 0:
            raise _failure("attach", f"tracepoint {point}", -fd)
    failed = bcc.lib.bpf_obj_pin(fd, os.fsencode(path))
    if failed:
        raise _failure("pin", path, -failed)


def _failure(kind: str, message: str, code: int = 0) -> Refused:
    code = ctypes.get_errno() or code
    return Refused(kind, message, code)


# ---- the kernel's headers ------------------------------------------------------


@contextlib.contextmanager
def kernel_headers() -> Iterator[None]:
    """Let bcc find headers: those of the running kernel, or any that are installed.

    bcc wants some for the macros it includes first. No program of ours takes the layout of
    a kernel's struct from them, so it does not matter which kernel's they are.
    """
    running = f"/lib/modules/{os.uname().release}/build/include"
    known = (running, "/sys/kernel/kheaders.tar.xz")
    if os.environ.get("BCC_KERNEL_SOURCE") or any(map(os.path.exists, known)):
        yield
        return
    built = sorted(glob.glob("/usr/src/linux-headers-*/include/generated"), key=_version)
    if not built:
        raise Refused("no headers", f"neither {running} nor /usr/src/linux-headers-*")
    tree = os.path.dirname(os.path.dirname(built[-1]))
    with tempfile.TemporaryDirectory(prefix="flannel-dp-") as merged:
        if os.path.exists(f"{tree}/include/linux/kconfig.h"):
            os.environ["BCC_KERNEL_SOURCE"] = tree
        else:
            _merge(tree, merged)
            os.environ["BCC_KERNEL_SOURCE"] = merged
        yield


def _version(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path)]


def _merge(tree: str, merged: str) -> None:
    """Join Debian's headers: it keeps what is the same for all flavours of a kernel in a second
    tree, which the first one's Makefile names; bcc reads one tree only, so that one is made of
    links."""
    with open(f"{tree}/Makefile") as file:
        found = re.search(r"^include (/\S+)/Makefile$", file.read(), re.MULTILINE)
    if not found:
        raise Refused("no headers", f"{tree} is incomplete")
    for root in (tree, found[1]):
        for path in glob.glob(f"{root}/include/*") + glob.glob(f"{root}/arch/*/include/*"):
            link = merged + path[len(root) :]
            os.makedirs(os.path.dirname(link), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.symlink(path, link)


# ---- the conversation ----------------------------------------------------------


def main() -> None:
    request = json.load(sys.stdin)
    # Whatever bcc and clang print must not get into the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.append(request["path"])
    try:
        answer = {"mount": mount, "load": load, "check": check}[request["do"]](request)
    except Refused as error:
        answer = {"refused": error.kind, "message": str(error), "errno": error.code}
    except OSError as error:
        answer = {"refused": "error", "message": str(error), "errno": error.errno or errno.EIO}
    answers.write(json.dumps(answer))
    answers.close()
    sys.stderr.flush()
    # bcc's own end takes its maps apart one by one; the kernel is quicker.
    os._exit(0)


if __name__ == "__main__":
    main()
