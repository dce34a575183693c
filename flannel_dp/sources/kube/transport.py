"""HTTP to an API server, bounded: in seconds from the look-up of its name to the last byte of
its answer, and in bytes, which are counted when they are uncompressed.

httpx2 has timeouts for each read, which a server that sends a byte now and then never meets,
and decompresses whatever comes. So the connection pool gets a network backend that knows until
when an answer has to be complete, and answers are uncompressed here, piece by piece.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from flannel_dp.sources.kube.chunked import unchunked
from flannel_dp.sources.limits import MIB, Excess, Pace
from flannel_dp.sources.names import resolve_within

#: In a response's extensions: the connection that a chunked, uncompressed body comes from.
_CHUNKED = "flannel_dp.chunked"
#: So many bytes are asked for at once: what a TLS record holds, and more.
_READ = 1 << 16
#: As the library finds it.
_END_OF_HEAD = re.compile(rb"\n\r?\n")
#: An answer is uncompressed in pieces of so many bytes.
_PIECE = 1 << 18
#: A connection that was not used for so long is closed.
_KEEP_SECONDS = 5.0
#: How long connecting may take where no timeout is given.
_CONNECT_SECONDS = 10.0


def transport_for(
    server: str, context: ssl.SSLContext, pace: Pace, proxy: str = ""
) -> httpx2.BaseTransport:
    """Requests to ``server``, by ``proxy``, else by the one that HTTPS_PROXY and its like name for
    it."""
    backend = _Connector(pace)
    proxy = proxy or _proxy_of(server)
    if not proxy:
        pool: httpcore2.ConnectionPool = httpcore2.ConnectionPool(
            ssl_context=context, network_backend=backend, keepalive_expiry=_KEEP_SECONDS
        )
        return _Transport(pool, pace)
    named = httpx2.Proxy(url=proxy)
    if named.url.scheme not in ("http", "https"):  # SOCKS, which takes another library
        return httpx2.HTTPTransport(verify=context, proxy=named)
    url = named.url
    pool = httpcore2.HTTPProxy(
        proxy_url=httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        ),
        proxy_auth=named.raw_auth,
        ssl_context=context,
        network_backend=backend,
        keepalive_expiry=_KEEP_SECONDS,
    )
    return _Transport(pool, pace)


def _proxy_of(server: str) -> str:
    parts = urlsplit(server)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


class _Transport(httpx2.BaseTransport):
    def __init__(self, pool: httpcore2.ConnectionPool, pace: Pace) -> None:
        self._pool, self._pace = pool, pace

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        url = request.url
        plain = httpcore2.Request(
            method=request.method,
            url=httpcore2.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _as_httpx2():
            answer = self._pool.handle_request(plain)
        headers = httpx2.Headers(answer.headers)
        coding = headers.pop("content-encoding", "").strip().lower()
        if coding:  # it is uncompressed here
            headers.pop("content-length", None)
        assert isinstance(answer.stream, Iterable)
        extensions = dict(answer.extensions)
        if not coding and headers.get("transfer-encoding", "").strip().lower() == "chunked":
            extensions[_CHUNKED] = answer.extensions.get("network_stream")
        return httpx2.Response(
            status_code=answer.status,
            headers=headers,
            stream=_PlainStream(answer.stream, coding, self._pace),
            extensions=extensions,
        )

    def close(self) -> None:
        self._pool.close()


def direct_body(response: httpx2.Response) -> Iterator[bytes] | None:
    """Return the body of a chunked answer of which nothing was read yet, past the library, whose
    reader took as long as all else together; None where it has to be read by that.

    It has no limits, and is for an answer that goes on. Raises as the library's.
    """
    stream = response.extensions.get(_CHUNKED)
    if not isinstance(stream, _Stream) or (rest := stream.after_head()) is None:
        return None
    timeout = response.request.extensions.get("timeout", {}).get("read")

    def pieces() -> Iterator[bytes]:
        with _as_httpx2():
            yield from unchunked(stream.reading(timeout), rest)

    return pieces()


class _PlainStream(httpx2.SyncByteStream):
    """The body of an answer, uncompressed, within its limits."""

    def __init__(self, stream: Any, coding: str, pace: Pace) -> None:
        self._stream, self._coding, self._pace = stream, coding, pace

    def __iter__(self) -> Iterator[bytes]:
        size, most = 0, self._pace.most
        with _as_httpx2():
            for piece in self._uncompressed():
                size += len(piece)
                if most is not None and size > most:
                    raise Excess(f"its answer is longer than {most // MIB} MiB")
                self._pace.shortened(None)
                yield piece

    def _uncompressed(self) -> Iterator[bytes]:
        if self._coding in ("", "identity"):
            yield from self._stream
            return
        if self._coding not in ("gzip", "x-gzip"):
            raise Excess(f"its answer is compressed by {self._coding[:40]!r}, not by gzip")
        opened = zlib.decompressobj(16 + zlib.MAX_WBITS)
        for data in self._stream:
            while data:
                if piece := opened.decompress(data, _PIECE):
                    yield piece
                data = opened.unconsumed_tail
        yield opened.flush()
        if not opened.eof:
            raise Excess("its compressed answer was cut short")

    def close(self) -> None:
        self._stream.close()


class _Connector(httpcore2.NetworkBackend):
    """Connects to the addresses of a name, one after the other."""

    def __init__(self, pace: Pace) -> None:
        self._pace, self._plain = pace, httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        until = time.monotonic() + (self._pace.shortened(timeout) or _CONNECT_SECONDS)
        try:
            found = resolve_within(host, port, until - time.monotonic())
        except (OSError, ValueError, RuntimeError) as error:
            raise httpcore2.ConnectError(str(error)) from error
        failed: Exception = httpcore2.ConnectError(f"{host} has no address")
        for number, (_, address) in enumerate(found):
            left = (until - time.monotonic()) / (len(found) - number)
            if left <= 0:
                break
            # A link-local address has its interface's number.
            scope = f"%{address[3]}" if len(address) > 3 and address[3] else ""
            try:
                made = self._plain.connect_tcp(
                    f"{address[0].partition('%')[0]}{scope}",
                    port,
                    left,
                    local_address,
                    socket_options or (),
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
            else:
                return _Stream(made, self._pace)
        raise failed

    def sleep(self, seconds: float) -> None:
        self._plain.sleep(seconds)


class _Part(Enum):
    """How far an answer was read."""

    HEAD = 1
    BETWEEN = 2
    BODY = 3


class _Stream(httpcore2.NetworkStream):
    """A connection that gives the head of an answer alone, so that its body can be read here.

    ``layers`` of TLS: with two, to and by a proxy, the socket is not what the answer comes from.
    """

    def __init__(self, stream: httpcore2.NetworkStream, pace: Pace, layers: int = 0) -> None:
        self._stream, self._pace, self._layers = stream, pace, layers
        self._part = _Part.BODY
        self._seen = self._rest = b""

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._rest:
            data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        else:
            data = self._stream.read(max_bytes, self._pace.shortened(timeout))
        if self._part is _Part.HEAD:
            before, self._seen = self._seen, self._seen + data
            end = _END_OF_HEAD.search(self._seen, max(0, len(before) - 3))
            if end is not None:
                data, self._rest = data[: end.end() - len(before)], data[end.end() - len(before) :]
                self._part, self._seen = _Part.BETWEEN, b""
        else:
            self._part = _Part.BODY
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._part, self._seen, self._rest = _Part.HEAD, b"", b""
        self._stream.write(buffer, self._pace.shortened(timeout))

    def after_head(self) -> bytes | None:
        """Return what has arrived of the body, which whoever asks goes on to read; None where some
        of it was read already."""
        if self._part is not _Part.BETWEEN:
            return None
        rest, self._rest, self._part = self._rest, b"", _Part.BODY
        return rest

    def reading(self, timeout: float | None) -> Callable[[], bytes]:
        """Return a function that reads on, with nothing between it and the socket where that can
        be; ``timeout`` is that of one read in seconds."""
        if self._layers > 1:
            return lambda: self._stream.read(_READ, timeout)
        connection: socket.socket = self._stream.get_extra_info("socket")
        connection.settimeout(timeout)
        receive = connection.recv

        def read() -> bytes:
            try:
                return receive(_READ)
            except TimeoutError as error:
                raise httpcore2.ReadTimeout(error) from error
            except OSError as error:
                raise httpcore2.ReadError(error) from error

        return read

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        seconds = self._pace.shortened(timeout)
        inner = self._stream.start_tls(ssl_context, server_hostname, seconds)
        return _Stream(inner, self._pace, self._layers + 1)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@contextmanager
def _as_httpx2() -> Iterator[None]:
    """Raise httpx2's exception of the same name in place of the pool's."""
    try:
        yield
    except (
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.ProxyError,
        httpcore2.TimeoutException,
        httpcore2.UnsupportedProtocol,
    ) as error:
        raise getattr(httpx2, type(error).__name__)(str(error)) from error
