"""Chunked bodies, in whatever pieces they come."""

from __future__ import annotations

from collections.abc import Callable

import httpcore2
import pytest

from flannel_dp.sources.kube.chunked import unchunked

BODY = b'5\r\n{"a"\n\r\n0003;name=value\r\n:1}\r\nA \r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n'
SAID = b'{"a"\n:1}\r\n\r\n\r\n\r\n\r\n'


def reading(*pieces: bytes) -> Callable[[], bytes]:
    left = iter(pieces)
    return lambda: next(left, b"")


@pytest.mark.parametrize("end", [b"\r\n", b"trailer: x\r\n\r\n"])
def test_a_body_cut_anywhere(end: bytes) -> None:
    whole = BODY + end
    assert b"".join(unchunked(reading(), whole)) == SAID
    for first in range(len(whole)):
        for second in range(first, len(whole)):
            parts = [one for one in (whole[first:second], whole[second:]) if one]
            assert b"".join(unchunked(reading(*parts), whole[:first])) == SAID
    assert b"".join(unchunked(reading(*(whole[i : i + 1] for i in range(len(whole)))), b"")) == SAID


def test_what_has_come_is_given_at_once() -> None:
    body = unchunked(reading(b"cd"), b"4\r\nab")
    assert next(body) == b"ab"
    assert next(body) == b"cd"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ended before"),
        (b"5", "ended before"),
        (b"5\r\nabc", "ended before"),
        (b"3\r\nabc", "ended before"),
        (b"3\r\nabc\r\n", "ended before"),
        (b"0\r\n", "ended before"),
        (b"0\r\nx: y\r\n", "ended before"),
        (b"\r\nabc", "without its size"),
        (b"-3\r\nabc", "without its size"),
        (b"+3\r\nabc", "without its size"),
        (b"0x3\r\nabc", "without its size"),
        (b"1_0\r\nabc", "without its size"),
        (b"11111111111111111\r\nabc", "without its size"),
        (b"3\r\nabcd\r\n", "longer than its size"),
        (b"3" + b" " * 5000, "too long"),
        (b"3;" + b" " * 5000 + b"\r\n", "without its size"),
        (b"0\r\n" + b"x: y\r\n" * 20_000, "trailers are too long"),
    ],
)
def test_what_is_no_chunked_body(data: bytes, reason: str) -> None:
    with pytest.raises(httpcore2.RemoteProtocolError, match=reason):
        b"".join(unchunked(reading(), data))
