"""Compile programs of csrc/bpf, load them and pin them, in a process that lives only for that.

bcc brings LLVM along: over 100 MB, and a compiler inside a process that holds capabilities.
So a helper (``_compile.py``) does it under whichever interpreter of this machine can import
bcc, and what it leaves behind is pinned. Everything else is bpf(2) on those pins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from flannel_dp._core import BpfMap, BpfProgram
from flannel_dp.bpf import pins
from flannel_dp.errors import FlannelDPError, KernelError, Unsupported, kernel_error
from flannel_dp.kernel.capabilities import effective

SCHED_CLS = "sched_cls"
PACKAGE = Path(__file__).resolve().parent

#: A helper that takes longer than this has come to nothing.
SECONDS = 120.0

_SCHED_CLS = 3
_LOG_LINES = 12


class MapPin(Struct, frozen=True):
    """A map that a program uses, and where it is or will be pinned.

    ``type`` is a BPF_MAP_TYPE of linux/bpf.h, sizes are in bytes: what a map that is pinned
    there already has to agree with to be used.
    """

    path: Path
    type: int
    key_size: int
    value_size: int


class ProgramPin(Struct, frozen=True):
    """A program (a function's name in the source is its key), and where it will be pinned.

    ``kind`` is SCHED_CLS, or "raw_tracepoint:NAME": then it is attached to that tracepoint
    of the kernel, the attachment is what is pinned, and unlinking detaches it. One that
    ``needs`` an enum (of ``load``'s ``enums``) is left out where the kernel has no such enum.
    """

    path: Path
    kind: str = SCHED_CLS
    needs: str = ""


def load(
    source_name: str,
    *,
    maps: Mapping[str, MapPin],
    programs: Mapping[str, ProgramPin],
    defines: Mapping[str, str | int] | None = None,
    offsets: Mapping[str, str] | None = None,
    enums: Sequence[str] = (),
) -> dict[str, dict[str, int]]:
    """Compile csrc/bpf/``source_name``.c and pin what is named of it; programs are replaced.

    ``defines`` become definitions for the preprocessor, as does ``NAME_PIN`` for each map: the
    source names it in its BPF_TABLE_PINNED. A map that is pinned already is used with all
    that is in it. ``offsets`` are definitions whose values are read from the running kernel's
    BTF ({"DEVICE_IFINDEX": "net_device.ifindex"}), ``enums`` are enums of the kernel that are
    returned as {name: {enumerator: value}}, empty where this kernel has none of that name;
    where it has, HAS_NAME is defined.

    Nothing half-made is ever found under the names that were given. Takes about half a second.
    Raises Unsupported, which says what is missing (bcc, headers, BTF, a capability, a kernel
    that takes the program), Conflict where something else is pinned in our place, KernelError.
    Equivalent: ``bpftool prog loadall FILE.o DIRECTORY``.
    """
    need_capabilities()
    _check_maps(maps)
    for name, pin in programs.items():
        _check_program(name, pin)
    answer = call_helper(
        {
            "do": "load",
            "source": str(source_path(source_name)),
            "defines": dict(defines or {}),
            "offsets": dict(offsets or {}),
            "enums": list(enums),
            "maps": {name: str(pin.path) for name, pin in maps.items()},
            "programs": {
                name: {"path": str(pin.path), "kind": pin.kind, "needs": pin.needs}
                for name, pin in programs.items()
            },
        }
    )
    _check_maps(maps)
    found: dict[str, dict[str, int]] = answer["enums"]
    return found


def check() -> str:
    """Look for what ``load`` takes, and load nothing: what there is, in words.

    Raises Unsupported, which says what is missing.
    """
    need_capabilities()
    answer = call_helper({"do": "check"})
    return f"bcc {answer['bcc']}, headers {answer['headers']}"


def digest(source_name: str, defines: Mapping[str, str | int] | None = None) -> str:
    """Eight hexadecimal digits that another source or other definitions would change.

    As part of a pin's name it tells whether what is pinned was made of what is here.
    """
    text = source_path(source_name).read_bytes() + json.dumps(dict(defines or {})).encode()
    return hashlib.sha256(text).hexdigest()[:8]


def source_path(source_name: str) -> Path:
    """The C source of a program: beside this module where it was installed, else in csrc/."""
    installed = PACKAGE / "programs" / f"{source_name}.c"
    return installed if installed.exists() else PACKAGE.parents[1] / f"csrc/bpf/{source_name}.c"


def possible_cpus() -> int:
    """How many values an entry of a per-CPU map has (libbpf's libbpf_num_possible_cpus)."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    ends = [part.partition("-") for part in text.strip().split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)


def capabilities_for_pins() -> frozenset[str]:
    """What bpf(2) on descriptors that are open already takes beside CAP_NET_ADMIN: nothing
    from Linux 5.19 on, even with kernel.unprivileged_bpf_disabled (__sys_bpf, commit
    c8644cd0efe7); before, whoever may not load programs may not read their maps either."""
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if release >= (5, 19):
        return frozenset()
    return frozenset({"CAP_BPF"} if release >= (5, 8) else {"CAP_SYS_ADMIN"})


def need_capabilities() -> None:
    """Raise Unsupported where this process lacks what it takes to load a program."""
    held = effective()
    wanted = {"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"}
    if "CAP_SYS_ADMIN" in held:  # which was all of these before Linux 5.8
        wanted = {"CAP_NET_ADMIN"}
    lacking = sorted(wanted - held)
    if lacking:
        raise Unsupported(
            f"loading eBPF programs takes {' and '.join(lacking)}, which this process lacks",
            hint="run as root, or grant them (CapabilityBoundingSet= in systemd)",
        )


def _check_maps(maps: Mapping[str, MapPin]) -> None:
    """Conflict where what is pinned is not such a map."""
    for pin in maps.values():
        pins.open_map(pin.path, pin.type, pin.key_size, pin.value_size)


def _check_program(name: str, pin: ProgramPin) -> None:
    """Conflict where the pin is not a program, or attachment, that may be replaced."""
    if not os.path.lexists(pin.path):
        return
    if pin.path.is_dir():
        raise pins.foreign(pin.path, "a directory is there")
    wanted = "bpf-prog" if pin.kind == SCHED_CLS else "bpf-link"
    kind = pins.kind_of(BpfMap.open(pin.path))
    if kind != wanted:
        raise pins.foreign(pin.path, f"a {kind} is pinned there")
    if kind == "bpf-prog":
        found = BpfProgram.open(pin.path)
        if (found.type, found.name) != (_SCHED_CLS, name[:15]):
            raise pins.foreign(pin.path, f"the program {found.name} is pinned there")


# ---- the helper ----------------------------------------------------------------


def interpreters() -> list[str]:
    """Pythons that may have bcc: this one, the distribution's, the first on the path."""
    found = [sys.executable, "/usr/bin/python3", shutil.which("python3") or ""]
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


def call_helper(request: Mapping[str, Any]) -> dict[str, Any]:
    """Let a helper do ``request``, under each interpreter until one has what it takes.

    Returns its answer. Raises Unsupported, Conflict, NotPermitted, KernelError.
    """
    without = []
    for interpreter in interpreters():
        answer, log = _run(interpreter, request)
        if "refused" not in answer:
            return answer
        if answer["refused"] != "no bcc":
            raise _error(answer, log)
        without.append(f"{interpreter}: {answer['message']}")
    raise _error({"refused": "no bcc", "message": "; ".join(without)}, "")


def _run(interpreter: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """One helper's answer, and what was printed meanwhile."""
    command = [interpreter, "-I", str(PACKAGE / "_compile.py")]
    text = json.dumps({**request, "path": str(PACKAGE.parents[1])})
    kept = ("BCC_KERNEL_SOURCE", "LANG", "PATH", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=text.encode(),
            capture_output=True,
            env=environment,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            errno.ETIMEDOUT, f"load eBPF programs with {interpreter}", f"over {SECONDS:.0f} s"
        ) from error
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"run {interpreter}") from error
    log = done.stderr.decode("utf-8", "replace")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        ended = f"{interpreter} ended with {done.returncode} while loading eBPF programs"
        answer = {"refused": "crash", "message": ended}
    return answer, log


def _error(answer: Mapping[str, Any], log: str) -> FlannelDPError:
    """The typed error for what a helper says that it could not do."""
    kind, message, code = answer["refused"], answer["message"], answer.get("errno") or 0
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    advice = {
        "no bcc": (
            f"bcc, which compiles eBPF programs, is missing: {message}",
            "install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora); PyPI's package named "
            "bcc is something else",
        ),
        "no headers": (
            f"the kernel headers that bcc wants are missing: {message}",
            f"install linux-headers-$(uname -r), or linux-headers-{machine}: any kernel's will do",
        ),
        "no BTF": (
            f"the kernel does not describe its types: {message}",
            "this takes a kernel with CONFIG_DEBUG_INFO_BTF (/sys/kernel/btf/vmlinux)",
        ),
    }
    if kind in advice:
        return Unsupported(advice[kind][0], hint=advice[kind][1])
    lines = [line for line in log.splitlines() if line.strip()][-_LOG_LINES:]
    told = message + (f" ({os.strerror(code)})" if code else "")
    told += "".join(f"\n  {line}" for line in lines)
    if kind == "load" and code == errno.EPERM:
        hint = "grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, or see kernel lockdown in dmesg"
        return Unsupported(f"the kernel does not let us load eBPF programs: {told}", hint=hint)
    if kind in ("compile", "load", "attach", "crash"):
        hint = "report this with the output of 'uname -r' and the version of bcc"
        return Unsupported(f"eBPF programs cannot be loaded: {told}", hint=hint)
    return kernel_error(code or errno.EIO, "pin eBPF programs", message)
