"""How to reach a Kubernetes API server, and with which credentials.

Both come from options, a kubeconfig or a service account.
"""

from __future__ import annotations

import math
import os
import ssl
from base64 import b64decode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flannel_dp.cluster.lease import ANNOTATION_PREFIX, annotation_keys_prefix, printable
from flannel_dp.errors import ConfigError
from flannel_dp.sources.kube.kubeconfig import Extras, read_kubeconfig

if TYPE_CHECKING:
    from lightkube import SingleConfig

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where a pod finds its token and the API server's CA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeOptions:
    """How to reach a Kubernetes API server, and how to behave there.

    ``kubeconfig`` names a file, whose current context is used; without it the pod's
    service account is (token and ca.crt in ``service_account``, the address from
    KUBERNETES_SERVICE_HOST and _PORT). ``api_url`` replaces the server's address. An
    ``api_url`` without kubeconfig and service account is spoken to without credentials,
    and a service account's token is never sent over plain http.

    Times are seconds: ``connect_timeout`` for a connection, ``request_timeout`` of
    silence within an answer, ``dead_after`` until a watch whose packets get no answer
    is given up, ``watch_seconds`` after which the server is asked to end a watch, and
    ``retry_seconds``, the longest pause between two attempts. ``page_size`` is the number
    of nodes asked for at once.

    Raises ConfigError for values that cannot be used.
    """

    kubeconfig: str = ""
    api_url: str = ""
    annotation_prefix: str = ANNOTATION_PREFIX
    node_name: str = ""
    set_node_network_unavailable: bool = True
    service_account: str = SERVICE_ACCOUNT
    environ: Mapping[str, str] = field(
        default_factory=lambda: os.environ, repr=False, compare=False
    )
    connect_timeout: float = 5.0
    request_timeout: float = 10.0
    dead_after: float = 25.0
    watch_seconds: float = 300.0
    retry_seconds: float = 10.0
    page_size: int = 500

    def __post_init__(self) -> None:
        annotation_keys_prefix(self.annotation_prefix)
        if self.api_url and not self.api_url.startswith(("https://", "http://")):
            raise ConfigError(
                f"Kubernetes API URL {self.api_url!r}: neither https:// nor http://",
                hint="write --kube-api-url like https://192.0.2.1:6443",
            )
        for name in (
            "connect_timeout", "request_timeout", "dead_after", "watch_seconds",
            "retry_seconds", "page_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} {value!r}: not above 0", hint="leave the default")


class Access(NamedTuple):
    """Where an API server is, and who we are to it; ``extras`` are what a kubeconfig says beyond
    lightkube's model."""

    config: SingleConfig
    extras: Extras


def load_config(options: KubeOptions) -> SingleConfig:
    """Return ``load_access`` without the extras."""
    return load_access(options).config


def load_access(options: KubeOptions) -> Access:
    """Return where the API server is and who we are, from a kubeconfig or a service account.

    Raises NotYet for a kubeconfig that is missing or cannot be used, naming what is wrong with it,
    and ConfigError where there is neither that nor a service account.
    """
    from lightkube.config.models import User

    if options.kubeconfig:
        config, extras = read_kubeconfig(options.kubeconfig)
    else:
        config, extras = _of_service_account(options), Extras()
    if options.api_url:
        config.cluster.server = options.api_url
    user = config.user or User()
    if user.token_file:
        user.token_file = str(config.abs_file(user.token_file))
    return Access(config._replace(user=user), extras)


def _of_service_account(options: KubeOptions) -> SingleConfig:
    from lightkube import KubeConfig
    from lightkube.config.models import Cluster, User

    account = Path(options.service_account)
    token, authority = account / "token", account / "ca.crt"
    host = options.environ.get("KUBERNETES_SERVICE_HOST", "")
    port = options.environ.get("KUBERNETES_SERVICE_PORT", "443")
    server = options.api_url or f"https://{f'[{host}]' if ':' in host else host}:{port}"
    cluster, user = Cluster(server=server), User()
    if token.is_file() and server.startswith("https://"):
        user.token_file = str(token)
        cluster.certificate_auth = str(authority) if authority.is_file() else None
    elif not options.api_url:
        raise ConfigError(
            f"{token}: there is no service account's token, and no kubeconfig was given",
            hint="run in a pod with a service account, or give --kubeconfig-file",
        )
    if not host and not options.api_url:
        raise ConfigError(
            "KUBERNETES_SERVICE_HOST: not set, so the API server's address is not known",
            hint="run in a pod, or give --kubeconfig-file or --kube-api-url",
        )
    found = KubeConfig.from_one(cluster=cluster, user=user).get()
    assert found is not None  # it has one context, which is the current one
    return found


def tls_of(config: SingleConfig) -> ssl.SSLContext:
    """Whom to trust, and with which certificate to introduce ourselves.

    What the kubeconfig embeds stays in memory. Raises OSError (ssl.SSLError is one) and
    ValueError for what cannot be read.
    """
    cluster, user = config.cluster, config.user
    if cluster.certificate_auth_data:
        authority = b64decode(cluster.certificate_auth_data).decode("ascii")
        context = ssl.create_default_context(cadata=authority)
    elif cluster.certificate_auth:
        context = ssl.create_default_context(cafile=config.abs_file(cluster.certificate_auth))
    else:
        context = ssl.create_default_context()
    if cluster.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if user is not None and (user.client_cert_data or user.client_cert):
        with (
            _as_file(config, user.client_cert_data, user.client_cert) as certificate,
            _as_file(config, user.client_key_data, user.client_key) as key,
        ):
            context.load_cert_chain(certificate, key)
    return context


@contextmanager
def _as_file(config: SingleConfig, data: str | None, path: str | None) -> Iterator[str]:
    """The name of a file that holds ``data``, else ``path``; OpenSSL reads keys of files only."""
    if not data:
        yield str(config.abs_file(path or ""))
        return
    content = b64decode(data)
    fd = os.memfd_create("kubeconfig")
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def server_text(text: str) -> str:
    """Return a server's text for a message, printable and at most 300 characters long."""
    return printable(text, 300)


def reason_of(error: BaseException) -> str:
    """Return what a library's error says, for a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return server_text(text) or type(error).__name__
