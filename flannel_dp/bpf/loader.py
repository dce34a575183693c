"""Compile programs of csrc/bpf, load them and pin them, in a process that lives only for that.

bcc brings LLVM along: over 100 MB, and a compiler inside a process that holds capabilities.
So a helper process does it (:mod:`flannel_dp.bpf.helper`), and what it leaves behind is
pinned. Everything else is bpf(2) on those pins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from flannel_dp._core import BpfMap, BpfProgram
from flannel_dp.bpf import pins
from flannel_dp.bpf.helper import PACKAGE, call_helper
from flannel_dp.errors import Unsupported
from flannel_dp.kernel.capabilities import effective

SCHED_CLS = "sched_cls"

_SCHED_CLS = 3


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
    """Check for what ``load`` takes, and load nothing. Return what was found, in words.

    Raises Unsupported, which says what is missing.
    """
    need_capabilities()
    answer = call_helper({"do": "check"})
    return f"bcc {answer['bcc']}, headers {answer['headers']}"


def digest(source_name: str, defines: Mapping[str, str | int] | None = None) -> str:
    """Return eight hexadecimal digits that another source or other definitions would change.

    As part of a pin's name it says whether the pinned program was made from this source.
    """
    text = source_path(source_name).read_bytes() + json.dumps(dict(defines or {})).encode()
    return hashlib.sha256(text).hexdigest()[:8]


def source_path(source_name: str) -> Path:
    """Return the C source of a program: beside this module where it was installed, else in
    csrc/."""
    installed = PACKAGE / "programs" / f"{source_name}.c"
    return installed if installed.exists() else PACKAGE.parents[1] / f"csrc/bpf/{source_name}.c"


def capabilities_for_pins() -> frozenset[str]:
    """Return what bpf(2) on descriptors that are open already takes beside CAP_NET_ADMIN: nothing
    from Linux 5.19 on, even with kernel.unprivileged_bpf_disabled (__sys_bpf, commit
    c8644cd0efe7); before, a process that may not load programs may not read their maps either."""
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if release >= (5, 19):
        return frozenset()
    return frozenset({"CAP_BPF"} if release >= (5, 8) else {"CAP_SYS_ADMIN"})


def need_capabilities() -> None:
    """Raise Unsupported where this process lacks a capability that loading a program needs."""
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
    """Raise Conflict where the pinned object is not such a map."""
    for pin in maps.values():
        pins.open_map(pin.path, pin.type, pin.key_size, pin.value_size)


def _check_program(name: str, pin: ProgramPin) -> None:
    """Raise Conflict where the pin is not a program, or attachment, that may be replaced."""
    if not os.path.lexists(pin.path):
        return
    if os.path.isdir(pin.path):
        raise pins.foreign(pin.path, "a directory is there")
    wanted = "bpf-prog" if pin.kind == SCHED_CLS else "bpf-link"
    kind = pins.kind_of(BpfMap.open(pin.path))
    if kind != wanted:
        raise pins.foreign(pin.path, f"a {kind} is pinned there")
    if kind == "bpf-prog":
        found = BpfProgram.open(pin.path)
        if (found.type, found.name) != (_SCHED_CLS, name[:15]):
            raise pins.foreign(pin.path, f"the program {found.name} is pinned there")
