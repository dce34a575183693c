"""A connection to a Kubernetes API server: address, credentials and errors.

lightkube reads kubeconfigs, httpx2 brings the HTTP. The requests are our own: lightkube's watch
knows no bookmarks, starts over without reporting deletions after a 410, and waits for ever on a
connection that is gone.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import msgspec

from flannel_dp.errors import AuthFailed, Compacted, ConfigError, NotYet, SourceError, Unavailable
from flannel_dp.sources.kube.config import KubeOptions, load_access, reason_of, server_text, tls_of
from flannel_dp.sources.limits import ANSWER_SECONDS, OBJECT_BYTES, Excess, Pace

if TYPE_CHECKING:
    import httpx2


#: Who wrote a field, in the managedFields of an object.
FIELD_MANAGER = "flannel-dp"


class RequestRejected(Unavailable):
    """The API server answered, and not with what was asked for.

    ``code`` is the HTTP status, or that of a watch's ERROR event; ``retry_after`` the
    seconds the server asks to wait.
    """

    def __init__(self, message: str, *, code: int, retry_after: float = 0.0, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retry_after = retry_after


class Forbidden(AuthFailed):
    """The API server knows the account and does not let it do this: a 403."""


class _Details(msgspec.Struct, gc=False, rename="camel"):
    retry_after_seconds: float = 0.0


class ApiStatus(msgspec.Struct, gc=False):
    """The API's Status object, as far as it says why."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: _Details | None = None


