"""What of a program that forwards is pinned for a device, without loading what loads programs."""

from __future__ import annotations

import os

from flannel_dp.bpf import pins
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS

#: What the names of its pins begin with, and end with while a successor is made.
PREFIX = "forward-"
SUPERSEDED = "%old"


def remains(device: str, netns: NetNS = None, run_dir: str = DEFAULT_DIRECTORY) -> bool:
    """Return whether a program of ours forwarded for this device: its peers are pinned, be it
    under the name that they have while larger maps are made."""
    peers = {f"{PREFIX}peers{n}{suffix}" for n in (4, 6) for suffix in ("", SUPERSEDED)}
    return not peers.isdisjoint(names_of_pins(device, netns, run_dir))


def names_of_pins(
    device: str, netns: NetNS = None, run_dir: str = DEFAULT_DIRECTORY
) -> frozenset[str]:
    """Return the names of a program's pins for this device; none where they cannot be listed."""
    try:
        directory = pins.pin_directory(device, netns, run_dir=run_dir)
        return frozenset(name for name in os.listdir(directory) if name.startswith(PREFIX))
    except (FlannelDPError, OSError):
        return frozenset()
