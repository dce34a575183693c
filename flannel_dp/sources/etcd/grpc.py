"""gRPC as etcd speaks it: requests and streams on one HTTP/2 connection.

The protocol is that of gRPC's doc/PROTOCOL-HTTP2.md; HTTP/2 itself is the h2 library.
There is no thread here: a caller that waits for an answer waits on the socket, and an idle
stream costs one ping in ``KeepAlive.interval``.
"""

from __future__ import annotations

import logging
import select
import ssl
import time
from collections.abc import Callable, Iterable, Sequence

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from msgspec import Struct

from flannel_dp.cluster.lease import printable
from flannel_dp.sources.etcd.options import Endpoint
from flannel_dp.sources.etcd.rpc import (
    UNAVAILABLE,
    HttpStream,
    RpcStatus,
    answer_of,
    read_headers,
    split_messages,
    status_of,
)
from flannel_dp.sources.etcd.socket import ByteStream, Deadline, Lost
from flannel_dp.sources.limits import (
    IDLE_FRAMES,
    IDLE_FRAMES_A_SECOND,
    UNARY_MESSAGES,
    Allowance,
)

# It logs all headers, among them the token that we are logged in with.
logging.getLogger("hpack").setLevel(logging.WARNING)

#: What a stream and the connection may send before we say that we have read it, in bytes.
_STREAM_WINDOW, _WINDOW = 4 << 20, 16 << 20
#: What is taken in at once before the caller has its turn, in bytes.
_TURN = 1 << 20
#: A frame with so many bytes of a message is no idle one; a complete message makes up for frames
#: that a server sends along with it (headers, window updates, pings).
_USEFUL_BYTES, _FRAMES_OF_MESSAGE = 512, 16
_FRAME_HEADER = 9
#: Requests under way at once.
_PIPELINE = 64


Metadata = Sequence[tuple[str, str]]


class KeepAlive(Struct, frozen=True):
    """A ping after ``interval`` seconds in which nothing came, and how long its answer may
    take. etcd hangs up on clients that ping more often than --grpc-keepalive-min-time,
    5 s unless configured."""

    interval: float = 10.0
    timeout: float = 10.0


_KEEPALIVE = KeepAlive()


