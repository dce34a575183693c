"""Read offsets and names out of the running kernel's own description of its types (BTF).

Headers describe how some other kernel was built; /sys/kernel/btf/vmlinux describes this one.
Runs under any Python 3 and on the standard library alone, as part of the short-lived
process that compiles (``_compile.py``).

Source of the layout: include/uapi/linux/btf.h, Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VMLINUX = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_ENUM = struct.Struct("=Ii")

_STRUCT, _UNION, _ENUM_KIND = 4, 5, 6
#: Bytes after the common part: a fixed number, and so many for each of ``vlen`` members.
_TAIL = {
    1: (4, 0),  # int
    2: (0, 0),  # pointer
    3: (12, 0),  # array
    4: (0, 12),  # struct
    5: (0, 12),  # union
    6: (0, 8),  # enum
    7: (0, 0),  # forward declaration
    8: (0, 0),  # typedef
    9: (0, 0),  # volatile
    10: (0, 0),  # const
    11: (0, 0),  # restrict
    12: (0, 0),  # function
    13: (0, 8),  # its prototype
    14: (4, 0),  # variable
    15: (0, 12),  # section
    16: (0, 0),  # float
    17: (4, 0),  # declaration tag
    18: (0, 0),  # type tag
    19: (0, 12),  # enum of 64 bits
}
_QUALIFIERS = (8, 9, 10, 11, 18)


class Btf:
    """The types of one BTF file. ValueError for what is none, OSError where it cannot be read."""

    def __init__(self, path: str = VMLINUX) -> None:
        with open(path, "rb") as file:
            data = file.read()
        if len(data) < _HEADER.size:
            raise ValueError(f"{path} is too short for BTF")
        magic, _, _, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError(f"{path} is not BTF of this byte order")
        self._data = data
        self._names = data[header + strings : header + strings + strings_size]
        self._at = self._index(header + types, header + types + types_size)

    def _index(self, offset: int, end: int) -> list[int]:
        """Return where each type begins, by its number; 0 is void."""
        found, unpack, data = [0], _TYPE.unpack_from, self._data
        while offset < end:
            found.append(offset)
            info = unpack(data, offset)[1]
            kind = info >> 24 & 0x1F
            if kind not in _TAIL:
                raise ValueError(f"BTF of a kind that is not known: {kind}")
            fixed, each = _TAIL[kind]
            offset += 12 + fixed + each * (info & 0xFFFF)
        return found

    def offset(self, path: str) -> int:
        """Return bytes from the start of a struct to a member: "net_device.ifindex", and through
        members that are structs themselves: "net.ns.inum". LookupError where there is none,
        or where it is a bit field."""
        name, *members = path.split(".")
        number, total = self._find(name, (_STRUCT, _UNION)), 0
        for member in members:
            found = self._member(number, member)
            if found is None or found[0] % 8:
                raise LookupError(path)
            total, number = total + found[0] // 8, found[1]
        return total

    def enumerators(self, name: str) -> dict[str, int]:
        """Return names and values of an enum. LookupError where there is none."""
        at = self._at[self._find(name, (_ENUM_KIND,))]
        count = _TYPE.unpack_from(self._data, at)[1] & 0xFFFF
        pairs = _ENUM.iter_unpack(self._data[at + 12 : at + 12 + 8 * count])
        return {self._name(where): value for where, value in pairs}

    def _name(self, where: int) -> str:
        return self._names[where : self._names.index(b"\0", where)].decode()

    def _find(self, name: str, kinds: tuple[int, ...]) -> int:
        wanted = self._names.find(b"\0" + name.encode() + b"\0") + 1
        if wanted:
            unpack, data = _TYPE.unpack_from, self._data
            for number, at in enumerate(self._at[1:], 1):
                where, info, _ = unpack(data, at)
                if where == wanted and info >> 24 & 0x1F in kinds:
                    return number
        raise LookupError(name)

    def _member(self, number: int, name: str) -> tuple[int, int] | None:
        """Return the bits to a member and its type; members without a name are searched, too."""
        for where, kind, bits in self._members(number):
            if where and self._name(where) == name:
                return bits, kind
            inside = None if where else self._member(kind, name)
            if inside:
                return bits + inside[0], inside[1]
        return None

    def _members(self, number: int) -> Iterator[tuple[int, int, int]]:
        at = self._at[number]
        _, info, behind = _TYPE.unpack_from(self._data, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        if kind in _QUALIFIERS:
            yield from self._members(behind)
        elif kind in (_STRUCT, _UNION):
            for member in _MEMBER.iter_unpack(self._data[at + 12 : at + 12 + 12 * count]):
                where, type_, bits = member
                # With the top bit of `info` the upper byte is the width of a bit field.
                yield where, type_, bits & 0xFFFFFF if info >> 31 else bits
