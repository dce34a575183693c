"""The names that devices have for the moment in which one takes the place of another.

A device of one mode of forwarding cannot be up beside that of the other: they have one UDP port. So
the new one is made and filled under a name of its own, while the old one forwards. A process that
is killed meanwhile leaves both; they are recognised by these names and removed by the next pass.
"""

from __future__ import annotations

from typing import Final

from flannel_dp.kernel.links import LinkReader

#: In the place of a family's number: the device that was replaced.
_REPLACED: Final = 0


def waiting_name(vni: int, family: int) -> str:
    """Return the name of a device that is about to take its own; 15 characters at most."""
    return f"fldp-{vni}-{family}"


def replaced_name(vni: int) -> str:
    """Return the name of the device that another one has replaced."""
    return waiting_name(vni, _REPLACED)


def left_aside(reader: LinkReader, vni: int) -> list[str]:
    """Return which of these devices exist: a process was killed while it replaced one."""
    names = [waiting_name(vni, number) for number in (_REPLACED, 4, 6)]
    found = [reader.link(name) for name in names]
    return [link.name for link in found if link is not None and link.kind == "vxlan"]