class Connection:
    """An HTTP/2 connection to one member. For one thread at a time.

    All methods raise Lost when it is gone (it is of no use then) and Stopped.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        context: ssl.SSLContext | None,
        deadline: Deadline,
        *,
        keepalive: KeepAlive = _KEEPALIVE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self._keepalive = keepalive
        self._clock = clock
        self._heard = clock()
        self._pinged: float | None = None
        self._greeted = False
        self._frames = _FrameCounter()
        self._idle = Allowance(IDLE_FRAMES, IDLE_FRAMES_A_SECOND, clock)
        self._streams: dict[int, HttpStream] = {}
        self._authority = str(endpoint).partition("//")[2]
        self._http = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding=None)
        )
        self._bytes = ByteStream(endpoint, context, deadline)
        try:
            self._greet(deadline)
        except BaseException:
            self.close()
            raise

    def _greet(self, deadline: Deadline) -> None:
        codes = h2.settings.SettingCodes
        self._http.initiate_connection()
        self._http.update_settings(
            {codes.ENABLE_PUSH: 0, codes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW}
        )
        self._http.increment_flow_control_window(_WINDOW - 65535)
        self._flush(deadline)

    def close(self) -> None:
        """Hang up."""
        self._bytes.close()

    def fileno(self) -> int:
        """Return the descriptor that can be read when there is something to ``pump``."""
        return self._bytes.fileno()

    # ---- requests

    def unary(
        self, path: str, requests: Iterable[bytes], metadata: Metadata, deadline: Deadline
    ) -> list[bytes | RpcStatus]:
        """Send requests of one method and wait for all answers, which come in the order of
        the requests: a message each, or the RpcStatus it was rejected with."""
        results: dict[int, bytes | RpcStatus] = {}
        waiting = iter(requests)
        under_way: list[int] = []
        more = True
        while more or under_way:
            while more and len(under_way) < _PIPELINE:
                request = next(waiting, None)
                if request is None:
                    more = False
                    break
                stream = self.open(path, request, metadata, deadline, end=True)
                results[stream] = b""  # holds its place in the order
                under_way.append(stream)
            while under_way and not any(self._streams[stream].ended for stream in under_way):
                deadline.wait(self.fileno(), select.POLLIN)
                self.pump(deadline)
                if any(self._streams[one].complete > UNARY_MESSAGES for one in under_way):
                    raise Lost(
                        f"it answers one request with more than {UNARY_MESSAGES} messages",
                        hint="check that the endpoint is an etcd member",
                    )
            for stream in [stream for stream in under_way if self._streams[stream].ended]:
                under_way.remove(stream)
                results[stream] = answer_of(self._streams.pop(stream))
        return list(results.values())

    def open(
        self,
        path: str,
        message: bytes,
        metadata: Metadata,
        deadline: Deadline,
        *,
        end: bool = False,
    ) -> int:
        """Begin a call with its first message, which is the only one if ``end``; returns the
        number of its stream."""
        headers = [
            (":method", "POST"),
            (":scheme", "https" if self.endpoint.tls else "http"),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "flannel-dp"),
            *metadata,
        ]
        try:
            stream = self._http.get_next_available_stream_id()
            self._streams[stream] = HttpStream()
            self._http.send_headers(stream, headers)
        except h2.exceptions.H2Error as error:
            raise Lost(f"HTTP/2: {_reason(error)}") from error
        self.send(stream, message, deadline, end=end)
        return stream

    def send(self, stream: int, message: bytes, deadline: Deadline, *, end: bool = False) -> None:
        """Send one message on a stream that is open."""
        try:
            framed = b"\0" + len(message).to_bytes(4, "big") + message
            self._http.send_data(stream, framed, end_stream=end)
        except h2.exceptions.H2Error as error:
            raise Lost(f"HTTP/2: {_reason(error)}") from error
        self._flush(deadline)

    # ---- answers

    def pump(self, deadline: Deadline) -> None:
        """Take in what has come, without waiting for more.

        A member that sends without end holds the caller for a megabyte only, and not beyond
        the deadline.
        """
        taken = 0
        while taken < _TURN and (data := self._bytes.receive()):
            deadline.slice()
            taken += len(data)
            self._take_in(data)
            self._flush(deadline)

    def _take_in(self, data: bytes) -> None:
        self._heard = self._clock()
        self._pinged = None
        read: dict[int, int] = {}
        try:
            if not self._greeted and data.startswith(b"HTTP/1"):
                # Which would be the head of a very long frame.
                raise h2.exceptions.ProtocolError("HTTP/1")
            events = self._http.receive_data(data)
        except MemoryError:
            raise
        except Exception as error:
            # H2Error, and whatever h2, hpack and hyperframe raise below it: here, and
            # nowhere else, bytes of a stranger go through them.
            if "ConnectionState.CLOSED" in str(error):  # a ping behind a GOAWAY: it stops
                raise Lost("it ended the connection", hint="check that etcd runs there") from error
            raise Lost(
                f"it does not speak gRPC ({_reason(error)})",
                hint="check the port, and whether it is an http:// or an https:// endpoint",
            ) from error
        self._greeted = True
        useful = 0
        for event in events:
            useful += self._handle(event, read)
        try:
            for stream, count in read.items():
                self._http.acknowledge_received_data(count, stream)
        except (h2.exceptions.H2Error, LookupError, ValueError) as error:
            raise Lost(f"HTTP/2: {_reason(error)}") from error
        frames = self._frames.count(data)
        self._idle.earn(useful)
        if not self._idle.spend(frames):
            raise Lost(
                f"it sends HTTP/2 frames without a message, more than {IDLE_FRAMES} of them",
                hint="check that the endpoint is an etcd member, and proxies on the path to it",
            )

    def take(self, stream: int) -> tuple[list[bytes], RpcStatus | None]:
        """Return the messages that came on a stream since the last time, and how it ended if it
        did."""
        held = self._streams[stream]
        messages, held.messages, held.size = held.messages, [], 0
        return messages, status_of(held) if held.ended else None

    def _handle(self, event: h2.events.Event, read: dict[int, int]) -> int:
        """Take one event in, and return how many frames it is worth (``_idle``)."""
        if isinstance(event, h2.events.ConnectionTerminated):
            words = (event.additional_data or b"").decode("ascii", "replace")
            said = f" ({words})" if words.isprintable() and words else ""
            raise Lost(f"it ended the connection{said}", hint="check that etcd runs there")
        number = getattr(event, "stream_id", None)
        stream = self._streams.get(number) if number else None
        if stream is None or number is None:
            return 0
        if isinstance(event, h2.events.DataReceived):
            read[number] = read.get(number, 0) + event.flow_controlled_length
            before = stream.complete
            stream.data += event.data
            split_messages(stream)
            return (stream.complete - before) * _FRAMES_OF_MESSAGE or len(
                event.data
            ) // _USEFUL_BYTES
        if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
            read_headers(stream, event.headers or [])
        elif isinstance(event, h2.events.StreamEnded):
            stream.ended = True
        elif isinstance(event, h2.events.StreamReset):
            stream.status = RpcStatus(UNAVAILABLE, f"the call was broken off ({event.error_code})")
            stream.ended = True
        return 0

    def _flush(self, deadline: Deadline) -> None:
        if data := self._http.data_to_send():
            self._bytes.send(data, deadline)

    # ---- staying in touch

    @property
    def due(self) -> float:
        """By when ``tick`` has to be called, in the clock's seconds."""
        if self._pinged is not None:
            return self._pinged + self._keepalive.timeout
        return self._heard + self._keepalive.interval

    def tick(self, deadline: Deadline) -> None:
        """Ask for a sign of life if nothing came for long.

        Raises Lost when none came in time: a connection on which packets vanish, or a
        server that hangs, is like a quiet one.
        """
        now = self._clock()
        if now < self.due:
            return
        if self._pinged is not None:
            raise Lost(
                f"no sign of life for {self._keepalive.interval + self._keepalive.timeout:g} s",
                hint="check the network to it, and whether it hangs",
            )
        try:
            self._http.ping(b"still on")
        except h2.exceptions.H2Error as error:
            raise Lost(f"HTTP/2: {_reason(error)}") from error
        self._pinged = now
        self._flush(deadline)


class _FrameCounter:
    """Counts the frames of a connection by their headers (RFC 9113 section 4.1); h2 has no event
    for some of those that it passes over."""

    def __init__(self) -> None:
        self._skip = 0  # bytes of a payload that are still to come
        self._head = b""

    def count(self, data: bytes) -> int:
        """Return how many frames begin in ``data``, what comes next on the connection."""
        if self._head:
            data, self._head = self._head + data, b""
        at, frames = self._skip, 0
        while at + _FRAME_HEADER <= len(data):
            at += _FRAME_HEADER + int.from_bytes(data[at : at + 3], "big")
            frames += 1
        if at < len(data):
            self._head, self._skip = data[at:], 0
        else:
            self._skip = at - len(data)
        return frames


def _reason(error: Exception) -> str:
    text = printable(" ".join(str(error).split())[:200])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
