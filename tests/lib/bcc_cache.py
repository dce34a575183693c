"""What compiles and loads eBPF programs, with a memory of what was compiled.

bcc takes most of a second to compile a program, and tests load the same few hundreds of times,
each time with maps of their own. Here a program is compiled by bcc once in a test run; later the
same instructions are loaded with other maps, as bcc does it: the maps are made or taken from
their pins, their descriptors are written into the instructions, and the kernel verifies them.
How much room a map has is no part of a program. What was read from the kernel's BTF is remembered
too. bcc is imported, and headers are sought, only where something has to be compiled: by the
process that this program is. All else is loaded by the process that asks for it.

``/usr/bin/python3 -I bcc_cache.py FOLDER _compile.py``, in the place of ``python3 _compile.py``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import re
import resource
import struct
import sys
import tempfile
import threading
from typing import Any

_MAP_CREATE, _PROG_LOAD, _OBJ_PIN, _OBJ_GET, _RAW_TRACEPOINT_OPEN = 0, 5, 6, 7, 17
_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1

_libc = ctypes.CDLL(None, use_errno=True)

#: ``fds``, where this thread has to close what it opens.
_opened = threading.local()


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2). Raises OSError."""
    attributes = attributes.ljust(128, b"\0")
    result = int(_libc.syscall(_SYS_BPF[os.uname().machine], command, attributes, 128))
    if result < 0:
        raise OSError(ctypes.get_errno(), "bpf")
    if command != _OBJ_PIN and hasattr(_opened, "fds"):
        _opened.fds.append(result)
    return result


def remember(bcc: Any, module: Any) -> dict[str, Any]:
    """What bcc has made of a source: maps in the order of their numbers, and instructions in
    which those numbers stand for descriptors."""
    lib, handle = bcc.lib, module.module
    for name in ("fd", "name", "key_size", "leaf_size", "type", "max_entries", "flags"):
        function = getattr(lib, "bpf_table_name" if name == "name" else f"bpf_table_{name}_id")
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    maps, numbers = [], {}
    for number in range(lib.bpf_num_tables(handle)):
        numbers[lib.bpf_table_fd_id(handle, number)] = number
        maps.append(
            {
                "name": lib.bpf_table_name(handle, number).decode(),
                "type": lib.bpf_table_type_id(handle, number),
                "key": lib.bpf_table_key_size_id(handle, number),
                "value": lib.bpf_table_leaf_size_id(handle, number),
                "room": lib.bpf_table_max_entries_id(handle, number),
                "flags": lib.bpf_table_flags_id(handle, number),
            }
        )
    programs = {}
    for number in range(lib.bpf_num_functions(handle)):
        name = lib.bpf_function_name(handle, number)
        code = ctypes.string_at(
            lib.bpf_function_start(handle, name), lib.bpf_function_size(handle, name)
        )
        programs[name.decode()] = _with_descriptors(code, numbers).hex()
    return {
        "maps": maps,
        "programs": programs,
        "license": lib.bpf_module_license(handle).decode(),
        "version": lib.bpf_module_kern_version(handle),
    }


def rooms_of(text: str) -> dict[str, str]:
    """For maps by name: the macro that says how much room they have, and nothing else."""
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(r'^BPF_TABLE_PINNED\("\w+", [\w ]+, [\w ]+, (\w+), ([A-Z]\w*),', code, re.M)
    used = re.findall(r"\w+", code)
    macros = [macro for _, macro in found]
    return {name: macro for name, macro in found if used.count(macro) == macros.count(macro)}


def _with_descriptors(code: bytes, new: dict[int, int]) -> bytes:
    """Instructions with other descriptors of maps in them."""
    changed = bytearray(code)
    for at in range(0, len(code), 8):
        operation, registers, _, value = struct.unpack_from("=BBhi", code, at)
        if operation == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            struct.pack_into("=i", changed, at + 4, new[value])
    return bytes(changed)


class Library:
    """What is used of bcc's library for a program that is loaded: the kernel's own calls."""

    @staticmethod
    def bpf_obj_pin(fd: int, path: bytes) -> int:
        pointer = ctypes.create_string_buffer(path)
        return _call(_OBJ_PIN, struct.pack("=QII", ctypes.addressof(pointer), fd, 0))

    @staticmethod
    def bpf_attach_raw_tracepoint(fd: int, point: bytes) -> int:
        pointer = ctypes.create_string_buffer(point)
        attributes = struct.pack("=QII", ctypes.addressof(pointer), fd, 0)
        return _call(_RAW_TRACEPOINT_OPEN, attributes)


def _call(command: int, attributes: bytes) -> int:
    """A descriptor or 0, or -1 and errno set, as bcc's functions answer."""
    try:
        return bpf(command, attributes)
    except OSError as error:
        ctypes.set_errno(error.errno or 0)
        return -1


class WithoutBcc:
    """In the place of bcc where nothing has to be compiled."""

    lib = Library


