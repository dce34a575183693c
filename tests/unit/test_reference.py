"""docs/reference: every flag, metric, exit code and JSON key is on its page, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from msgspec.structs import fields

from flannel_dp._core import Table, diff_tables
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.health import status_document
from flannel_dp.agent.status import Status, StatusBoard
from flannel_dp.agent.status_document import agent_document
from flannel_dp.cluster.admission import Node
from flannel_dp.cluster.documents import decode_leases
from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.rejections import Reason, Rejection
from flannel_dp.command import cli
from flannel_dp.leftovers import Leftover, Sweep
from flannel_dp.look.events import Event
from flannel_dp.look.explanation import Explanation, Owner, Step
from flannel_dp.look.history import Answer
from flannel_dp.look.history_file import Peer as KnownPeer
from flannel_dp.look.leases import Listing
from flannel_dp.look.live_show import DriftLine
from flannel_dp.look.lives import Life, Lives
from flannel_dp.look.myself import Item, Myself, SelfExplanation
from flannel_dp.look.proof import Fix, PeerProof, Proof
from flannel_dp.look.show import FamilyView, Overview, PeerView
from flannel_dp.look.stats import DroppedView, FamilyStats, Flow, PeerStats, Stats
from flannel_dp.look.status import AgentsStatus
from flannel_dp.node.path import Diversion
from flannel_dp.probe.oneshot import Result
from flannel_dp.probe.target import Place, Target
from flannel_dp.probe.verdict import Evidence, judge
from flannel_dp.reconcile.plan import DeviceChange, Plan, RulesChange, TablePlan
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.device.view import DeviceView
from flannel_dp.resources.forwarding.program import Dropped
from flannel_dp.tables.describe import conflict_json
from flannel_dp.tables.entries import Fdb, Neighbour, Nexthop, Peer, Route, Scope
from flannel_dp.tables.results import Outcome
from tests.lib.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs/reference"

#: Keys whose value is an entry: those have a table of their own.
ENTRIES = {"entry", "old", "wanted", "foreign"}

TABLES = {"fdb", "neighbour", "nexthop", "route", "peer"}


#: Made once.
pages = cache(lambda: load_script("reference").pages())


@pytest.mark.parametrize("name", ["flags.md", "metrics.md", "log.md"])
def test_a_page_made_from_the_code_is_up_to_date(name: str) -> None:
    made = pages()[name]

    assert (REFERENCE / name).read_text() == made, "run scripts/reference.py"


def test_pages_made_from_the_code_have_all_flags_and_metrics() -> None:
    flags, metrics = ((REFERENCE / name).read_text() for name in ("flags.md", "metrics.md"))
    recorded = json.loads((ROOT / "tests/compat/documents/metrics.json").read_text())

    options = {
        name
        for command in cli.command.commands.values()
        for option in command.params
        if isinstance(option, click.Option) and option.name != "version"
        for name in (*option.opts, *option.secondary_opts)
    }
    assert {name for name in options if f"`{name}`" not in flags} == set()
    found = {line.split()[0] for line in recorded if line.startswith("flannel_dp")}
    assert {name for name in found if f"`{name}`" not in metrics} == set()


def test_log_messages_are_sentences_whose_values_are_fields() -> None:
    """No ``key=value``; what a sentence names is a field, and nothing is put into it otherwise."""
    calls = [*load_script("reference").log_calls()]

    assert len(calls) > 60
    for one in calls:
        named = set(re.findall(r"%\((\w+)\)", one.form))
        rest = re.sub(r"%\(\w+\)[-\d.]*[a-z]", "", one.form)
        assert named <= {*one.fields}, one
        assert "%" not in rest, one
        assert not re.search(r"\w=", one.form), one
        assert (
            one.form[0] in "%."
            or not one.form[0].islower()
            or one.form.startswith(("etcd", "subnet.env", "flannel-dp"))
        ), one


def test_exit_codes() -> None:
    page = (REFERENCE / "exit-codes.md").read_text()

    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == re.findall(
        r"^ +(\d+) ", cli.EXIT_CODES, re.MULTILINE
    )
    meanings = dict(re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE))
    told = " ".join(cli.EXIT_CODES.split())
    for number, meaning in meanings.items():
        first = re.split(r"[;.:] ", meaning)[0]
        assert f"{number} {first}" in told


# ---- JSON ------------------------------------------------------------------------


def section(title: str) -> str:
    text = (REFERENCE / "json.md").read_text()
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The code words of the first cell of each row."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield re.findall(r"`([^`]+)`", line.split(" | ")[0])


def described(title: str) -> set[str]:
    """The paths in a section: ``.b`` after ``a[].c`` is ``a[].b``."""
    found: set[str] = set()
    for words in rows(section(title)):
        parent = ""
        for word in words:
            path = f"{parent}{word}" if word.startswith(".") else word
            if not word.startswith("."):
                parent = path.rpartition(".")[0]
            found.add(path.removesuffix("[]"))
    return found


def paths(value: Any, at: str = "") -> Iterator[str]:
    """The paths of all values in a document; lists and objects themselves are none."""
    if at.rpartition(".")[2] in ENTRIES:
        yield at
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from paths(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list | tuple) and value:
        for inner in value:
            yield from paths(inner, f"{at}[]")
    else:
        yield at.removesuffix("[]")


def parents(found: set[str]) -> set[str]:
    """Paths of objects that have keys, which a page may describe as well."""
    cut = {re.split(r"\.(?=[^.]*$)", path)[0] for path in found if "." in path}
    return cut | {path.removesuffix("[]") for path in cut}


def generic(path: str) -> str:
    """A path with the names that differ from document to document in capitals."""
    path = re.sub(rf"^(tables|entries)\.({'|'.join(TABLES)})(?=\.|$)", r"\1.TABLE", path)
    path = re.sub(r"^(seconds)\.\w+$", r"\1.STAGE", path)
    path = re.sub(r"^(problems|counters|resources)\.\w+", r"\1.NAME", path)
    path = re.sub(r"^(peers|direct|diversions)\.[46](?=\[|$)", r"\1.FAMILY", path)
    path = re.sub(r"^lives\.[46]\.\w+$", "lives.FAMILY.LIFE", path)
    path = re.sub(r"^(agents\[\]\.(?:peers|families))\.[46](?=\.)", r"\1.FAMILY", path)
    path = re.sub(r"(rejected\.reasons)\.\w+$", r"\1.REASON", path)
    path = re.sub(r"(FAMILY)\.(tunnel|direct)$", r"\1.PATH", path)
    path = re.sub(r"^rejected\.\w+$", "rejected.REASON", path)
    path = re.sub(r"(groups|overflow)\.\w+$", r"\1.DIRECTION", path)
    return re.sub(r"^(drift|ended)\.\w+$", lambda m: f"{m[1]}.{KINDS[m[1]]}", path)


KINDS = {"drift": "KIND", "ended": "THREAD"}
REJECTION = Rejection("node4", 4, Reason.OVERLAP, "it overlaps")
ROUTE = Route("10.244.2.0/24", 7)
CHANGE = DeviceChange("flannel.1", "adopt", ("mtu 1400 -> 1450",))
RULES = RulesChange("nft", ("+ table",))
FAILURE = Outcome("add", "route", ROUTE, 22)
PEER = PeerView("10.244.2.0/24")


def plan() -> Any:
    old, new = Table("route"), Table("route")
    old.add(ROUTE)
    new.add(ROUTE._replace(nexthop=8))
    scope = Scope("route", 2)
    diff = diff_tables(new, old)
    resources = {"routes": ["+ route"]}
    return Plan(
        (TablePlan(diff, (scope,)),),
        (CHANGE,),
        (REJECTION,),
        ("a",),
        RULES,
        "",
        resources,
        (FAILURE,),
        held={4: ["a"], 6: ["b"]},
    ).to_json() | {"conflicts": [conflict_json(ROUTE, ROUTE, {})]}


def report() -> Any:
    return Report(
        devices=(CHANGE,),
        rejected=(REJECTION,),
        conflicts=[(ROUTE, ROUTE)],
        failures=[FAILURE],
        rules=RULES,
        counters={"flannel": "loaded"},
        warnings=("a",),
        held={4: ["a"], 6: ["b"]},
    ).to_json()


def overview() -> Any:
    device = DeviceView("flannel.1", addresses=("10.244.1.0/32",))
    family = FamilyView(4, "10.244.0.0/16", device, (PEER,), (ROUTE,))
    lives = Lives({}, Life("alive", 0.1))
    return Overview((family,), (REJECTION,), True, ("a rule",), lives=lives).to_json()


def watched() -> Any:
    event = DriftLine(0.0, 4, "route", "deleted", "10.244.2.0/24").to_json()
    return {"event": event, "error": {"message": "", "hint": ""}, "overview": 0}


def explanation() -> Any:
    owner, step = Owner("a", "b", "c"), Step("lease", "", "", True)
    life = Life("alive", 0.1)
    return Explanation("a", 4, "peer", "b", "tunnel", owner, (step,), ("a rule",), life).to_json()


def myself() -> Any:
    return SelfExplanation((Myself(4, evidence=(Item("a", "b"),), warnings=("a",)),)).to_json()


def listing() -> Any:
    data = BackendData(1, "02:00:00:00:00:01")
    named: dict[str, Any] = {one.name: "x" for one in fields(Lease) if one.type is str}
    lease = Lease(**named, revision=1, moved=1, backend_data=data, backend_v6_data=data)
    return Listing((lease,), (REJECTION,), 0, ("a",)).to_json()


def proof() -> Any:
    place = Place(4, "flannel.1", 7, "", 1450, "10.244.1.0", "192.0.2.1")
    evidence = Evidence((8, 8), (2, 2), ((8, 8),))
    target = Target("10.244.2.0/24", "192.0.2.2", "02:00:00:00:00:02")
    found = Result(target, place, (0.1,), evidence)
    peer = PeerProof.of(4, "tunnel", found, judge(evidence, "192.0.2.2", 8472, "flannel.1"))
    return Proof((peer,), (REJECTION,), (Fix("flannel.1", "tcp-segmentation-offload"),)).to_json()


def statistics() -> Any:
    drop, counts = DroppedView("NO_TX_TARGET", "sent", 1), {"sent": 1, "received": 1}
    peer = PeerStats("a", "b", "c", "d", Flow(), Flow(), (drop,))
    family = FamilyStats(4, "flannel.1", "", (peer,), counts, counts, (drop,))
    return {"time": "", **Stats((family,), refused=(Dropped("no_peer", 1, 1),)).to_json()}


def swept() -> Any:
    one = Leftover("pin", "/a", "b")
    return Sweep((one,), (one,), (("/a", "b"),)).to_json()


def health() -> Any:
    status = Status(
        problems={"source": "a"},
        ended={"source": "a"},
        peers={4: 1},
        direct={4: 1},
        rejected={"overlap": 1},
        entries={"route": 1},
        drift={"deleted": 1},
        lives={4: {"alive": 1}},
        diversions={4: (Diversion(4, "rule", "", "", ""),)},
    )
    return status_document(status, "ok") | {"heartbeat_age": 0.0}


def agents() -> Any:
    """What an agent with one of everything says, among the agents of a host."""
    config = NetworkConfig.from_json('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
    node = Node(4, "192.0.2.1", "10.244.1.0/24", "10.244.0.0/16")
    admission = SimpleNamespace(node=node)
    family: Any = SimpleNamespace(
        admission=admission, iface="eth0", uplink_mtu=1500, local="192.0.2.1"
    )
    state: Any = SimpleNamespace(family=family, index=7, network="10.244.0.0/16")
    board, chronicle = StatusBoard(Status(peers={4: 1}, rejected={"overlap": 1})), Chronicle()
    board.problem("source", "a")
    chronicle.rejections(4, (Event(1.0, "rejected", 4, "a", reason="overlap", cause="b"),))
    chronicle.repaired(Event(1.0, "repaired", 4, table="route", change="deleted", after="a"))
    document = agent_document(
        board,
        chronicle,
        devices=("flannel.1",),
        config=config,
        known={4: state},
        run_dir="/run/flannel-dp",
        audit_interval=60.0,
        stuck_after=210.0,
        probes=None,
    )
    return AgentsStatus([document]).to_json()


def told() -> Any:
    peer = KnownPeer("node7", "10.244.7.0/24")
    event = Event(1.0, "removed", 4, "node7", "10.244.7.0/24")
    kept: Any = SimpleNamespace(events=[event], since=1.0, find=lambda query: [peer])
    return Answer(kept, "node7").to_json()


@pytest.mark.parametrize(
    ("title", "documents"),
    [
        ("history", [told]),
        ("status", [agents]),
        ("plan", [plan]),
        ("sync and clean", [report]),
        ("clean --stale", [swept]),
        ("show", [overview, watched]),
        ("explain", [explanation]),
        ("explain --self", [myself]),
        ("leases", [listing]),
        ("probe", [proof]),
        ("stats", [statistics]),
        ("Health", [health]),
    ],
)
def test_a_page_has_the_keys_of_a_document_and_no_others(title: str, documents: list[Any]) -> None:
    found = {generic(path) for document in documents for path in paths(document())}

    page = described(title)

    assert found - page == set()
    assert page - found - parents(found) == set()


#: All documents of the page; the sections without an example describe parts of them.
TITLES = re.findall(r"^## (.+)$", (REFERENCE / "json.md").read_text(), re.MULTILINE)
DOCUMENTS = [title for title in TITLES if title not in ("Entries", "Reasons")]


@pytest.mark.parametrize("title", DOCUMENTS)
def test_the_example_of_a_document_has_its_keys(title: str) -> None:
    (example,) = re.findall(r"^```json\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)

    found = {generic(path) for path in paths(json.loads(example))}

    known = described(title)
    more = {"schema", "ok"} if title == "Errors" else parents(known)
    assert found - known - more == set()


def test_the_keys_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--output", "json"]) == 2
    found = {*paths(json.loads(capsys.readouterr().out))}

    assert found - {"schema", "ok"} == described("Errors") - {"report"}


def test_the_keys_of_entries() -> None:
    text = section("Entries")
    page = {
        words[0]: tuple(words[1:])
        for line in text.splitlines()
        if line.startswith("| `")
        for words in [re.findall(r"`([^`]+)`", " | ".join(line.split(" | ")[:2]))]
    }

    kinds = {kind.__name__.lower(): kind._fields for kind in (Fdb, Neighbour, Nexthop, Peer, Route)}
    assert page == kinds


def test_reasons_of_rejection() -> None:
    page = [words[0] for words in rows(section("Reasons"))]

    assert sorted(page) == sorted(str(reason) for reason in Reason if reason is not Reason.ACCEPTED)


def test_keys_of_the_network_configuration() -> None:
    text = (REFERENCE / "input.md").read_text()
    page = {key for words in rows(text) for key in words if key != "ebpf"}

    given = {
        "Network": "10.244.0.0/16",
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": {"Type": "vxlan", "DirectRouting": True},
    }
    made = json.loads(NetworkConfig.from_json(json.dumps(given)).to_json())
    assert page == {*made, *made["Backend"]}


def test_the_examples_of_input_are_valid() -> None:
    text = (REFERENCE / "input.md").read_text()
    network, leases = re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

    assert NetworkConfig.from_json(network).unknown_keys == ()
    found = decode_leases(leases.encode(), origin="page")
    assert (len(found.leases), len(found.bad)) == (1, 0)


def test_the_verdicts_of_probes() -> None:
    """Each code of the source is on its page with its side, and no other."""
    text = (ROOT / "docs/probe.md").read_text()
    page = re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)

    source = "".join(
        (ROOT / "flannel_dp" / name).read_text() for name in ("probe/verdict.py", "look/probing.py")
    )
    codes = re.findall(r'Verdict\(\s*"([a-z-]+)"', source) + re.findall(r'"(not-proven)"', source)
    more = re.findall(r'"([a-z]+-[a-z-]+)" (?:if|else) ', source)
    assert sorted({*page}) == sorted({*codes, *more})
    assert len(page) == len({*page})
