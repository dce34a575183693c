"""Where an etcd cluster is, and who we are to it: the values of flanneld's ``--etcd-*`` flags."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from ipaddress import ip_address

from flannel_dp.errors import AuthFailed, ConfigError

DEFAULT_ENDPOINTS = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
"""flanneld's default of ``--etcd-endpoints``."""

DEFAULT_PREFIX = "/coreos.com/network"
"""flanneld's default of ``--etcd-prefix``."""

_PORT = 2379
_ENDPOINT = re.compile(r"(?:(https?)://)?(\[[0-9A-Fa-f:.%\w]+\]|[\w.-]+)(?::([0-9]{1,5}))?/*")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One member's client URL. ``host`` is a name or an address without brackets."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @property
    def literal(self) -> bool:
        """Whether the host is an address, which needs no name server."""
        try:
            ip_address(self.host)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach an etcd cluster, and the prefix of flannel's keys in it.

    ``endpoints`` are URLs (``http://`` or ``https://``, port 2379 unless given; without a
    scheme it is https when there is a certificate or CA file). ``certfile`` and
    ``keyfile`` (PEM) are our client certificate, ``cafile`` (PEM) is the CA to trust, the
    system's where it is empty; these files are read at each connection, so
    that renewed certificates are taken up. ``password_file``, where given, is read at
    each authentication and goes before ``password``. Neither is ever part of a text
    made from this value.

    Raises ConfigError, naming the flag, for values that cannot be used.
    """

    endpoints: tuple[str, ...] = DEFAULT_ENDPOINTS
    prefix: str = DEFAULT_PREFIX
    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""

    def __post_init__(self) -> None:
        if not self.prefix.strip("/") or not self.prefix.isprintable():
            raise ConfigError(
                f"--etcd-prefix {self.prefix!r}: not the prefix of a key",
                hint=f"flannel's own is {DEFAULT_PREFIX}",
            )
        if bool(self.keyfile) != bool(self.certfile):
            given, missing = ("keyfile", "certfile")[:: 1 if self.keyfile else -1]
            raise ConfigError(
                f"--etcd-{given} is given without --etcd-{missing}",
                hint="a client certificate is a certificate and its key: give both, or neither",
            )
        secret = self.password or self.password_file
        if bool(self.username) != bool(secret):
            given, missing = ("username", "password")[:: 1 if self.username else -1]
            raise ConfigError(
                f"--etcd-{given} is given without --etcd-{missing}",
                hint="give both to log in to etcd, or neither",
            )
        if not self.members:
            raise ConfigError(
                "--etcd-endpoints is empty",
                hint="write it like http://192.0.2.1:2379,http://192.0.2.2:2379",
            )

    @property
    def members(self) -> tuple[Endpoint, ...]:
        """The endpoints, read; each once, in their order."""
        secure = bool(self.certfile or self.cafile)
        return tuple(dict.fromkeys(_endpoint(text.strip(), secure) for text in self.endpoints))

    def key(self, *parts: str) -> bytes:
        """Return a key below the prefix, made as flannel's ``path.Join`` makes it."""
        prefix = posixpath.normpath(self.prefix)
        if prefix.startswith("//"):  # which POSIX keeps, and Go does not
            prefix = prefix[1:]
        return "/".join((prefix, *parts)).encode()

    def secret(self) -> str:
        """Return the password. Raises AuthFailed when its file cannot be read."""
        if not self.password_file:
            return self.password
        try:
            with open(self.password_file, encoding="utf-8") as file:
                return file.read(1 << 16).rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise AuthFailed(
                f"etcd password file {self.password_file!r}: cannot be read: {reason}",
                hint="make it a file that this user may read",
            ) from None


def _endpoint(text: str, secure: bool) -> Endpoint:
    match = _ENDPOINT.fullmatch(text)
    port = int(match[3] or _PORT) if match else 0
    if match is None or not 0 < port < 65536:
        # What stands before an @ may be a password.
        shown = text if "@" not in text else f"...@{text.rpartition('@')[2]}"
        raise ConfigError(
            f"--etcd-endpoints: {shown!r} is not an endpoint",
            hint="write it like http://192.0.2.1:2379 or https://etcd.example.org:2379",
        )
    tls = match[1] == "https" if match[1] else secure
    return Endpoint(match[2].strip("[]"), port, tls)
