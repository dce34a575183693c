"""A MAC for this node's device that a reboot does not change."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

MACHINE_ID: Final = "/etc/machine-id"


def stable_mac(*parts: str) -> str:
    """Return a MAC that depends on ``parts`` alone: locally administered and unicast."""
    import hashlib  # loads OpenSSL, and most runs find the device made

    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()
    return bytes([digest[0] & 0xFC | 0x02, *digest[1:6]]).hex(":")


def default_mac(device: str, public_ip: str) -> str:
    """Return the MAC of this machine's ``device``, the same after every reboot.

    Made from /etc/machine-id (machine-id(5): hash it, do not show it), the device name
    and the node's public IP, which alone tells nodes apart where an image was cloned
    with its machine-id, or where a container has none.
    """
    machine = ""
    with suppress(OSError), open(MACHINE_ID, encoding="ascii", errors="replace") as file:
        machine = file.read().strip()
    return stable_mac("flannel-dp", machine, device, public_ip)
