"""A byte stream to one etcd member, plain or TLS, that never blocks past a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

from msgspec import Struct

from flannel_dp.errors import SHORTAGES, AuthFailed
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions
from flannel_dp.sources.names import Address, resolve

#: A wait checks this often whether it was called off, in seconds.
_SLICE = 0.2
_CHUNK = 1 << 16
#: Of what a member sent before the connection broke, so many pieces are read for its reason.
_LAST_WORDS = 64

#: What a server says (RFC 8446 section 6) when it objects to the client's certificate.
_ALERTS = ("certificate", "unknown ca", "access denied", "handshake failure", "unknown psk")
_LIMITS = "raise this process's limits (LimitNOFILE=, TasksMax=, memory)"
_PLAIN_HINT = "check whether it is an http:// or an https:// endpoint"


class Stopped(Exception):
    """The caller has called it off."""


class Lost(Exception):
    """The connection could not be made, or is gone.

    ``hint`` says what to do where that is known; ``auth`` is True when one side did not
    accept the other's certificate.
    """

    def __init__(self, reason: str, *, hint: str = "", auth: bool = False) -> None:
        super().__init__(reason)
        self.hint = hint
        self.auth = auth


class Deadline(Struct):
    """Until when to wait (``time.monotonic``), and whether the caller has called it off."""

    at: float
    stopped: Callable[[], bool]

    def wait(self, fd: int, events: int) -> None:
        """Return when ``fd`` is ready for ``events`` (select.POLLIN, POLLOUT).

        Raises Lost after the deadline, Stopped when the caller has called it off.
        """
        poller = select.poll()
        poller.register(fd, events)
        while not poller.poll(self.slice() * 1000):
            pass

    def slice(self) -> float:
        """Return how long to wait before asking again, in seconds; raises as ``wait``."""
        if self.stopped():
            raise Stopped
        left = self.at - time.monotonic()
        if left <= 0:
            raise Lost("it does not answer", hint="check the network to it, and whether it hangs")
        return min(left, _SLICE)


def tls_context(options: EtcdOptions) -> ssl.SSLContext:
    """Read the certificates that the options name.

    Raises AuthFailed, naming the flag and the file, for those that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    if options.cafile:
        with _naming(f"--etcd-cafile {options.cafile!r}"):
            context.load_verify_locations(cafile=options.cafile)
    else:
        context.load_default_certs()
    if options.certfile:
        files = f"--etcd-certfile {options.certfile!r}, --etcd-keyfile {options.keyfile!r}"
        with _naming(files):
            # Without a password, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(options.certfile, options.keyfile, password="")
    return context


@contextlib.contextmanager
def _naming(files: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        reason = (error.reason or "no certificate or key in it").replace("_", " ").lower()
        raise AuthFailed(
            f"{files}: cannot be used: {reason}",
            hint="name PEM files; certificate and key have to belong together, the key unencrypted",
        ) from error
    except OSError as error:
        raise AuthFailed(
            f"{files}: cannot be read: {error.strerror or error}",
            hint="make them files that this user may read",
        ) from error


class ByteStream:
    """One connection. For one thread at a time.

    Raises Lost and Stopped, as all methods do.
    """

    def __init__(
        self, endpoint: Endpoint, context: ssl.SSLContext | None, deadline: Deadline
    ) -> None:
        self._endpoint = endpoint
        self._socket = _connect(endpoint, deadline)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self._shake_hands(context, deadline)
        except (OSError, ValueError) as error:  # ValueError: no name for TLS
            self.close()
            raise _lost(error) from error
        except BaseException:
            self.close()
            raise

    def _shake_hands(self, context: ssl.SSLContext, deadline: Deadline) -> None:
        secure = context.wrap_socket(
            self._socket, server_hostname=self._endpoint.host, do_handshake_on_connect=False
        )
        self._socket = secure
        while True:
            try:
                secure.do_handshake()
                return
            except ssl.SSLWantReadError:
                deadline.wait(secure.fileno(), select.POLLIN)
            except ssl.SSLWantWriteError:
                deadline.wait(secure.fileno(), select.POLLOUT)
            except OSError as error:
                raise _lost(error) from error

    def fileno(self) -> int:
        """Return the descriptor that can be read when there is something to ``receive``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def send(self, data: bytes, deadline: Deadline) -> None:
        """Send all of ``data``."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                deadline.wait(self.fileno(), select.POLLOUT)
            except ssl.SSLWantReadError:
                deadline.wait(self.fileno(), select.POLLIN)
            except OSError as error:
                self._hear_why()
                raise _lost(error) from error

    def _hear_why(self) -> None:
        """With TLS 1.3 a server that rejects our certificate says so after the handshake and
        closes the connection: its alert can still be read."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_LAST_WORDS):
                if not self.receive():
                    return

    def receive(self) -> bytes:
        """Return what has come, b"" when there is nothing; to be called until then."""
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return b""
        except OSError as error:
            raise _lost(error) from error
        if not data:
            raise Lost("it closed the connection", hint="check that etcd runs there")
        return data


def _connect(endpoint: Endpoint, deadline: Deadline) -> socket.socket:
    """Return the first of the host's addresses that answers."""
    last = Lost("its name has no address", hint="check the name in --etcd-endpoints")
    addresses = _resolve(endpoint, deadline)
    for number, (family, address) in enumerate(addresses):
        left = deadline.at - time.monotonic()
        share = Deadline(
            time.monotonic() + left / (len(addresses) - number), stopped=deadline.stopped
        )
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError as error:  # no descriptor is left, for instance
            raise _lost(error) from error
        try:
            made.setblocking(False)
            code = made.connect_ex(address)
            if code == errno.EINPROGRESS:
                share.wait(made.fileno(), select.POLLOUT)
                code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code == 0:
                return made
            last = _lost(OSError(code, os.strerror(code)))
        except Lost as error:
            last = error
        except OSError as error:
            last = _lost(error)
        except BaseException:
            made.close()
            raise
        made.close()
    raise last


def _resolve(endpoint: Endpoint, deadline: Deadline) -> list[Address]:
    """Return the addresses of the endpoint's host."""

    def wait(done: threading.Event) -> None:
        while not done.wait(deadline.slice()):
            pass

    try:
        return resolve(endpoint.host, endpoint.port, wait)
    except RuntimeError as error:
        raise Lost(f"its name cannot be resolved: {error}", hint=_LIMITS) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Lost(f"its name is not known: {reason}", hint="check --etcd-endpoints") from error


def _lost(error: OSError | ValueError) -> Lost:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Lost(
            f"its certificate is not accepted: {error.verify_message}",
            hint="check --etcd-cafile, the names and dates in etcd's certificate, and the clock",
            auth=True,
        )
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "broken off").replace("_", " ").lower()
        if "alert" in reason and any(word in reason for word in _ALERTS):
            return Lost(
                f"it does not accept our certificate: {reason.partition('alert ')[2] or reason}",
                hint="check --etcd-certfile: it may be missing, expired or of another authority",
                auth=True,
            )
        return Lost(f"TLS failed: {reason}", hint=_PLAIN_HINT)
    if not isinstance(error, OSError):
        return Lost(f"TLS failed: {error}", hint="check the names in --etcd-endpoints")
    if error.errno in SHORTAGES:
        return Lost(f"{os.strerror(error.errno)} on this node", hint=_LIMITS)
    reason = error.strerror or str(error)
    hint = "check that etcd runs there, the port, and the firewalls between"
    return Lost(reason[:1].lower() + reason[1:], hint=hint)
