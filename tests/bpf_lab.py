"""What the tests of eBPF share: a small program that is quick to compile, and devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flannel_dp.bpf import loader
from flannel_dp.bpf.loader import MapPin, ProgramPin
from tests.conftest import Host

ARRAY, HASH, PERCPU_HASH = 2, 1, 5

#: Counts frames in an array of one number, and gives them back as they are.
SOURCE = """
BPF_TABLE_PINNED("array", u32, u64, frames, ROOM, FRAMES_PIN);

int see(struct __sk_buff *skb)
{
    u32 zero = 0;
    u64 *found = frames.lookup(&zero);

    if (found)
        __sync_fetch_and_add(found, 1);
    return -1;
}

int see_drop(struct bpf_raw_tracepoint_args *ctx)
{
    return 0;
}
"""


def use_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str = SOURCE) -> None:
    """Let every name of a source stand for ``text``."""
    path = tmp_path / "program.c"
    path.write_text(text)
    monkeypatch.setattr(loader, "source_path", lambda name: path)


def load_small(directory: Path, *, room: int = 1, drops: bool = False) -> None:
    """Compile what ``use_source`` was given and pin it in ``directory``."""
    programs = {"see": ProgramPin(directory / "see")}
    if drops:
        programs["see_drop"] = ProgramPin(directory / "see_drop", "raw_tracepoint:kfree_skb")
    loader.load(
        "small",
        maps={"frames": MapPin(directory / "frames", ARRAY, 4, 8)},
        programs=programs,
        defines={"ROOM": room},
    )


def add_device(host: Host, name: str = "flannel.1") -> int:
    """A vxlan device that is up; its ifindex."""
    host.ip(f"link add {name} type vxlan id 1 dstport 8472 local {host.ipv4} nolearning")
    host.ip(f"link set {name} up")
    return int(host.ip_json(f"link show {name}")[0]["ifindex"])


def tc(host: Host, *words: str) -> str:
    """``tc ARGS`` inside the host's namespace."""
    done = subprocess.run(
        ["ip", "netns", "exec", host.ns, "tc", *" ".join(words).split()],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout
