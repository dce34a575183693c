"""Addresses, prefixes and netlink messages in the compiled unit, against the standard library."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp._core import (
    address_text,
    prefix_holds,
    prefixes_overlap,
    split_attributes,
    split_messages,
)

NETWORKS = st.one_of(
    st.builds(lambda n, bits: ipaddress.ip_network((n << 24 | n, bits), strict=False),
              st.integers(0, 255), st.integers(0, 32)),
    st.builds(lambda n, bits: ipaddress.ip_network((n << 120 | n, bits), strict=False),
              st.integers(0, 255), st.integers(33, 128)),
)  # fmt: skip


@given(one=NETWORKS, other=NETWORKS)
def test_prefixes_compare_as_those_of_the_standard_library(
    one: ipaddress.IPv4Network | ipaddress.IPv6Network,
    other: ipaddress.IPv4Network | ipaddress.IPv6Network,
) -> None:
    same = one.version == other.version

    assert prefix_holds(str(one), str(other[0])) == (same and other[0] in one)
    assert prefixes_overlap(str(one), str(other)) == (same and one.overlaps(other))


@pytest.mark.parametrize("text", ["10.0.0.0", "10.0.0.0/33", "", "fd00::/129"])
def test_what_is_no_prefix_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="not a prefix"):
        prefix_holds(text, "10.0.0.1")
    with pytest.raises(ValueError, match="not a prefix"):
        prefixes_overlap("10.0.0.0/8", text)


@given(raw=st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)))
def test_addresses_are_written_as_the_kernel_prints_them(raw: bytes) -> None:
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6

    assert address_text(raw) == socket.inet_ntop(family, raw)


@pytest.mark.parametrize("size", [0, 3, 5, 15, 17])
def test_other_lengths_are_no_address(size: int) -> None:
    with pytest.raises(ValueError, match="4 or 16 bytes"):
        address_text(bytes(size))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


ATTRIBUTES = st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=9)), max_size=6)


@given(wanted=ATTRIBUTES, before=st.binary(max_size=8), cut=st.integers(0, 40))
def test_attributes_are_split_or_refused(
    wanted: list[tuple[int, bytes]], before: bytes, cut: int
) -> None:
    ends = [len(before)]
    data = before
    for kind, value in wanted:
        data += _padded(struct.pack("=HH", 4 + len(value), kind | 0x8000) + value)
        ends.append(len(data))

    assert split_attributes(data, len(before)) == dict(wanted)
    assert split_attributes(data, -1) is None
    part = data[: max(len(before), len(data) - cut)]
    whole = sum(end <= len(part) for end in ends) - 1
    found = split_attributes(part, len(before))
    # Padding may be missing, and what is shorter than a header is no attribute.
    assert found in (None, dict(wanted[:whole]), dict(wanted[: whole + 1]))


@given(
    wanted=st.lists(st.tuples(st.integers(16, 99), st.integers(0, 9), st.binary(max_size=9))),
    cut=st.integers(1, 30),
)
def test_messages_of_one_number_are_split(wanted: list[tuple[int, int, bytes]], cut: int) -> None:
    data = b"".join(
        _padded(struct.pack("=IHHII", 16 + len(body), kind, 2, seq, 0) + body)
        for kind, seq, body in wanted
    )

    assert split_messages(data, 7) == [(kind, 2, body) for kind, seq, body in wanted if seq == 7]
    found = split_messages(data[:-cut], 7)
    assert found is None or len(found) <= len(wanted)


def test_an_overrun_is_everybodys() -> None:
    overrun = struct.pack("=IHHII", 16, 4, 0, 0, 0)

    assert split_messages(overrun, 7) == [(4, 0, b"")]


@given(data=st.binary(max_size=120), offset=st.integers(0, 130), seq=st.integers(0, 2**32 - 1))
def test_garbage_is_split_or_refused(data: bytes, offset: int, seq: int) -> None:
    found = split_attributes(data, offset)
    assert found is None or sum(map(len, found.values())) <= len(data)
    messages = split_messages(data, seq)
    assert messages is None or sum(len(body) for _, _, body in messages) <= len(data)
