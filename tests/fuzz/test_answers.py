"""Answers of etcd (frames and messages) and of Kubernetes, and documents, mutated: what reads them
says what is wrong with them by an error of its own, and never another one.

Seeds are in ``corpus/answers``, ``READER-NAME``; an input that failed once is kept there, too, as
``READER-failed-NAME``.
``make fuzz`` makes more of each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.subnet_env import read_subnet_env
from flannel_dp.errors import FlannelDPError
from flannel_dp.sources.etcd import grpc
from flannel_dp.sources.etcd import messages as pb
from flannel_dp.sources.etcd.options import Endpoint
from flannel_dp.sources.etcd.reading import read
from flannel_dp.sources.etcd.socket import Deadline, Lost
from flannel_dp.sources.kube.events import Changes, decode_event
from flannel_dp.sources.kube.nodes import KubeNode, NodeListing, NodeReader, _page

CORPUS = Path(__file__).parent / "corpus/answers"
RUNS = max(300, int(os.environ.get("FLANNEL_DP_FUZZ_RUNS", "0")) // 40)
#: What mutations put in: ends of lengths and numbers, and words of JSON.
PIECES = [
    *(b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", bytes(9), b"\xf4\x90\x80\x80"),
    *(b"{", b"}", b"[", b'"', b"null", b"1e999", b"-1", b"9" * 400, b"\\ud800", b"\n", b","),
]


class _Bytes:
    """The socket of a connection: what is sent is thrown away."""

    def __init__(self, *args: Any) -> None:
        pass

    def send(self, data: bytes, deadline: Deadline) -> None:
        pass

    def close(self) -> None:
        pass


def _frames(data: bytes, tmp_path: Path) -> None:
    deadline = Deadline(float("inf"), lambda: False)
    connection = grpc.Connection(Endpoint("192.0.2.1", 2379, False), None, deadline)
    stream = connection.open("/etcdserverpb.KV/Range", b"", [], deadline, end=True)
    middle = len(data) // 2
    for part in (data[:middle], data[middle:]):
        connection._take_in(part)
        for message in connection.take(stream)[0]:
            read(pb.RangeResponse, message)


def _messages(data: bytes, tmp_path: Path) -> None:
    kinds = [pb.RangeResponse, pb.WatchResponse, pb.LeaseKeepAliveResponse, pb.TxnResponse]
    failures = 0
    for kind in kinds:
        try:
            read(kind, data)
        except Lost:
            failures += 1
    if failures == len(kinds):
        raise Lost("none of them")


def _kube(data: bytes, tmp_path: Path) -> None:
    def refusal(status: Any, what: str, rule: str) -> FlannelDPError:
        return FlannelDPError(f"{status} {what}")

    api: Any = SimpleNamespace(
        origin="kubernetes", refusal=refusal, get=lambda path, params, **how: data
    )
    reader = NodeReader("flannel.alpha.coreos.com")
    nodes: list[KubeNode]
    if b"NodeList" in data[:200]:
        nodes = _page(api, {"limit": 5})[0].items
    else:
        changes = Changes(NodeListing(), reader)
        changes.see(api, data)
        changes.see(api, data)
        nodes = [decode_event(api, data).object]
    for node in nodes:
        reader.claim(node)
        reader.digest(node)


def _leases(data: bytes, tmp_path: Path) -> None:
    decode_leases(data, origin="leases.json")


def _network(data: bytes, tmp_path: Path) -> None:
    NetworkConfig.from_json(data.decode("utf-8", "surrogateescape"))


def _subnet(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(data)
    read_subnet_env(path)


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "frames": _frames,
    "messages": _messages,
    "kube": _kube,
    "leases": _leases,
    "network": _network,
    "subnet": _subnet,
}


def mutated(seed: bytes, source: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        at, to = sorted(source.randrange(len(data) + 1) for _ in range(2))
        match source.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at:at] = source.choice(PIECES)
            case 2:
                del data[at : min(to, at + 40)]
            case 3:
                data[at:at] = data[at : min(to, at + 200)]
            case _ if at < len(data):
                data[at] = source.randrange(256)
    return bytes(data)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_only_an_error_of_its_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "ByteStream", _Bytes)
    reader, seed = READERS[path.name.partition("-")[0]], path.read_bytes()
    source = random.Random(path.name)
    read_well = 0
    for number in range(RUNS + 1):
        data = mutated(seed, source) if number else seed
        try:
            reader(data, tmp_path)
            read_well += 1
        except (FlannelDPError, Lost):
            pass
        except BaseException as error:
            error.add_note(f"the input was {data!r}")
            raise
    assert read_well or "-failed-" in path.name, "not even some of its mutations can be read"


def test_every_reader_has_a_seed() -> None:
    assert {path.name.partition("-")[0] for path in CORPUS.iterdir()} == {*READERS}
