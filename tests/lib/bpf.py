"""A small eBPF program that is quick to compile, and tunnels whose frames it counts."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from flannel_dp.bpf import loader
from flannel_dp.bpf.loader import MapPin, ProgramPin
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.resources.counters.reading import Reading, Traffic
from tests.lib.hosts import Host
from tests.lib.waiting import LIMIT

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
    return host.exec("tc", *" ".join(words).split())


@dataclass(frozen=True)
class End:
    """One end of a tunnel: a host, its device's ifindex and MAC, its address inside."""

    host: Host
    index: int
    mac: str
    address: str

    @property
    def raw_mac(self) -> bytes:
        return bytes.fromhex(self.mac.replace(":", ""))

    def socket(self, kind: socket.SocketKind) -> socket.socket:
        """A socket in the host's namespace, bound to the address inside."""
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        made = call_in_netns(self.host.ns, socket.socket, family, kind)
        made.settimeout(LIMIT)
        made.bind((self.address, 0))
        return made


def tunnel(left: Host, right: Host, family: int, name: str = "flannel.1") -> tuple[End, End]:
    """Two hosts joined by vxlan devices whose entries are all permanent, so that nothing but
    what a test sends goes from one to the other."""
    made = []
    for number, host in enumerate((left, right), 1):
        address = f"10.9.0.{number}" if family == 4 else f"fd09::{number}"
        mac = f"02:00:00:00:09:{number:02x}"
        host.ip(
            f"link add {name} address {mac} mtu 1400 type vxlan id 1 dstport 8472 "
            f"local {host.underlay(family)} dev eth0 nolearning"
        )
        index = int(host.ip_json(f"link show {name}")[0]["ifindex"])
        made.append(End(host, index, mac, address))
    for end, peer in (made, made[::-1]):
        prefix = f"{end.address}/{24 if family == 4 else 64}"
        end.host.ip(f"addr add {prefix} dev {name}{' nodad' if family == 6 else ''}")
        end.host.ip(f"link set {name} up")
        end.host.ip(f"neigh replace {peer.address} lladdr {peer.mac} dev {name}")
        end.host.bridge(f"fdb replace {peer.mac} dst {peer.host.underlay(family)} dev {name}")
    for end, peer in (made, made[::-1]):
        end.host.ping(peer.host.underlay(family))  # the underlay's neighbours are known then
    return made[0], made[1]


def datagrams(sender: End, receiver: End, count: int, size: int = 100) -> None:
    """Send so many UDP datagrams of ``size`` bytes, and see them arrive."""
    with receiver.socket(socket.SOCK_DGRAM) as there, sender.socket(socket.SOCK_DGRAM) as here:
        for _ in range(count):
            here.sendto(bytes(size), there.getsockname())
            there.recv(size)


def counted(reading: Reading | None, peer: End, family: int) -> tuple[Traffic, Traffic]:
    """What the peer was sent, and what came from it."""
    assert reading is not None
    return (
        reading.traffic(peer.raw_mac, family, "sent"),
        reading.traffic(peer.raw_mac, family, "received"),
    )
