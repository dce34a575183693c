"""EtcdOptions: flanneld's --etcd-* flags, checked; and a password that is in no text."""

from __future__ import annotations

import dataclasses

import pytest

from flannel_dp.errors import ConfigError
from flannel_dp.sources.etcd.options import Endpoint, EtcdOptions


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("http://127.0.0.1:2379", Endpoint("127.0.0.1", 2379, False), ""),
        ("https://etcd-1.example.org:4001/", Endpoint("etcd-1.example.org", 4001, True), "etcd"),
        ("http://10.0.0.1", Endpoint("10.0.0.1", 2379, False), "http://10.0.0.1:2379"),
        ("10.0.0.1:2379", Endpoint("10.0.0.1", 2379, False), "http://10.0.0.1:2379"),
        ("http://[fd00::1]:2379", Endpoint("fd00::1", 2379, False), "http://[fd00::1]:2379"),
        (" http://a:1 ", Endpoint("a", 1, False), "http://a:1"),
    ],
)
def test_endpoints(text: str, expected: Endpoint, shown: str) -> None:
    (member,) = EtcdOptions(endpoints=(text,)).members

    assert member == expected
    assert shown in str(member)


def test_without_a_scheme_certificates_mean_tls() -> None:
    (member,) = EtcdOptions(endpoints=("10.0.0.1:2379",), cafile="ca.pem").members

    assert member.tls


def test_each_member_once_in_order() -> None:
    members = EtcdOptions(endpoints=("http://b:1", "http://a:1", "http://b:1")).members

    assert [member.host for member in members] == ["b", "a"]


def test_literal_addresses_need_no_name_server() -> None:
    assert Endpoint("fd00::1", 1, False).literal
    assert Endpoint("127.0.0.1", 1, False).literal
    assert not Endpoint("etcd", 1, False).literal


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"endpoints": ()}, "endpoints"),
        ({"endpoints": ("",)}, "endpoints"),
        ({"endpoints": ("ftp://a:1",)}, "ftp://a:1"),
        ({"endpoints": ("http://a:0",)}, "http://a:0"),
        ({"endpoints": ("http://a:65536",)}, "http://a:65536"),
        ({"endpoints": ("http://a:1/path",)}, "/path"),
        ({"prefix": ""}, "prefix"),
        ({"prefix": "//"}, "prefix"),
        ({"prefix": "/a\n"}, "prefix"),
        ({"keyfile": "k.pem"}, "keyfile is given without certfile"),
        ({"certfile": "c.pem"}, "certfile is given without keyfile"),
        ({"username": "u"}, "username is given without password"),
        ({"password": "s3cret"}, "password is given without username"),
    ],
)
def test_what_cannot_be_used_is_named(how: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EtcdOptions(**how)  # type: ignore[arg-type]

    assert named in caught.value.message
    assert caught.value.hint
    assert "s3cret" not in str(caught.value)


def test_secrets_are_in_no_text() -> None:
    options = EtcdOptions(username="node", password="s3cret")

    assert "s3cret" not in f"{options} {options!r}"
    assert "node" in repr(options)
    with pytest.raises(ConfigError) as caught:
        EtcdOptions(endpoints=("http://user:s3cret@etcd:2379",))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("/coreos.com/network", b"/coreos.com/network/config"),
        ("/coreos.com/network/", b"/coreos.com/network/config"),
        ("//coreos.com//network", b"/coreos.com/network/config"),
        ("net", b"net/config"),
    ],
)
def test_keys_are_joined_as_go_joins_paths(prefix: str, key: bytes) -> None:
    assert EtcdOptions(prefix=prefix).key("config") == key
    assert EtcdOptions(prefix=prefix).key("subnets", "") == key.replace(b"config", b"subnets/")


def test_defaults_are_those_of_flanneld() -> None:
    options = EtcdOptions()

    assert options.endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert options.prefix == "/coreos.com/network"
    values = dataclasses.asdict(options)
    assert {values[key] for key in values.keys() - {"endpoints", "prefix"}} == {""}