class Loaded:
    """A program that was loaded; ``fd`` is what its user takes of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd


class Remembered:
    """In the place of bcc's module: the same maps and programs, with nothing compiled."""

    def __init__(self, known: dict[str, Any], pins: dict[str, str], rooms: dict[str, int]) -> None:
        self._known, self._rooms = known, rooms
        self._maps = dict(enumerate(self._map(one, pins) for one in known["maps"]))

    def _map(self, one: dict[str, Any], pins: dict[str, str]) -> int:
        path = pins.get(f"{one['name'].upper()}_PIN")
        pointer = ctypes.create_string_buffer((path or "").encode())
        place = struct.pack("=QII", ctypes.addressof(pointer), 0, 0)
        if path and os.path.lexists(path):
            return bpf(_OBJ_GET, place)
        room = self._rooms.get(one["name"], one["room"])
        words = (one["type"], one["key"], one["value"], room, one["flags"], 0, 0)
        made = bpf(_MAP_CREATE, struct.pack("=7I", *words) + one["name"].encode()[:15])
        if path:
            bpf(_OBJ_PIN, place[:8] + struct.pack("=I", made))
        return made

    def load_func(self, name: str, kind: int) -> Loaded:
        code = _with_descriptors(bytes.fromhex(self._known["programs"][name]), self._maps)
        instructions = ctypes.create_string_buffer(code, len(code))
        licence = ctypes.create_string_buffer(self._known["license"].encode())
        attributes = struct.pack(
            "=IIQQIIQII16s",
            *(kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence)),
            *(0, 0, 0, self._known["version"], 0, name.encode()[:15]),
        )
        return Loaded(bpf(_PROG_LOAD, attributes))


class Memory:
    """What a run knows of a question about this kernel, in a file."""

    def __init__(self, folder: str, question: Any) -> None:
        key = hashlib.sha256(json.dumps([os.uname().release, question]).encode())
        self._path = f"{folder}/{key.hexdigest()}.json"
        self.value: Any = None
        with contextlib.suppress(FileNotFoundError), open(self._path) as file:
            self.value = json.load(file)

    def keep(self, value: Any) -> None:
        self.value = value
        folder = os.path.dirname(self._path)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as fresh:
            json.dump(value, fresh)
        os.rename(fresh.name, self._path)


class NotRemembered(Exception):
    """It takes bcc."""


class InProcess:
    """In the place of ``flannel_dp.bpf.helper._run``: what is remembered is loaded by the process
    that asks for it. A process of its own, which takes 50 ms, is started for all else: to compile
    each program once in a run, and for interpreters other than the stand-in ``python``."""

    def __init__(self, folder: str, python: str, run: Any, target: str) -> None:
        self._python, self._run = python, run
        self._helper = _module(target)
        _remember_with(self._helper, folder, compiles=False)
        self._helper._bcc, self._helper.kernel_headers = lambda: WithoutBcc, contextlib.nullcontext

    def __call__(self, interpreter: str, request: Any) -> tuple[dict[str, Any], str]:
        if interpreter == self._python and request["do"] == "load":
            with contextlib.suppress(NotRemembered):
                return self._loaded(json.loads(json.dumps(request))), ""
        answer: tuple[dict[str, Any], str] = self._run(interpreter, request)
        return answer

    def _loaded(self, request: dict[str, Any]) -> dict[str, Any]:
        _opened.fds = []
        try:
            return dict(self._helper.load(request))
        except self._helper.Refused as error:
            return {"refused": error.kind, "message": str(error), "errno": error.code}
        except OSError as error:
            return {"refused": "error", "message": str(error), "errno": error.errno or errno.EIO}
        finally:
            for fd in _opened.fds:
                os.close(fd)
            del _opened.fds


def _module(target: str) -> Any:
    spec = importlib.util.spec_from_file_location("_compile", target)
    assert spec is not None
    assert spec.loader is not None
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    return helper


def _remember_with(helper: Any, folder: str, *, compiles: bool) -> None:
    """Have ``_compile.py`` take what is remembered in the place of what bcc and the BTF say."""
    compile_, import_bcc = helper._compile, helper._bcc
    from_btf, kernel_headers = helper._from_btf, helper.kernel_headers

    def compiled(_: Any, source: str, flags: list[str]) -> Any:
        with open(source) as file:
            text = file.read()
        defines = dict(re.findall(r"^-D(\w+)=(.*)$", "\n".join(flags), re.MULTILINE))
        pins = {name: path.strip('"') for name, path in defines.items() if name.endswith("_PIN")}
        rooms = {name: room for name, room in rooms_of(text).items() if room in defines}
        free = {*pins, *rooms.values()}
        known = Memory(folder, [text, [f for f in flags if f[2:].partition("=")[0] not in free]])
        if known.value is not None:
            return Remembered(known.value, pins, {n: int(defines[m]) for n, m in rooms.items()})
        if not compiles:
            raise NotRemembered
        bcc = import_bcc()
        with kernel_headers():
            module = compile_(bcc, source, flags)
        known.keep(remember(bcc, module))
        return module

    def read_from_btf(offsets: dict[str, str], enums: list[str]) -> Any:
        known = Memory(folder, [offsets, enums])
        if known.value is None:
            if not compiles:
                raise NotRemembered
            known.keep(from_btf(offsets, enums))
        return known.value

    helper._compile, helper._from_btf = compiled, read_from_btf


def main(folder: str, target: str) -> None:
    helper = _module(target)
    load = helper.load
    _remember_with(helper, folder, compiles=True)

    def load_without_bcc(request: dict[str, Any]) -> Any:
        helper._bcc, helper.kernel_headers = lambda: WithoutBcc, contextlib.nullcontext
        return load(request)

    helper.load = load_without_bcc
    with contextlib.suppress(ValueError):  # needed before Linux 5.11 only
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    helper.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[-1])
