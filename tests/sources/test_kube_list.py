"""KubeSource.snapshot and the ways to an API server: kubeconfigs, pods, what goes wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.errors import AuthFailed, Compacted, ConfigError, SourceError, Unavailable
from flannel_dp.sources import Snapshot
from flannel_dp.sources.kube.config import KubeOptions, load_config
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import EXPIRED, ApiServer, Certificates, status
from tests.lib.kube import (
    PREFIX,
    b64,
    kubeconfig,
    node,
)
from tests.lib.waiting import NEVER

Options = Callable[..., KubeOptions]


def listed(options: KubeOptions) -> Snapshot:
    source = KubeSource(options)
    try:
        return source.snapshot()
    finally:
        source.close()


def names(options: KubeOptions) -> list[str]:
    return [lease.name for lease in listed(options).claims.leases]


def refused(options: KubeOptions) -> SourceError:
    with pytest.raises(SourceError) as caught:
        listed(options)

    assert caught.value.hint
    return caught.value


def light(number: int) -> dict[str, Any]:
    return {**node(number), "status": {}}


# ---- lists


def test_nodes_are_leases(server: ApiServer, options: Options) -> None:
    server.put(node(7, cidrs=["10.244.7.0/24", "fd00:10:244:7::/64"],
                    backend_v6_data='{"VNI":1,"VtepMAC":"02:00:00:00:06:07"}',
                    public_ipv6="2001:db8::7"))  # fmt: skip
    server.put(node(8, cidrs=["fd00:10:244:8::/64"], backend_data=None, public_ip=None,
                    backend_v6_data='{"VNI":1,"VtepMAC":"02:00:00:00:06:08"}',
                    public_ipv6="2001:db8::8"))  # fmt: skip
    server.put(node(9, backend_data="null", backend_type="host-gw"))
    server.put(node(10, kube_subnet_manager="false"))

    snapshot = listed(options())

    assert snapshot.claims.bad == []
    assert snapshot.claims.leases == [
        Lease(
            subnet="10.244.7.0/24",
            ipv6_subnet="fd00:10:244:7::/64",
            public_ip="192.0.2.8",
            public_ipv6="2001:db8::7",
            backend_type="vxlan",
            backend_data=BackendData(1, "02:00:00:00:00:07"),
            backend_v6_data=BackendData(1, "02:00:00:00:06:07"),
            name="node-00007",
        ),
        Lease(
            ipv6_subnet="fd00:10:244:8::/64",
            public_ipv6="2001:db8::8",
            backend_type="vxlan",
            backend_v6_data=BackendData(1, "02:00:00:00:06:08"),
            name="node-00008",
        ),
        Lease(
            subnet="10.100.9.0/24", public_ip="192.0.2.10", backend_type="host-gw",
            name="node-00009",
        ),
    ]  # fmt: skip
    assert snapshot.origin == f"Kubernetes API {server.url}"
    assert snapshot.seconds > 0


@pytest.mark.parametrize("prefix", ["org.example", "org.example/", "org.example/net", "o.x/n-"])
def test_annotation_prefixes(server: ApiServer, options: Options, prefix: str) -> None:
    full = {"org.example": "org.example/", "org.example/net": "org.example/net-"}.get(
        prefix, prefix
    )
    server.put(node(1, prefix=full))
    server.put(node(2))

    assert names(options(annotation_prefix=prefix)) == ["node-00001"]


def test_an_empty_cluster(server: ApiServer, options: Options) -> None:
    assert listed(options()).claims == ([], [])

    empty = {"kind": "NodeList", "metadata": {"resourceVersion": "5"}, "items": None}
    server.fail("list", lambda handler: handler.answer(200, empty))
    assert listed(options()).claims == ([], [])


def test_pages(server: ApiServer, options: Options) -> None:
    server.replace_all(*(light(number) for number in range(25)))

    assert len(names(options(page_size=10))) == 25

    queries = [seen.query for seen in server.requests]
    assert [query["limit"] for query in queries] == ["10", "10", "10"]
    assert ["continue" in query for query in queries] == [False, True, True]
    assert not any("resourceVersion" in query for query in queries), "nothing older than now"


def test_an_expired_page_begins_the_list_again(server: ApiServer, options: Options) -> None:
    server.replace_all(*(light(number) for number in range(25)))
    server.fail("list", None, EXPIRED)

    assert len(names(options(page_size=10))) == 25
    assert server.count("list") == 2 + 3


def test_a_list_that_always_expires_is_asked_for_whole(server: ApiServer, options: Options) -> None:
    server.replace_all(*(light(number) for number in range(25)))
    server.fail("list", None, EXPIRED, None, EXPIRED)

    assert len(names(options(page_size=10))) == 25
    assert "limit" not in server.last("list").query


def other_version(handler: Any) -> None:
    """The last page of a list of three, as of another moment."""
    meta = {"resourceVersion": "99999"}
    handler.answer(200, {"kind": "NodeList", "metadata": meta, "items": []})


def test_a_page_of_another_version_begins_the_list_again(
    server: ApiServer, options: Options
) -> None:
    server.replace_all(*(light(number) for number in range(25)))
    server.fail("list", None, other_version)

    assert len(names(options(page_size=10))) == 25
    assert server.count("list") == 2 + 3


def test_a_whole_list_that_expires_too_is_an_error(server: ApiServer, options: Options) -> None:
    server.fail("list", EXPIRED, EXPIRED, EXPIRED)

    assert isinstance(refused(options()), Compacted)


def endless(handler: Any) -> None:
    meta = {"resourceVersion": "5", "continue": "same"}
    handler.answer(200, {"kind": "NodeList", "metadata": meta, "items": []})


def cut_short(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"kind":"NodeList","metadata":{"resourceVersion":"5"},"items":[]}')


def answer(document: object) -> Callable[[Any], None]:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return lambda handler: handler.answer(200, data)


def gzip_of(data: bytes) -> Callable[[Any], None]:
    return lambda handler: handler.answer(200, data, Content_Encoding="gzip")


def of_version(version: str) -> Callable[[Any], None]:
    return answer({"kind": "NodeList", "metadata": {"resourceVersion": version}, "items": []})


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (gzip_of(b"no gzip"), ""),
        (gzip_of(gzip.compress(b"{}" * 1000)[:20]), ""),
        (answer(b"\xff\xff\xff"), "no list of nodes"),
        (answer(b"[" * 100_000), "no list of nodes"),
        (of_version("1" * 70_000), "resourceVersion of 70000 characters"),
        (endless, "again and again"),
        (cut_short, "closed connection"),
        (answer(b"<html>hello</html>"), "no list of nodes"),
        (answer({"kind": "PodList", "metadata": {"resourceVersion": "5"}, "items": []}), "PodList"),
        (answer({"kind": "NodeList", "metadata": {}, "items": []}), "version"),
        (answer({"kind": "NodeList", "metadata": {"resourceVersion": "5"}}), "items"),
        (
            answer(
                {
                    "kind": "NodeList",
                    "metadata": {"resourceVersion": "5", "remainingItemCount": 3},
                    "items": [],
                }
            ),
            "3 more nodes",
        ),
        (
            answer(
                {
                    "kind": "NodeList",
                    "metadata": {"resourceVersion": "5", "remainingItemCount": 1},
                    "items": [],
                }
            ),
            "1 more node,",
        ),
        (answer({"kind": "NodeList", "metadata": {"resourceVersion": "5"}, "items": [3]}), "items"),
        (status(500, "InternalError", "etcd is gone"), "500: etcd is gone"),
        (status(404, "NotFound"), "404"),
        (lambda handler: handler.answer(302, b"", Location="https://elsewhere/"), "302"),
        (lambda handler: handler.answer(502, b"<html>bad gateway</html>"), "502"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ""),
        (b"", ""),
    ],
    ids=[
        "no gzip", "half a gzip", "noise", "deep", "version",
        "same page", "cut short", "html", "pods", "no version", "no items",
        "more nodes", "one more node", "no nodes", "500",
        "404", "redirect", "502", "not http", "closed",
    ],
)  # fmt: skip
def test_what_is_no_complete_list_is_refused(
    server: ApiServer, options: Options, fault: Any, says: str
) -> None:
    server.put(node(1))
    server.fail("list", *[fault] * 2)

    error = refused(options())

    assert isinstance(error, Unavailable)
    assert server.url in error.message
    assert "GET /api/v1/nodes" in error.message
    assert says in error.message


def test_a_server_that_says_nothing(server: ApiServer, options: Options) -> None:
    server.fail("list", lambda handler: handler.connection.recv(1))

    error = refused(options(request_timeout=0.3))

    assert isinstance(error, Unavailable)
    assert "no answer in time" in error.message


def test_words_of_a_server_cannot_steer_a_terminal(server: ApiServer, options: Options) -> None:
    server.fail("list", status(403, "Forbidden", "\x1b[2J" + "x" * 5000))

    error = refused(options())

    assert isinstance(error, AuthFailed)
    assert error.message.isprintable()
    assert len(error.message) < 500
    assert '"list" of "nodes"' in error.hint


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

    def server(**how: str) -> str:
        given = KubeOptions(service_account=str(tmp_path), environ=environ, **how)  # type: ignore[arg-type]
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
    assert "--kubeconfig-file" in caught.value.hint

    (tmp_path / "token").write_text("secret")
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
        KubeSource(KubeOptions(service_account=str(tmp_path), environ={}))


# ---- broken files and options


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not usable"),
        ("- list", "not usable"),
        ("current-context: x\nusers: [{name: u, user: {token: hunter2", "line 2: not YAML"),
        ("clusters: []\ncontexts: []", "No current context"),
        ("current-context: x\ncontexts: []", "'clusters' is missing"),
        ("current-context: x\nclusters: []\ncontexts: []", "Context 'x' not found"),
        (
            "current-context: x\nclusters: []\n"
            "contexts: [{name: x, context: {cluster: c, user: u}}]",
            "'c' is missing",
        ),
        (
            "current-context: x\nclusters: [{name: c, cluster: {server: 3}}]\n"
            "contexts: [{name: x, context: {cluster: c, user: u}}]",
            "Expected `str`",
        ),
        ("\x00hunter2", "not YAML"),
    ],
    ids=["empty", "list", "yaml", "no context", "no clusters", "unknown", "cluster", "type", "nul"],
)
def test_a_broken_kubeconfig(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "k"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        KubeSource(KubeOptions(kubeconfig=str(path)))

    assert str(path) in caught.value.message
    assert says in caught.value.message
    assert "--kubeconfig-file" in caught.value.hint
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("user", "cluster"),
    [
        ({"client-certificate-data": "a", "client-key-data": "a"}, {}),
        ({"client-certificate": "/nowhere/c", "client-key": "/nowhere/k"}, {}),
        ({"client-certificate-data": "aGk=", "client-key-data": "aGk="}, {}),
        ({}, {"certificate-authority": "/nowhere/ca.crt"}),
        ({}, {"certificate-authority-data": "aGk="}),
        ({"client-certificate": "/nowhere/c"}, {}),
    ],
    ids=["base64", "no file", "no certificate", "no ca", "bad ca", "no key"],
)
def test_broken_certificates(
    certificates: Certificates, tmp_path: Path, user: dict[str, object], cluster: dict[str, object]
) -> None:
    ca = None if cluster else certificates.ca
    path = kubeconfig(tmp_path / "k", "https://127.0.0.1:1", ca, user, **cluster)

    with pytest.raises(ConfigError, match="certificates or its server") as caught:
        KubeSource(KubeOptions(kubeconfig=str(path)))

    assert str(path) in caught.value.message


def test_a_missing_kubeconfig(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        KubeSource(KubeOptions(kubeconfig=str(tmp_path / "none")))


@pytest.mark.parametrize(
    "how",
    [
        {"api_url": "192.0.2.1:6443"},
        {"annotation_prefix": "Not A Domain"},
        {"page_size": 0},
        {"watch_seconds": float("nan")},
        {"retry_seconds": -1.0},
    ],
    ids=repr,
)
def test_options_that_cannot_be_used(how: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        KubeOptions(**how)

    assert caught.value.hint


def test_options_do_not_show_the_environment() -> None:
    assert "hunter2" not in repr(KubeOptions(environ={"PASSWORD": "hunter2"}))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lightkube"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightkube", None)

    with pytest.raises(ConfigError, match="lightkube") as caught:
        KubeSource(KubeOptions(kubeconfig=str(tmp_path / "k")))

    assert "flannel-dp[kube]" in caught.value.hint


def test_importing_the_source_loads_no_library() -> None:
    script = (
        "import sys; import flannel_dp.sources.kube.source, flannel_dp.sources.kube.own; "
        "print(*(name for name in ('lightkube', 'httpx2', 'yaml', 'ssl') if name in sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )

    assert set(done.stdout.split()) <= {"ssl"}


def test_constants_are_flannels() -> None:
    assert KubeOptions().annotation_prefix + "/" == PREFIX
