"""Small files in which a process leaves what it knows to the next one of this node.

A file is replaced as a whole. One that is missing, cannot be read or cannot be written is no
error: the next process then knows no more than the first one did. The path "" is no file.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import msgspec

_Noted = TypeVar("_Noted", bound=msgspec.Struct)

#: More than any of them has.
_LARGEST = 4096


def read_note(path: str, kind: type[_Noted]) -> _Noted | None:
    """Return what the file at ``path`` says, None where it says nothing that can be read."""
    if not path:
        return None
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(_LARGEST), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write_note(path: str, noted: msgspec.Struct) -> None:
    """Replace the file at ``path``, unless it says so already."""
    if not path or read_note(path, type(noted)) == noted:
        return
    fresh = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(noted))
        os.replace(fresh, path)
