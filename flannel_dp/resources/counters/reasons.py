"""The kernel's words for the reasons of drops, kept in a map beside the counts."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from flannel_dp._core import BpfMap

#: Room for so many reasons, and the bytes of a name.
MAX_REASONS, NAME = 256, 64


def name_reasons(reasons: BpfMap, enumerators: Mapping[str, int]) -> None:
    """Keep the kernel's words beside the counts: reading its types takes a tenth of a second."""
    known = {value: name for name, value in enumerators.items() if 0 <= value < MAX_REASONS}
    if not known:
        return
    keys = b"".join(struct.pack("=I", value) for value in known)
    values = b"".join(
        _short(name).encode()[: NAME - 1].ljust(NAME, b"\0") for name in known.values()
    )
    reasons.update_many(keys, values)


def _short(name: str) -> str:
    return name.removeprefix("SKB_DROP_REASON_").removeprefix("SKB_")


def reason_names(reasons: BpfMap) -> dict[int, str]:
    """Return the names of the reasons by number; empty on a kernel that gives none."""
    _, keys, values = reasons.read()
    numbers = struct.unpack(f"={len(keys) // 4}I", keys)
    found = (values[at : at + NAME].rstrip(b"\0") for at in range(0, len(values), NAME))
    return {
        number: text.decode("ascii", "replace")
        for number, text in zip(numbers, found, strict=True)
        if text
    }
