"""Which lease is this node's: the tables of identity.txt, which says how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from flannel_dp.errors import LeaseRejected, SourceError
from flannel_dp.node.identity import Claim, Evidence, decide
from flannel_dp.wording import worded
from tests.lib.script import Script, load

PUBLIC, ADDRESSES = ("192.0.2.1", "192.0.2.9"), ("192.0.2.1", "192.0.2.9", "198.51.100.1")
SCRIPTS = load(Path(__file__).with_name("identity.txt"))
#: Where in the evidence a word of the tables goes.
WORDS = {"--subnet", "subnet.env", "--node-name", "device", "MAC", "duplicate"}


def address(text: str) -> str:
    """ ".2" is 192.0.2.2."""
    return f"192.0.2{text}" if text.startswith(".") else text


def claim(text: str) -> Claim:
    """The lease of a text such as "b 5 .1 m5", or "b 5 .1 m5!", which is malformed."""
    name, subnet, endpoint, *mac = text.removesuffix("!").split()
    fault = "broken" if text.endswith("!") else ""
    return Claim(0, name, f"10.244.{subnet}.0/24", address(endpoint), "".join(mac), 0, fault)


def claims(text: str) -> list[Claim]:
    return [claim(one) for one in text.split("; ")] if text != "none" else []


def known(text: str) -> Evidence:
    """The evidence of a text such as "--subnet 1, device 1, MAC m1"."""
    words = dict(one.split() for one in text.split(", ")) if text != "nothing" else {}
    assert words.keys() <= WORDS, text
    return Evidence(
        PUBLIC,
        ADDRESSES,
        f"10.244.{words['--subnet']}.0/24" if "--subnet" in words else "",
        words.get("--node-name", ""),
        f"10.244.{words['subnet.env']}.0/24" if "subnet.env" in words else "",
        "/run/subnet.env",
        "flannel.1" if "device" in words or "MAC" in words else "",
        words.get("MAC", ""),
        (f"10.244.{words['device']}.0",) if "device" in words else (),
        (f"192.0.2{words['duplicate']}",) if "duplicate" in words else (),
    )


def rows(section: str) -> list[dict[str, str]]:
    return [row for script in SCRIPTS if section in script for row in script[section].table()]


def _id(row: dict[str, str]) -> str:
    return f"{row['this node knows']}-{row['leases']}"


@pytest.mark.parametrize("row", rows("whose lease"), ids=_id)
def test_whose_lease_it_is(row: dict[str, str]) -> None:
    evidence, published = known(row["this node knows"]), claims(row["leases"])

    found = decide(evidence, published)

    assert (found.own.name if found.own else "none") == row["its lease"]
    assert found.subnet == (f"10.244.{row['subnet']}.0/24" if row["subnet"] else "")
    assert found.public_ip == address(row["address"])
    others = [
        one
        for one in published
        if one.name != row["its lease"] and (evidence.holds(one) or one.subnet == found.subnet)
    ]
    said = "; ".join(found.warnings)
    assert all(str(one) in said for one in others)
    assert not others or found.subnet in said


@pytest.mark.parametrize("row", rows("warnings"), ids=_id)
def test_what_is_rejected_with_this_node_s_subnet_or_name_is_told(row: dict[str, str]) -> None:
    warnings = decide(known(row["this node knows"]), claims(row["leases"])).warnings
    assert any(row["a warning says"] in text for text in warnings), warnings


@pytest.mark.parametrize(
    "script",
    [script for script in SCRIPTS if "error names" in script],
    ids=lambda script: script.title.replace(" ", "-"),
)
def test_what_nobody_can_decide_is_an_error_that_names_it(script: Script) -> None:
    script.check_names("this node knows", "leases", "error names", "hint names")
    (evidence,) = script.lines("this node knows") or ["nothing"]

    with pytest.raises(SourceError) as caught:
        decide(known(evidence), map(claim, script.lines("leases")))

    named, flags = script.lines("error names"), script.lines("hint names")
    assert [part for part in named if part not in caught.value.message] == []
    assert [flag for flag in flags if worded(flag) not in caught.value.hint] == []
    assert caught.value.hint
    assert isinstance(caught.value, LeaseRejected) == ("broken" in named)


def test_every_script_is_run() -> None:
    for script in SCRIPTS:
        assert {"whose lease", "warnings", "error names"} & {*script.names}, script.origin
