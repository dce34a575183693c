"""NetworkConfig: what is read, what is refused, and how it says so."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ConfigError


def parse(**keys: object) -> NetworkConfig:
    document: dict[str, object] = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
    document.update(keys)
    return NetworkConfig.from_json(json.dumps(document))


def refused(text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        NetworkConfig.from_json(text, origin="some.json")

    assert str(caught.value).startswith("some.json: ")
    assert caught.value.hint
    return caught.value


def refused_keys(**keys: object) -> ConfigError:
    document: dict[str, object] = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
    document.update(keys)
    return refused(json.dumps(document))


def test_defaults_are_flannels() -> None:
    config = parse()

    assert (config.enable_ipv4, config.enable_ipv6, config.enable_nftables) == (True, False, False)
    assert config.network == IPv4Network("10.244.0.0/16")
    assert config.subnet_len == 24
    backend = config.backend
    assert (backend.type, backend.vni, backend.port, backend.mtu) == ("vxlan", 1, 0, 0)
    assert (backend.learning, backend.gbp, backend.direct_routing) == (False, False, False)
    assert backend.effective_port == 8472
    assert (config.device_v4, config.device_v6) == ("flannel.1", "flannel-v6.1")
    assert config.unknown_keys == ()


@pytest.mark.parametrize(
    ("backend", "direct", "paths"),
    [
        ({}, 2, {"tunnel": 3, "direct": 2}),
        ({"Forwarding": "ebpf"}, 0, {"ebpf": 5}),
        ({"Forwarding": "ebpf", "DirectRouting": True}, 2, {"ebpf": 3, "direct": 2}),
        ({"Type": "host-gw"}, 0, {"host-gw": 5}),
    ],
    ids=str,
)
def test_every_peer_has_a_path(
    backend: dict[str, object], direct: int, paths: dict[str, int]
) -> None:
    counted = parse(Backend={"Type": "vxlan", **backend}).backend.peers_by_path(5, direct)

    assert counted == paths
    assert sum(counted.values()) == 5


def test_a_family_that_is_off_has_no_network_even_when_one_is_written() -> None:
    config = parse(IPv6Network="fd00::/48")

    assert config.ipv6_network is None
    assert (config.ipv6_subnet_len, config.ipv6_subnet_min) == (0, None)


def test_a_broken_network_of_a_family_that_is_off_is_still_an_error() -> None:
    assert "IPv6Network" in refused_keys(IPv6Network="nonsense").message


def test_host_bits_are_dropped() -> None:
    config = parse(
        Network="10.244.3.7/16",
        EnableIPv6=True,
        IPv6Network="fd00:10:244::99/48",
    )

    assert config.network == IPv4Network("10.244.0.0/16")
    assert config.ipv6_network == IPv6Network("fd00:10:244::/48")


@pytest.mark.parametrize("kind", ["vxlan", "VXLAN", "VxLAN", "host-gw", "Host-GW"])
def test_backend_type_is_lower_cased(kind: str) -> None:
    assert parse(Backend={"Type": kind}).backend.type == kind.lower()


@pytest.mark.parametrize(
    "key", ["DirectRouting", "Directrouting", "directRouting", "DIRECTROUTING"]
)
def test_keys_match_without_case(key: str) -> None:
    assert parse(Backend={"type": "vxlan", key: True}).backend.direct_routing is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"Network": "10.1.0.0/16", "Network": "10.2.0.0/16"', "10.2.0.0/16"),
        ('"Network": "10.1.0.0/16", "network": "10.2.0.0/16"', "10.2.0.0/16"),
        ('"network": "10.1.0.0/16", "Network": "10.2.0.0/16"', "10.2.0.0/16"),
        (
            '"Network": "10.1.0.0/16", "network": "10.2.0.0/16", "Network": "10.3.0.0/16"',
            "10.3.0.0/16",
        ),
        ('"Network": "10.1.0.0/16", "network": null', "10.1.0.0/16"),
    ],
)
def test_of_several_keys_the_last_one_wins(text: str, expected: str) -> None:
    config = NetworkConfig.from_json(f'{{{text}, "Backend": {{"Type": "vxlan"}}}}')

    assert str(config.network) == expected


def test_null_means_absent() -> None:
    config = parse(EnableIPv4=None, SubnetLen=None, SubnetMin=None)

    assert config == parse()


def test_unknown_keys_are_reported_and_are_no_error() -> None:
    config = parse(Netwrok="x", Backend={"Type": "vxlan", "DirectRoutng": True, "MacPrefix": "0E"})

    assert config.unknown_keys == ("Netwrok", "Backend.DirectRoutng")
    assert config.backend.options == {"DirectRoutng": True, "MacPrefix": "0E"}
    assert config.backend.direct_routing is False


def test_unset_addresses_may_be_spelt_as_zero() -> None:
    assert parse(SubnetMin="0.0.0.0").subnet_min == IPv4Address("10.244.1.0")


def test_the_value_is_frozen_and_hashable() -> None:
    config = parse(Backend={"Type": "vxlan", "Extra": {"a": [1]}})

    with pytest.raises(AttributeError):
        config.subnet_len = 3  # type: ignore[misc]
    assert hash(config) == hash(NetworkConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    ("keys", "named", "said"),
    [
        (
            {"Backend": {"Type": "vxlan", "DirectRouting": "true"}},
            "Backend.DirectRouting",
            '"true"',
        ),
        ({"Backend": {"Type": "vxlan", "Port": "8472"}}, "Backend.Port", '"8472"'),
        ({"Backend": {"Type": "vxlan", "Port": 8472.0}}, "Backend.Port", "8472.0"),
        ({"Backend": {"Type": "vxlan", "Port": True}}, "Backend.Port", "true"),
        ({"Backend": {"Type": "vxlan", "Port": 65536}}, "Backend.Port", "65536"),
        ({"Backend": {"Type": "vxlan", "VNI": -1}}, "Backend.VNI", "-1"),
        ({"Backend": {"Type": "vxlan", "VNI": 1 << 24}}, "Backend.VNI", str(1 << 24)),
        ({"Backend": {"Type": "vxlan", "VNI": 10_000_000}}, "Backend.VNI", "flannel.10000000"),
        ({"Backend": {"Type": "vxlan", "MTU": 65536}}, "Backend.MTU", "65536"),
        ({"Backend": {"Type": "vxlan", "MTU": 117}}, "Backend.MTU", "117"),
        ({"Backend": {"Type": 7}}, "Backend.Type", "7"),
        ({"Backend": {"Type": "wireguard"}}, "Backend.Type", '"wireguard"'),
        ({"Backend": {}}, "Backend.Type", "udp"),
        ({"Backend": None}, "Backend.Type", "udp"),
        ({"Backend": "vxlan"}, "Backend", '"vxlan"'),
        ({"EnableIPv4": 1}, "EnableIPv4", "1"),
        ({"EnableIPv4": False}, "EnableIPv4", "nothing to do"),
        ({"EnableIPv6": True}, "IPv6Network", "required"),
        ({"Network": None}, "Network", "required"),
        ({"Network": "0.0.0.0/0"}, "Network", "required"),
        ({"Network": ""}, "Network", '""'),
        ({"Network": 10}, "Network", "10"),
        ({"Network": ["10.0.0.0/8"]}, "Network", "a list"),
        ({"Network": "10.244.0.0"}, "Network", "10.244.0.0"),
        ({"Network": "10.244.0.0/255.255.0.0"}, "Network", "255.255.0.0"),
        ({"Network": "10.244.0.0/33"}, "Network", "/33"),
        ({"Network": "010.244.0.0/16"}, "Network", "010.244"),
        ({"Network": "fd00::/48"}, "Network", "fd00::/48"),
        ({"IPv6Network": "10.0.0.0/8"}, "IPv6Network", "10.0.0.0/8"),
        ({"IPv6Network": "fe80::%eth0/64"}, "IPv6Network", "%eth0"),
        ({"SubnetLen": -1}, "SubnetLen", "-1"),
        ({"SubnetMin": "10.244.1.0/24"}, "SubnetMin", "10.244.1.0/24"),
    ],
)
def test_what_is_wrong_is_named_with_key_and_value(
    keys: dict[str, object], named: str, said: str
) -> None:
    error = refused_keys(**keys)

    assert error.message.startswith(f"some.json: {named}: ")
    assert said in error.message


def test_the_message_names_the_types_and_the_value() -> None:
    error = refused_keys(Backend={"Type": "vxlan", "DirectRouting": "true"})

    expected = 'some.json: Backend.DirectRouting: expected true or false, got "true"'
    assert error.message == expected


def test_an_unsupported_backend_is_told_what_there_is() -> None:
    assert refused_keys(Backend={"Type": "udp"}).hint == (
        'use {"Type": "vxlan"} or {"Type": "host-gw"}'
    )


def test_no_backend_is_told_what_to_write() -> None:
    assert '{"Type": "vxlan"}' in refused('{"Network": "10.0.0.0/8"}').hint


def test_ipv6_raises_the_least_mtu_and_lowers_the_greatest_vni() -> None:
    v6 = {"EnableIPv6": True, "IPv6Network": "fd00::/48"}

    assert parse(Backend={"Type": "vxlan", "MTU": 118, "VNI": 9_999_999}).backend.mtu == 118
    assert parse(**v6, Backend={"Type": "vxlan", "MTU": 1350, "VNI": 9999}).backend.vni == 9999
    assert "IPv6" in refused_keys(**v6, Backend={"Type": "vxlan", "MTU": 1349}).message
    assert "flannel-v6.10000" in refused_keys(**v6, Backend={"Type": "vxlan", "VNI": 10000}).message
    assert parse(Backend={"Type": "host-gw", "VNI": (1 << 24) - 1}).backend.type == "host-gw"
    assert parse(Backend={"Type": "vxlan", "VNI": 0}).device_v4 == "flannel.0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        (b" \n", "it is empty"),
        ('{\n "Network": 1,\n}', "line 3, column 1"),
        ('{"Network":', "line 1, column 12 (the end, so it is cut short)"),
        (b'{"Network":\n "\xff"}', "line 2, column 3: not UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        ('{"SubnetLen": NaN}', "NaN is not a JSON number"),
        ('{"SubnetLen": ' + "9" * 5000 + "}", "digits"),
        ('"text"', "expected an object"),
        ("{} {}", "line 1, column 4"),
    ],
)
def test_broken_json_is_located(text: str | bytes, said: str) -> None:
    assert said in refused(text).message


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "net-conf.json"
    with pytest.raises(ConfigError, match="No such file") as missing:
        NetworkConfig.from_file(file)
    with pytest.raises(ConfigError, match="directory"):
        NetworkConfig.from_file(tmp_path)
    with pytest.raises(ConfigError, match="null byte"):
        NetworkConfig.from_file("a\0b")
    file.write_text("{")
    with pytest.raises(ConfigError) as broken:
        NetworkConfig.from_file(file)

    assert str(file) in missing.value.message
    assert broken.value.message.startswith(f"{file}: line 1, column 2")


def test_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "net-conf.json"
    file.write_text('{"Network": "10.9.0.0/16", "Backend": {"Type": "host-gw"}}')

    assert NetworkConfig.from_file(str(file)).network == IPv4Network("10.9.0.0/16")


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    v4 = draw(st.booleans())
    v6 = draw(st.booleans()) or not v4
    length = draw(st.integers(1, 28))
    length6 = draw(st.integers(1, 124))
    address = draw(st.ip_addresses(v=4))
    address6 = draw(st.ip_addresses(v=6))
    return {
        "EnableIPv4": v4,
        "EnableIPv6": v6,
        "EnableNFTables": draw(st.booleans()),
        "Network": f"{address}/{length}",
        "IPv6Network": f"{address6}/{length6}",
        "SubnetLen": draw(st.sampled_from([0, 30, length + 2])),
        "IPv6SubnetLen": draw(st.sampled_from([0, 126, length6 + 2])),
        "Backend": {
            "Type": draw(st.sampled_from(["vxlan", "host-gw", "VXLAN"])),
            "VNI": draw(st.integers(0, 9999)),
            "Port": draw(st.integers(0, 65535)),
            "MTU": draw(st.just(0) | st.integers(1350, 65535)),
            "Learning": draw(st.booleans()),
            "GBP": draw(st.booleans()),
            "DirectRouting": draw(st.booleans()),
        },
    }


@given(documents())
def test_round_trip(document: dict[str, object]) -> None:
    config = NetworkConfig.from_json(json.dumps(document))

    assert NetworkConfig.from_json(config.to_json()) == config
    for network, first, last, length in (
        (config.network, config.subnet_min, config.subnet_max, config.subnet_len),
        (
            config.ipv6_network,
            config.ipv6_subnet_min,
            config.ipv6_subnet_max,
            config.ipv6_subnet_len,
        ),
    ):
        if network is not None and first is not None and last is not None:
            size = 1 << (network.max_prefixlen - length)
            assert int(first) - int(network.network_address) == size
            assert int(network.broadcast_address) - int(last) == size - 1


@given(documents(), st.randoms())
def test_any_spelling_of_the_keys_reads_the_same(document: dict[str, object], rng: object) -> None:
    def respelt(value: object) -> object:
        if not isinstance(value, dict):
            return value
        choose = rng.choice  # type: ignore[attr-defined]
        return {
            "".join(choose((c.lower(), c.upper())) for c in key): respelt(item)
            for key, item in value.items()
        }

    canonical = NetworkConfig.from_json(json.dumps(document))

    assert NetworkConfig.from_json(json.dumps(respelt(document))) == canonical


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_garbage_is_a_config_error(data: bytes | str) -> None:
    with pytest.raises(ConfigError):
        NetworkConfig.from_json(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_keys = st.sampled_from(
    ["Network", "IPv6Network", "EnableIPv4", "EnableIPv6", "SubnetLen", "SubnetMin", "Backend"]
)


@given(st.dictionaries(_keys, _json))
def test_any_types_give_a_config_or_a_config_error(document: dict[str, object]) -> None:
    try:
        kind = NetworkConfig.from_json(json.dumps(document)).backend.type
    except ConfigError as error:
        kind = error.hint

    assert kind
