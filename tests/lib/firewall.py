"""Firewall rules of a node: options, foreign rules, what nft shows,
and a machine where a program is missing or fails."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.resources.firewall import programs
from flannel_dp.resources.firewall.options import RulesOptions
from tests.lib.leases import endpoint, lease_of, peers

ENGINES = ("nft", "iptables-nft")
WORD = {4: "ip", 6: "ip6"}
PEERS = range(1, 4)


def options(engine: str = "nft", **changes: Any) -> RulesOptions:
    given: dict[str, Any] = {"ip_masq": True, "engine": engine, "required": True}
    return RulesOptions(**given | changes)


def cluster(host: Any) -> list[Any]:
    return [lease_of(host), *peers(PEERS)]


def iptables(host: Any, family: int, *rule: str) -> None:
    host.exec("iptables-nft" if family == 4 else "ip6tables-nft", *rule)


def ruleset(host: Any) -> str:
    """Every rule of the namespace, counters aside."""
    text: str = host.exec("nft", "list", "ruleset")
    return re.sub(r"packets \d+ bytes \d+", "", text)


def masquerades(host: Any) -> bool:
    """Whether any rule does; one of ours only says so in its comment."""
    return bool(re.search("masquerade(?!s)", ruleset(host), re.IGNORECASE))


def foreign(host: Any, family: int) -> str:
    """Give the host rules that are none of ours, in each chain where ours go; the ruleset."""
    iptables(host, family, *["-t", "nat", "-A", "POSTROUTING", "-o", "eth9", "-j", "MASQUERADE"])
    iptables(host, family, *["-A", "FORWARD", "-i", "eth9", "-j", "ACCEPT"])
    iptables(host, family, *["-A", "INPUT", "-i", "eth9", "-j", "ACCEPT"])
    host.exec("nft", "add table inet stranger; add set inet stranger s { type ipv4_addr; }")
    return ruleset(host)


def guarded(host: Any, family: int) -> set[str]:
    """The addresses that may use the VXLAN port."""
    shown = host.exec("nft", "-j", "list", "set", WORD[family], "flannel-dp", "peers")
    found = next(item["set"] for item in json.loads(shown)["nftables"] if "set" in item)
    return set(found.get("elem", ()))


def endpoints(family: int, numbers: Any) -> set[str]:
    return {endpoint(family, number) for number in numbers}


@contextmanager
def installed(patch: pytest.MonkeyPatch, folder: Path, script: str = "") -> Iterator[None]:
    """All the firewall programs there are: none, or an nft that is ``script``."""
    if script:
        (folder / "nft").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nft").chmod(0o755)
    with patch.context() as patched:
        patched.setenv("PATH", str(folder))
        patched.setattr(programs, "_SYSTEM_PATH", str(folder))
        yield
