"""KubeSource.snapshot: lists and their pages, and files and options that cannot be used."""

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
from flannel_dp.errors import AuthFailed, Compacted, ConfigError, Unavailable
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.source import KubeSource
from tests.lib.apiserver import EXPIRED, ApiServer, Certificates, status
from tests.lib.kube import (
    PREFIX,
    Options,
    kubeconfig,
    listed,
    names,
    node,
    refused,
)


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


def test_a_later_page_without_its_version_is_an_error(server: ApiServer, options: Options) -> None:
    server.replace_all(*(light(number) for number in range(25)))
    server.fail("list", None, of_version(""))

    assert "without its version" in str(refused(options(page_size=10)))


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
        (answer({"kind": "NodeList", "metadata": {}, "items": []}), "without its version"),
        (of_version(""), "without its version"),
        (of_version("0"), "without its version"),
        (answer({"kind": "NodeList", "items": []}), "metadata"),
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
        "same page", "cut short", "html", "pods", "no version", "empty version", "version 0",
        "no metadata", "no items",
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
    assert "kubeconfig=" in caught.value.hint
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
    with pytest.raises(ConfigError, match="No such file"):
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