class KubeApi:
    """Requests to one API server. For one thread at a time; nothing is sent before the first.

    After a failure the next request reads the credentials and connects again, so
    that a rotated certificate or kubeconfig is found. Every request raises Unavailable
    (RequestRejected when the server answered), AuthFailed or Compacted, naming the server, the
    request and the fix.

    Raises ConfigError for a kubeconfig, service account or certificate that cannot be used.
    """

    def __init__(self, options: KubeOptions) -> None:
        self._options = options
        self._pace = Pace()
        self._client: httpx2.Client | None = None
        self._client = self._connect()

    @property
    def origin(self) -> str:
        """The name of the server in messages."""
        return f"Kubernetes API {self._server}"

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def get(
        self,
        path: str,
        params: Mapping[str, str | int] | None = None,
        *,
        rule: str,
        most: int = OBJECT_BYTES,
    ) -> bytes:
        """GET ``path``; ``rule`` is what RBAC has to grant for it, for messages. An answer of over
        ``most`` bytes is Unavailable, and one that takes over ``ANSWER_SECONDS``."""
        return self._request("GET", path, params or {}, rule=rule, most=most)

    def patch(self, path: str, patch: object, *, rule: str) -> bytes:
        """PATCH ``path`` with a strategic merge patch."""
        headers = {"Content-Type": "application/strategic-merge-patch+json"}
        body = msgspec.json.encode(patch)
        params = {"fieldManager": FIELD_MANAGER}
        return self._request("PATCH", path, params, rule=rule, content=body, headers=headers)

    @contextmanager
    def watch(
        self, path: str, params: Mapping[str, str | int], *, rule: str, accept: str
    ) -> Iterator[WatchBody]:
        """GET ``path`` as a stream that is kept for ``watch_seconds`` or longer; ``accept`` are
        the forms of objects that will do."""
        import httpx2

        options = self._options
        what = f"GET {path}?watch"
        timeout = httpx2.Timeout(
            options.request_timeout,
            connect=options.connect_timeout,
            read=options.watch_seconds + options.request_timeout,
        )
        with self._errors(what):
            client = self._client = self._client or self._connect()
            self._pace.allow(ANSWER_SECONDS, OBJECT_BYTES)
            request = client.build_request(
                "GET",
                path,
                params=params,
                headers={"accept": accept},
                timeout=timeout,
                extensions=self._extensions,
            )
            response = client.send(request, stream=True)
        try:
            with self._errors(what):
                if not response.is_success:
                    response.read()
                else:
                    self._pace.allow(None, None)
            if not response.is_success:
                raise self._refusal(response, what, rule)
            yield WatchBody(response, what, self._errors, options.dead_after)
        finally:
            response.close()

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str | int],
        *,
        rule: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        most: int = OBJECT_BYTES,
    ) -> bytes:
        what = f"{method} {path}"
        with self._errors(what):
            client = self._client = self._client or self._connect()
            self._pace.allow(ANSWER_SECONDS, most)
            response = client.request(
                method,
                path,
                params=params,
                content=content,
                headers=headers,
                extensions=self._extensions,
            )
        if not response.is_success:
            raise self._refusal(response, what, rule)
        return response.content

    def _connect(self) -> httpx2.Client:
        import httpx2

        from flannel_dp.sources.kube.credentials import auth_of
        from flannel_dp.sources.kube.transport import transport_for

        config, extras = load_access(self._options)
        self._server = config.cluster.server
        timeout = httpx2.Timeout(
            self._options.request_timeout, connect=self._options.connect_timeout
        )
        # Whose name the certificate has to have, where that is not the server's.
        self._extensions = {"sni_hostname": extras.server_name} if extras.server_name else {}
        headers = [("accept-encoding", "gzip"), ("user-agent", _user_agent())]
        try:
            return httpx2.Client(
                base_url=self._server,
                transport=transport_for(self._server, tls_of(config), self._pace, extras.proxy),
                auth=auth_of(config.user, extras),
                timeout=timeout,
                headers=[*headers, *extras.impersonate],
            )
        except (OSError, ValueError, httpx2.InvalidURL) as error:
            where = self._options.kubeconfig or self._options.service_account
            missing = isinstance(error, FileNotFoundError)
            raise (NotYet if missing else ConfigError)(
                f"{where}: its certificates or its server cannot be used: {reason_of(error)}",
                hint="check certificate-authority, client-certificate, client-key and server",
            ) from error

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn what the libraries raise into our errors; nothing of it is kept open."""
        import httpx2
        from lightkube import ConfigError as KubeConfigError

        where = f"{self.origin}: {what}"
        try:
            yield
        except KubeConfigError as error:
            self.close()
            raise AuthFailed(
                f"{where}: no credentials: {server_text(str(error))}",
                hint="check the token file or the exec command of the kubeconfig's user",
            ) from error
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            self.close()
            raise _failure(where, error) from error
        except (OSError, KeyError, ValueError) as error:  # of a credential plugin
            self.close()
            raise AuthFailed(
                f"{where}: no credentials: {reason_of(error)}",
                hint="check the token file or the exec command of the kubeconfig's user",
            ) from error
        except MemoryError:
            raise
        except Exception as error:
            # httpx2.InvalidURL, zlib's, whatever else a library raises for an answer's bytes
            # or its headers: here, and nowhere else, they go through them.
            self.close()
            kind = "" if isinstance(error, Excess) else f"{type(error).__name__}: "
            raise Unavailable(
                f"{where}: unreadable answer: {kind}{reason_of(error)}",
                hint="check that the address is that of a Kubernetes API server",
            ) from error

    def _refusal(self, response: httpx2.Response, what: str, rule: str) -> SourceError:
        self.close()
        try:
            status = msgspec.json.decode(response.content, type=ApiStatus)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            status = ApiStatus()
            # A server that sheds load answers so: "Too many requests, please try again later."
            if response.headers.get("content-type", "").startswith("text/plain"):
                status.message = response.text.strip()
        status.code = response.status_code
        if status.details is None or not status.details.retry_after_seconds:
            asked = response.headers.get("retry-after", "")
            status.details = _Details(float(asked) if asked.isdecimal() else 0.0)
        return self.refusal(status, what, rule)

    def refusal(self, status: ApiStatus, what: str, rule: str) -> SourceError:
        """Return the error that a Status stands for."""
        reason = server_text(status.message or status.reason) or "without a reason"
        text = f"{self.origin}: {what}: {status.code}: {reason}"
        if status.code == 401:
            return AuthFailed(text, hint=f"renew the credentials in {self._credentials}")
        if status.code == 403:
            return Forbidden(text, hint=f"a ClusterRole bound to this account has to allow {rule}")
        if status.code == 410:
            return Compacted(text, hint="the nodes are listed again")
        wait = status.details.retry_after_seconds if status.details else 0.0
        hint = {
            404: "check the node's name, and that this is the right cluster",
            429: "the API server is busy; try again in a moment",
        }.get(
            status.code, "check the server's address and its health with: kubectl get --raw /readyz"
        )
        return RequestRejected(text, code=status.code, retry_after=max(0.0, wait), hint=hint)

    @property
    def _credentials(self) -> str:
        return self._options.kubeconfig or f"{self._options.service_account}/token"


class WatchBody:
    """The body of a watch, which another thread may end."""

    def __init__(
        self,
        response: httpx2.Response,
        what: str,
        errors: Callable[[str], AbstractContextManager[None]],
        dead_after: float,
    ) -> None:
        self._response = response
        self._what = what
        self._errors = errors
        self._socket: socket.socket | None = None
        network = response.extensions.get("network_stream")
        if network is not None:
            self._socket = network.get_extra_info("socket")
            self._notice_silence(dead_after)

    def _notice_silence(self, dead_after: float) -> None:
        """A server may be silent for as long as it likes, its machine may not (tcp(7))."""
        if self._socket is None or self._socket.family not in (socket.AF_INET, socket.AF_INET6):
            return
        for level, name, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(dead_after / 2))),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(dead_after / 6))),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after * 1000)),
        ):
            self._socket.setsockopt(level, name, value)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes as they arrive; ends when the server ends the watch in good order."""
        from flannel_dp.sources.kube.transport import direct_body

        with self._errors(self._what):
            yield from direct_body(self._response) or self._response.iter_bytes()

    def interrupt(self) -> None:
        """End ``chunks`` with an error; callable from any thread."""
        if self._socket is not None:
            try:
                # Not SSLSocket's own, which takes the TLS state away from the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:  # it is closed already
                return


def _user_agent() -> str:
    """Return who asks, as API servers log and meter it: ``flannel-dp/0.1.0``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"flannel-dp/{version('flannel-dp')}"
    except PackageNotFoundError:  # a source tree that was not installed
        return "flannel-dp"


def _failure(where: str, error: Exception) -> SourceError:
    """Return the error for a request that got no answer."""
    import httpx2

    tls = _cause(error)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return Unavailable(
            f"{where}: the server's certificate is not trusted: {server_text(tls.verify_message)}",
            hint="check the certificate-authority, the server's name in it and both clocks",
        )
    if tls is not None and "ALERT" in (tls.reason or ""):
        return AuthFailed(
            f"{where}: the server rejected our certificate: {server_text(tls.reason)}",
            hint="renew the client-certificate and client-key of the kubeconfig's user",
        )
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        reason = (
            "no answer in time" if isinstance(error, httpx2.TimeoutException) else reason_of(error)
        )
        return Unavailable(
            f"{where}: cannot connect: {reason}",
            hint="check the server's address, and that it can be reached from this node",
        )
    reason = "no answer in time" if isinstance(error, httpx2.TimeoutException) else reason_of(error)
    return Unavailable(f"{where}: {reason}", hint="check the server and the network path to it")


def _cause(error: BaseException) -> ssl.SSLError | None:
    """Return the TLS error that a client's error came from."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return cause
