"""The socket of probes: what counts as an answer, and what bad arguments meet."""

from __future__ import annotations

import os
import socket
import struct
import time
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp._core import (
    PROBE_ECHO,
    PROBE_FRAME,
    PeerProber,
    ProbeOrigin,
    ProbeSocket,
    Table,
    run_probers,
)
from tests.lib.waiting import LIMIT

HERE = {4: socket.inet_pton(socket.AF_INET, "127.0.0.1"), 6: bytes(15) + b"\1"}
SIZE = {4: 52, 6: 72}


def echo(family: int, key: bytes = b"k" * 16, peers: int = 1) -> ProbeSocket:
    """Probes of this host itself, by way of lo."""
    packed = (bytes(8) + HERE[family].ljust(16, b"\0")) * peers
    return ProbeSocket(ProbeOrigin(PROBE_ECHO, HERE[family]), packed, 4, key=key)


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[ProbeSocket, int]]:
    opened = echo(request.param, peers=3)
    yield opened, request.param
    opened.close()


def test_each_peer_answers_once(made: tuple[ProbeSocket, int]) -> None:
    probes, family = made
    assert probes.send(array("I", [0, 2]), 1, SIZE[family]) == 2
    found = 0
    while found < 2:
        new = probes.receive(int(LIMIT * 1000))
        assert new
        found += new
    assert [probes.trip(peer, 1) > 0 for peer in range(3)] == [True, False, True]
    assert [len(probes.trips(peer, array("I", [0, 1]))) for peer in range(3)] == [1, 0, 1]
    assert probes.counts(array("I", [0, 1, 3])) == [1, 0, 1]
    assert probes.is_complete(array("I", [0, 2]), 1)
    assert not probes.is_complete(array("I", [0, 1]), 1)
    assert (probes.sent, probes.answered) == (2, 2)


def reply(family: int, payload: bytes) -> bytes:
    """An ICMP echo reply as the kernel hands it over: IPv4 with its header."""
    kind = {4: 0, 6: 129}[family]
    return (b"\x45" + bytes(19) if family == 4 else b"") + bytes([kind]) + bytes(7) + payload


def payload_of(probes: ProbeSocket, family: int) -> bytes:
    """The payload of a probe that was sent, as somebody on the way sees it."""
    kind = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}[family]
    where = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    with socket.socket(where, socket.SOCK_RAW, kind) as seen:
        seen.settimeout(LIMIT)
        probes.send(array("I", [0]), 0, SIZE[family])
        while True:
            packet = seen.recv(2048)
            icmp = packet[20:] if family == 4 else packet
            if icmp[0] in (8, 128) and icmp[4:6] == struct.pack("!H", probes.port):
                return icmp[8:32]


def test_an_answer_takes_the_key_of_this_process(made: tuple[ProbeSocket, int]) -> None:
    probes, family = made
    payload = payload_of(probes, family)
    sent = struct.unpack_from("=Q", payload, 8)[0]
    other = echo(family, b"x" * 16, peers=3)
    assert not other.match(reply(family, payload), sent + 5_000)
    assert other.strange == 1
    other.close()

    for byte in range(24):  # another peer, another round, an earlier time, another tag
        forged = bytearray(payload)
        forged[byte] ^= 1
        assert not probes.match(reply(family, bytes(forged)), sent + 5_000)
    assert probes.strange == 24
    assert probes.match(reply(family, payload), sent + 5_000)
    assert probes.trip(0, 0) == pytest.approx(5e-6)
    assert not probes.match(reply(family, payload), sent + 9_000)  # a copy
    assert probes.trip(0, 0) == pytest.approx(5e-6)


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_are_no_answer(packet: bytes, now: int) -> None:
    for family in (4, 6):
        probes = echo(family)
        assert not probes.match(packet, now)
        probes.close()


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"source": b"abc"}, "source takes 4 or 16 bytes"),
        ({"key": b"abc"}, "key takes 16"),
        ({"peers": bytes(23)}, "24 bytes each"),
        ({"rounds": 0}, "rounds 1 to 65535"),
        ({"paths": 17}, "paths takes 1 to 16"),
        ({"how": 9}, "constants PROBE_"),
        ({"how": 1}, "local takes 4 or 16 bytes"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changed: dict[str, object], error: str) -> None:
    given = {"how": PROBE_FRAME, "source": HERE[4]} | changed
    of_socket = {"peers": bytes(24), "rounds": 1, "key": b"k" * 16, "paths": 1}
    chosen = {name: given.pop(name, value) for name, value in of_socket.items()}
    with pytest.raises(ValueError, match=error):
        ProbeSocket(ProbeOrigin(**given), **chosen)


@pytest.mark.parametrize(
    ("which", "round", "size", "path"),
    [([3], 0, 100, 0), ([0], 4, 100, 0), ([0], 0, 9, 0), ([0], 0, 99, 1)],
)
def test_what_is_out_of_range_is_not_sent(
    made: tuple[ProbeSocket, int], which: list[int], round: int, size: int, path: int
) -> None:
    probes, _ = made
    with pytest.raises(ValueError, match="out of range"):
        probes.send(array("I", which), round, size, path)
    for peer, number in ((3, 0), (0, 4)):
        with pytest.raises(IndexError):
            probes.trip(peer, number)
        with pytest.raises(IndexError):
            probes.trips(peer, array("I", [number]))
        with pytest.raises(IndexError):
            probes.is_complete(array("I", [peer]), number)
    with pytest.raises(IndexError):
        probes.counts(array("I", [4]))


def test_the_interval_is_stretched_to_what_a_processor_may_do() -> None:
    """A peer that never answers, on lo: the share of a processor that is allowed is none to speak
    of, or all of it."""
    origin = ProbeOrigin(PROBE_FRAME, HERE[4], ifindex=socket.if_nametoindex("lo"))
    peers = Table("peer")
    peers.add(("192.0.2.1/32", "192.0.2.1", "02:00:00:00:00:01"))
    wake = os.eventfd(0)
    frugal, free = (
        PeerProber(origin, SIZE[4], key=b"k" * 16, interval=0.5, most_used=share)
        for share in (1e-6, 1.0)
    )
    try:
        for prober in (frugal, free):
            prober.keep(peers)
        end = time.monotonic() + LIMIT
        while frugal.interval == 0.5:
            assert time.monotonic() < end
            run_probers([frugal, free], wake, 1.0)
            frugal.changes(), free.changes()
        assert frugal.interval <= 4.0
        assert free.interval == 0.5
    finally:
        os.close(wake)
        frugal.close()
        free.close()


def test_a_closed_socket(made: tuple[ProbeSocket, int]) -> None:
    probes, family = made
    probes.close()
    probes.close()
    with pytest.raises(ValueError, match="closed"):
        probes.send(array("I", [0]), 0, SIZE[family])
