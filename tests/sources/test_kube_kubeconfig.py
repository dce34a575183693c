"""What a kubeconfig may say beyond address, CA and a fixed token: exec commands, the name in the
server's certificate, a proxy, and another user to act as."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import AuthFailed, ConfigError, Unavailable
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.credentials import ExecToken, FileToken
from flannel_dp.sources.kube.kubeconfig import Exec
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer, Certificates
from tests.lib.kube import kubeconfig, listed, names, node, refused
from tests.lib.stand_ins import Clock

V1 = "client.authentication.k8s.io/v1"


@pytest.fixture(name="with_user")
def with_user_fixture(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> Callable[..., KubeOptions]:
    """``with_user(user, **cluster)``: options by a kubeconfig that says so."""
    server.put(node(1))

    def make(user: dict[str, Any], **cluster: Any) -> KubeOptions:
        path = kubeconfig(tmp_path / "k", server.url, certificates.ca, user, **cluster)
        return KubeOptions(kubeconfig=str(path), environ={})

    return make


# ---- exec


def exec_of(script: str, **more: Any) -> dict[str, Any]:
    return {"exec": {"apiVersion": V1, "command": "sh", "args": ["-c", script], **more}}


def credential(token: str = "secret", **status: str) -> str:
    return json.dumps(
        {"apiVersion": V1, "kind": "ExecCredential", "status": {"token": token, **status}}
    )


def test_an_exec_command_of_v1(
    server: ApiServer, with_user: Callable[..., KubeOptions], tmp_path: Path
) -> None:
    """It is told what is asked for, and of the cluster where it wants that."""
    info = tmp_path / "info"
    script = f'printf %s "$KUBERNETES_EXEC_INFO" > {info}; echo "$CREDENTIAL"'
    env = [{"name": "CREDENTIAL", "value": credential()}]
    mode = "Never"

    assert names(with_user(exec_of(script, env=env, interactiveMode=mode))) == ["node-00001"]
    told = json.loads(info.read_text())
    assert told == {"apiVersion": V1, "kind": "ExecCredential", "spec": {"interactive": False}}

    assert names(with_user(exec_of(script, env=env, provideClusterInfo=True))) == ["node-00001"]
    assert json.loads(info.read_text())["spec"]["cluster"] == {"server": server.url}


def test_a_command_beside_the_kubeconfig(
    with_user: Callable[..., KubeOptions], tmp_path: Path
) -> None:
    plugin = tmp_path / "plugins" / "token"
    plugin.parent.mkdir()
    plugin.write_text(f"#!/bin/sh\necho '{credential()}'\n")
    plugin.chmod(0o755)

    user = {"exec": {"apiVersion": V1, "command": "./plugins/token"}}

    assert names(with_user(user)) == ["node-00001"]


def test_a_token_is_kept_until_it_ends(tmp_path: Path) -> None:
    clock, asked = Clock(), tmp_path / "asked"
    start = clock.now = 1_900_000_000.0
    ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start + 100))
    script = f"echo x >> {asked}; echo '{credential(expirationTimestamp=ends)}'"
    token = ExecToken(Exec(V1, "sh", ["-c", script]), {}, clock)

    for seconds, count in ((0, 1), (99, 1), (100, 2)):
        clock.now = start + seconds
        bearer(token)
        assert asked.read_text().count("x") == count, seconds


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (credential().replace("/v1", "/v1beta1"), "apiVersion"),
        (json.dumps({"status": {"clientCertificateData": "x"}}), "clientCertificateData"),
    ],
)
def test_what_a_command_prints_that_cannot_be_used(
    with_user: Callable[..., KubeOptions], printed: str, said: str
) -> None:
    error = refused(with_user(exec_of(f"echo '{printed}'")))

    assert isinstance(error, AuthFailed)
    assert said in error.message


# ---- a token in a file


def bearer(auth: Any) -> str:
    """The header that the next request has."""
    import httpx2

    request = next(auth.sync_auth_flow(httpx2.Request("GET", "https://192.0.2.1/")))
    return str(request.headers["Authorization"])


def test_a_token_file_is_read_again_each_minute(tmp_path: Path) -> None:
    """Not only when the server rejects the old one; a file that is being replaced costs nothing."""
    clock, path = Clock(), tmp_path / "token"
    path.write_text("first\n")
    token = FileToken(str(path), clock)
    assert bearer(token) == "Bearer first"
    path.write_text("second\n")
    clock.now += 59.0
    assert bearer(token) == "Bearer first"
    clock.now += 1.0
    assert bearer(token) == "Bearer second"

    path.unlink()
    clock.now += 60.0
    assert bearer(token) == "Bearer second"
    path.write_text("")
    clock.now += 60.0
    assert bearer(token) == "Bearer second"
    path.write_text("third")
    clock.now += 60.0
    assert bearer(token) == "Bearer third"


# ---- the server


def test_tls_server_name(
    certificates: Certificates, make_server: Callable[..., ApiServer], tmp_path: Path
) -> None:
    """The certificate has to be for that name, and no other will do."""
    server = make_server(certificates.issue("api.example"), tokens={"secret"})
    server.put(node(1))

    def options(**cluster: str) -> KubeOptions:
        user: dict[str, object] = {"token": "secret"}
        path = kubeconfig(tmp_path / "k", server.url, certificates.ca, user, **cluster)
        return KubeOptions(kubeconfig=str(path))

    assert names(options(**{"tls-server-name": "api.example"})) == ["node-00001"]
    for cluster in ({}, {"tls-server-name": "other.example"}):
        error = refused(options(**cluster))
        assert isinstance(error, Unavailable)
        assert "not trusted" in error.message


def test_act_as_another_user(server: ApiServer, with_user: Callable[..., KubeOptions]) -> None:
    user = {
        "token": "secret",
        "as": "system:node:a",
        "as-uid": "7",
        "as-groups": ["system:nodes", "others"],
        "as-user-extra": {"Example.org/Reason": ["a b"]},
    }

    assert names(with_user(user)) == ["node-00001"]

    headers = server.last("list").headers
    assert headers["Impersonate-User"] == "system:node:a"
    assert headers["Impersonate-Uid"] == "7"
    assert headers.get_all("Impersonate-Group") == ["system:nodes", "others"]
    assert headers["Impersonate-Extra-example.org%2Freason"] == "a b"


# ---- what cannot be honoured is named


@pytest.mark.parametrize(
    ("user", "cluster", "key"),
    [
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider"),
        ({"exec": {"apiVersion": "example.org/v1", "command": "x"}}, {}, "exec.apiVersion"),
        (exec_of("true", interactiveMode="Always"), {}, "exec.interactiveMode"),
        ({"exec": {"command": "x"}}, {}, "apiVersion"),
        ({"token": "t", "as-groups": ["g"]}, {}, "as-groups"),
        ({"token": "t"}, {"proxy-url": "ftp://192.0.2.1"}, "proxy-url"),
        ({"token": "t"}, {"proxy-url": 7}, "proxy-url"),
        ({"token": "t"}, {"tls-server-name": ["a"]}, "tls-server-name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_that_cannot_be_used_is_named(
    with_user: Callable[..., KubeOptions],
    user: dict[str, Any],
    cluster: dict[str, Any],
    key: str,
) -> None:
    options = with_user(user, **cluster)

    with pytest.raises(ConfigError, match=key) as caught:
        KubeSource(options)

    assert options.kubeconfig in caught.value.message
    assert caught.value.hint


def test_keys_that_are_no_ones_business(with_user: Callable[..., KubeOptions]) -> None:
    cluster = {"disable-compression": True, "extensions": [{"name": "x", "extension": {}}]}

    assert listed(with_user({"token": "secret"}, **cluster)).claims.leases
