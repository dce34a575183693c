"""A kubeconfig: its current context, with what lightkube does not read of it.

https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/ lists the keys. Those that cannot be
honoured are errors that name the key, as a request without them would be another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec
from msgspec.structs import replace

from flannel_dp.cluster.lease import printable
from flannel_dp.errors import NotYet

if TYPE_CHECKING:
    from lightkube import SingleConfig

#: Versions of the protocol of exec commands that are spoken.
EXEC_VERSIONS = tuple(
    f"client.authentication.k8s.io/{one}" for one in ("v1", "v1beta1", "v1alpha1")
)

_PROXIES = ("http", "https", "socks5", "socks5h")


class EnvVar(msgspec.Struct, frozen=True):
    """A variable for an exec command."""

    name: str
    value: str = ""


class Exec(msgspec.Struct, frozen=True, rename="camel"):
    """The command that prints credentials; ``directory`` is that of the kubeconfig."""

    api_version: str
    command: str
    args: list[str] | None = None
    env: list[EnvVar] | None = None
    install_hint: str = ""
    provide_cluster_info: bool = False
    interactive_mode: str = "IfAvailable"
    directory: str = ""


class _Cluster(msgspec.Struct):
    server_name: str = msgspec.field(name="tls-server-name", default="")
    proxy: str = msgspec.field(name="proxy-url", default="")


class _User(msgspec.Struct):
    user: str = msgspec.field(name="as", default="")
    uid: str = msgspec.field(name="as-uid", default="")
    groups: list[str] | None = msgspec.field(name="as-groups", default=None)
    extra: dict[str, list[str]] | None = msgspec.field(name="as-user-extra", default=None)
    command: Exec | None = msgspec.field(name="exec", default=None)
    provider: Any = msgspec.field(name="auth-provider", default=None)


class Extras(msgspec.Struct, frozen=True):
    """What a context says beyond lightkube's model: the name to verify the server's certificate
    by, the proxy, headers that name another user, and the exec command with what it is told of
    the cluster. "" and None where it says nothing."""

    server_name: str = ""
    proxy: str = ""
    impersonate: tuple[tuple[str, str], ...] = ()
    command: Exec | None = None
    cluster: dict[str, Any] = {}


def read_kubeconfig(path: str) -> tuple[SingleConfig, Extras]:
    """Return the current context of a kubeconfig. Raises NotYet for a file that is missing or
    cannot be used, naming what is wrong with it: another program writes it, and may again."""
    import yaml  # type: ignore[import-untyped]
    from lightkube import ConfigError as KubeConfigError
    from lightkube import KubeConfig

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        found = KubeConfig.from_dict(document, fname=Path(path).expanduser()).get()
        if found is None:
            raise unusable(path, "no current-context")
        return found, _extras(path, document, found)
    except yaml.YAMLError as error:
        # Its text quotes the file, which holds secrets.
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: not YAML" if mark else "not YAML"
        raise unusable(path, reason) from None
    except KeyError as error:
        raise unusable(path, f"{error.args[0]!r} is missing") from error
    except (KubeConfigError, OSError, TypeError, AttributeError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise unusable(path, printable(said, 300) or type(error).__name__) from error


def unusable(path: str, reason: str, hint: str = "") -> NotYet:
    """Return the error for a kubeconfig."""
    return NotYet(
        f"{path}: not usable as a kubeconfig: {reason}",
        hint=hint
        or "give --kubeconfig-file a file with a current-context, its cluster and its user",
    )


def _extras(path: str, document: dict[str, Any], found: SingleConfig) -> Extras:
    clusters = {one["name"]: one["cluster"] for one in document["clusters"]}
    users = {one["name"]: one["user"] for one in document.get("users") or []}
    described = clusters[found.context.cluster] or {}
    cluster = msgspec.convert(described, _Cluster)
    user = msgspec.convert(users.get(found.context.user) or {}, _User)
    if user.provider is not None:
        hint = "use a token, a client certificate, or an exec command"
        raise unusable(path, "auth-provider is not supported", hint)
    if cluster.proxy and urlsplit(cluster.proxy).scheme not in _PROXIES:
        hint = f"write it like http://192.0.2.1:3128; schemes are {', '.join(_PROXIES)}"
        raise unusable(path, f"proxy-url {printable(cluster.proxy, 80)!r} is not a proxy", hint)
    if not user.user and (user.uid or user.groups or user.extra):
        hint = "name the user in 'as', too, or remove the others"
        raise unusable(path, "as-uid, as-groups and as-user-extra need 'as'", hint)
    command = user.command
    if command is not None:
        _check_exec(path, command)
        command = replace(command, directory=str(Path(path).expanduser().parent))
    told = {key: described[key] for key in _TOLD if key in described}
    return Extras(cluster.server_name, cluster.proxy, tuple(_impersonate(user)), command, told)


#: What an exec command with provideClusterInfo is told, by the names in the kubeconfig.
_TOLD = (
    "server", "tls-server-name", "insecure-skip-tls-verify", "certificate-authority-data",
    "proxy-url",
)  # fmt: skip


def _check_exec(path: str, command: Exec) -> None:
    if command.api_version not in EXEC_VERSIONS:
        raise unusable(
            path,
            f"exec.apiVersion {printable(command.api_version, 80)!r} is not supported",
            f"write one of {', '.join(EXEC_VERSIONS)}",
        )
    if command.interactive_mode == "Always":
        hint = "use a command that needs no terminal"
        raise unusable(path, "exec.interactiveMode Always: no person is there to answer", hint)


def _impersonate(user: _User) -> Iterator[tuple[str, str]]:
    """Yield the headers of impersonation: https://kubernetes.io/docs/reference/access-authn-authz/
    authentication/#user-impersonation."""
    if user.user:
        yield "Impersonate-User", user.user
    if user.uid:
        yield "Impersonate-Uid", user.uid
    for group in user.groups or ():
        yield "Impersonate-Group", group
    for key, values in (user.extra or {}).items():
        for value in values:
            yield f"Impersonate-Extra-{quote(key.lower(), safe='')}", value
