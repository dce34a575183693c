"""Access to an API server: client certificates, tokens, credential plugins, and pods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flannel_dp.errors import AuthFailed, ConfigError, Unavailable
from flannel_dp.sources.kube.config import KubeOptions, load_config
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import ApiServer, Certificates
from tests.lib.kube import (
    b64,
    kubeconfig,
    names,
    node,
    refused,
)
from tests.lib.waiting import NEVER

# ---- who we are


@pytest.mark.parametrize("embedded", [False, True], ids=["files", "embedded"])
def test_client_certificates(
    certificates: Certificates,
    make_server: Callable[..., ApiServer],
    tmp_path: Path,
    embedded: bool,
) -> None:
    server = make_server(client_ca=certificates.ca)
    server.put(node(1))
    certificate, key = certificates.issue("admin")
    if embedded:
        user: dict[str, object] = {
            "client-certificate-data": b64(certificate),
            "client-key-data": b64(key),
        }
        trust: dict[str, object] = {"certificate-authority-data": b64(certificates.ca)}
        path = kubeconfig(tmp_path / "k", server.url, None, user, **trust)
    else:
        user = {"client-certificate": str(certificate), "client-key": str(key)}
        path = kubeconfig(tmp_path / "k", server.url, certificates.ca, user)

    assert names(KubeOptions(kubeconfig=str(path))) == ["node-00001"]


def test_paths_in_a_kubeconfig_are_relative_to_it(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> None:
    server.put(node(1))
    (tmp_path / "ca.crt").write_bytes(certificates.ca.read_bytes())
    (tmp_path / "token").write_text("secret\n")
    path = kubeconfig(tmp_path / "k", server.url, Path("ca.crt"), {"tokenFile": "token"})

    assert names(KubeOptions(kubeconfig=str(path))) == ["node-00001"]


@pytest.mark.parametrize("expired", [False, True], ids=["none", "expired"])
def test_a_refused_client_certificate(
    certificates: Certificates,
    make_server: Callable[..., ApiServer],
    tmp_path: Path,
    expired: bool,
) -> None:
    server = make_server(client_ca=certificates.ca)
    user: dict[str, object] = {"token": "secret"}
    if expired:
        certificate, key = certificates.issue("late", days=-1)
        user = {"client-certificate": str(certificate), "client-key": str(key)}
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, user)

    error = refused(KubeOptions(kubeconfig=str(path)))

    assert isinstance(error, AuthFailed)
    assert "client-certificate" in error.hint


@pytest.mark.parametrize("fault", ["other ca", "other name", "expired"])
def test_an_untrusted_server(
    certificates: Certificates,
    make_server: Callable[..., ApiServer],
    tmp_path: Path,
    fault: str,
) -> None:
    issuer = Certificates(tmp_path / "other") if fault == "other ca" else certificates
    address = "192.0.2.1" if fault == "other name" else "127.0.0.1"
    server = make_server(issuer.issue("bad", address, days=-1 if fault == "expired" else 2))
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "secret"})

    error = refused(KubeOptions(kubeconfig=str(path)))

    assert isinstance(error, Unavailable)
    assert "not trusted" in error.message
    assert "certificate-authority" in error.hint
    assert server.requests == [], "no token is told to a stranger"


def test_insecure_skip_tls_verify(server: ApiServer, tmp_path: Path) -> None:
    server.put(node(1))
    path = kubeconfig(
        tmp_path / "k", server.url, None, {"token": "secret"}, **{"insecure-skip-tls-verify": True}
    )

    assert names(KubeOptions(kubeconfig=str(path))) == ["node-00001"]


def test_the_url_of_the_options_goes_first_and_may_have_a_path(
    certificates: Certificates, make_server: Callable[..., ApiServer], tmp_path: Path
) -> None:
    server = make_server(prefix="/k8s/clusters/c-1", tokens={"secret"})
    server.put(node(1))
    path = kubeconfig(
        tmp_path / "k", "https://192.0.2.1:6443", certificates.ca, {"token": "secret"}
    )

    assert names(KubeOptions(kubeconfig=str(path), api_url=server.url)) == ["node-00001"]


def test_a_wrong_token(server: ApiServer, certificates: Certificates, tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, {"token": "0p3n-sesame"})

    error = refused(KubeOptions(kubeconfig=str(path)))

    assert isinstance(error, AuthFailed)
    assert "401" in error.message
    assert str(path) in error.hint
    assert "0p3n-sesame" not in str(error) + repr(error) + repr(error.__cause__)


def test_a_credential_plugin(server: ApiServer, certificates: Certificates, tmp_path: Path) -> None:
    server.put(node(1))
    told = json.dumps({"status": {"token": "secret"}})
    version = "client.authentication.k8s.io/v1beta1"

    def plugin(command: str, *args: str) -> KubeOptions:
        user: dict[str, object] = {
            "exec": {"apiVersion": version, "command": command, "args": list(args)}
        }
        path = kubeconfig(tmp_path / "k", server.url, certificates.ca, user)
        return KubeOptions(kubeconfig=str(path))

    assert names(plugin("echo", told)) == ["node-00001"]
    for broken in (plugin("false"), plugin("/nowhere/plugin"), plugin("echo", "{}")):
        error = refused(broken)
        assert isinstance(error, AuthFailed)
        assert "exec" in error.hint


def test_a_credential_plugin_that_does_not_end(
    server: ApiServer, certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flannel_dp.sources.kube.credentials.EXEC_SECONDS", 0.2)
    version = "client.authentication.k8s.io/v1beta1"
    plugin = {"exec": {"apiVersion": version, "command": "sleep", "args": [str(NEVER)]}}
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, plugin)

    error = refused(KubeOptions(kubeconfig=str(path)))

    assert isinstance(error, AuthFailed)
    assert "sleep did not end within 0.2 s" in error.message


def test_a_token_of_a_plugin_is_asked_for_again(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> None:
    """When the server does not accept it any more, and not before."""
    server.put(node(1))
    told, asked = tmp_path / "token", tmp_path / "asked"
    told.write_text(json.dumps({"status": {"token": "first"}}))
    server.tokens = {"first"}
    script = f"echo x >> {asked}; cat {told}"
    version = "client.authentication.k8s.io/v1beta1"
    plugin = {"exec": {"apiVersion": version, "command": "sh", "args": ["-c", script]}}
    path = kubeconfig(tmp_path / "k", server.url, certificates.ca, plugin)
    source = KubeSource(KubeOptions(kubeconfig=str(path)))
    source.snapshot()
    source.snapshot()
    assert asked.read_text() == "x\n"

    told.write_text(json.dumps({"status": {"token": "second"}}))
    server.tokens = {"second"}
    assert len(source.snapshot().claims.leases) == 1
    assert asked.read_text() == "x\nx\n"
    source.close()


# ---- pods


def pod(directory: Path, server: ApiServer, certificates: Certificates) -> KubeOptions:
    directory.mkdir()
    (directory / "token").write_text("secret")
    (directory / "ca.crt").write_bytes(certificates.ca.read_bytes())
    environ = {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(server.port),
    }
    return KubeOptions(service_account=str(directory), environ=environ)


def test_a_pod_with_its_service_account(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> None:
    server.put(node(1))

    assert names(pod(tmp_path / "sa", server, certificates)) == ["node-00001"]


def test_a_token_that_was_rotated_between_two_requests(
    server: ApiServer, certificates: Certificates, tmp_path: Path
) -> None:
    source = KubeSource(pod(tmp_path / "sa", server, certificates))
    source.snapshot()

    (tmp_path / "sa" / "token").write_text("rotated")
    server.tokens = {"rotated"}
    source.snapshot()
    (tmp_path / "sa" / "token").unlink()
    server.tokens = {"third"}
    with pytest.raises(AuthFailed, match=r"Token file .* not found"):
        source.snapshot()
    source.close()


def test_addresses_of_a_pod(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}

    def server(api_url: str = "") -> str:
        given = KubeOptions(service_account=str(tmp_path), environ=environ, api_url=api_url)
        return str(load_config(given).cluster.server)

    assert server() == "https://[fd00::1]:443"
    assert server(api_url="https://192.0.2.1:6443") == "https://192.0.2.1:6443"


def test_a_service_account_is_not_told_over_plain_http(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")

    def token_file(url: str) -> object:
        user = load_config(KubeOptions(service_account=str(tmp_path), api_url=url)).user
        assert user is not None
        return user.token_file

    assert token_file("https://192.0.2.1:6443") == str(tmp_path / "token")
    assert token_file("http://127.0.0.1:8001") is None


def test_no_pod_and_no_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no service account's token") as caught:
        KubeSource(KubeOptions(service_account=str(tmp_path), environ={}))
    assert "kubeconfig=" in caught.value.hint

    (tmp_path / "token").write_text("secret")
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
        KubeSource(KubeOptions(service_account=str(tmp_path), environ={}))
