"""Metrics: every sample is what the Status says, in text that Prometheus' own parsers take."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from flannel_dp.agent.metrics import Exposition
from flannel_dp.agent.status import BUCKETS, Durations, Status, StatusBoard
from flannel_dp.node.path import Diversion
from flannel_dp.resources.counters.reading import Drop, Traffic
from flannel_dp.resources.counters.traffic import PeerTraffic

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

#: A sample: its name and its labels.
Key = tuple[str, tuple[tuple[str, str], ...]]

STATUS = Status(
    started=1.0,
    ready=True,
    heartbeat=2.0,
    origin="leases.json",
    source_ok=True,
    source_changed=1_700_000_000.25,
    problems={"firewall": "nft is gone", "config": "broken"},
    peers={4: 10, 6: 7},
    direct={4: 3},
    accepted=11,
    rejected={"overlap": 2, "bad_mac": 1},
    entries={"route": 17, "fdb": 14},
    failing=5,
    conflicts=6,
    unusable=2,
    drift={"route": 8, "device": 1},
    diversions={4: (Diversion(4, "rule", "it drops", "remove it", "10.244.0.0/16", 5200),)},
    writes=9000,
    syncs=12,
    updates=13,
    failures=14,
    overruns=15,
    audits=16,
    last_audit=1_700_000_100.5,
    last_sync=1_700_000_050.5,
    apply=Durations().with_one(0.0001).with_one(0.003).with_one(0.003).with_one(60.0),
    lives={4: {"alive": 9, "dead": 1}},
)


def expected(status: Status) -> dict[Key, float]:
    """What a status has to look like; written down apart from the code that is tested."""
    found: dict[Key, float] = {}

    def one(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            found[f"flannel_dp_{name}", tuple(sorted(labels.items()))] = float(value)

    for family, number in status.peers.items():
        direct = status.direct.get(family, 0)
        one("peers", direct, family=str(family), way="direct")
        one("peers", number - direct, family=str(family), way="tunnel")
    for reason, number in status.rejected.items():
        one("leases_rejected", number, reason=reason)
    for table, number in status.entries.items():
        one("entries", number, table=table)
    for kind, number in status.drift.items():
        one("drift_repaired_total", number, kind=kind)
    for problem in status.problems:
        one("degraded", 1, problem=problem)
    one("leases_accepted", status.accepted)
    one("failing_entries", status.failing)
    one("conflicts", status.conflicts)
    one("leases_unusable", status.unusable)
    for each in status.diversions.values():
        for diversion in each:
            names = ("family", "kind", "rule", "table", "type", "device", "prefix")
            labels = {name: str(getattr(diversion, name)) for name in names}
            one("path_diversion", 1, **labels)
    for number, lives in status.lives.items():
        for life, count in lives.items():
            one("probed_peers", count, family=str(number), life=life)
    one("source_up", status.source_ok)
    one("ready", status.ready)
    one("source_last_change_timestamp_seconds", status.source_changed)
    one("last_full_audit_timestamp_seconds", status.last_audit)
    one("last_sync_timestamp_seconds", status.last_sync)
    one("event_overruns_total", status.overruns)
    one("failures_total", status.failures)
    one("audits_total", status.audits)
    one("syncs_total", status.syncs)
    one("updates_total", status.updates)
    one("kernel_writes_total", status.writes)
    for bound, number in zip(
        [*BUCKETS, float("inf")], itertools.accumulate(status.apply.counts), strict=True
    ):
        text = "+Inf" if bound == float("inf") else str(bound)
        one("apply_seconds_bucket", number, le=text)
    one("apply_seconds_count", sum(status.apply.counts))
    one("apply_seconds_sum", status.apply.total)
    return found


def families(
    status: Status, accept: str = "", parse: Callable[[str], Iterable[Metric]] = parse_text
) -> list[Metric]:
    text, _ = Exposition(StatusBoard(status)).render(accept)
    return list(parse(text.decode()))


def samples(found: Iterable[Metric]) -> dict[Key, float]:
    listed = [
        ((sample.name, tuple(sorted(sample.labels.items()))), float(sample.value))
        for family in found
        for sample in family.samples
        if sample.name.startswith("flannel_dp_")
    ]
    assert len(dict(listed)) == len(listed), "a sample appears twice"
    return dict(listed)


@pytest.mark.parametrize("status", [STATUS, Status()], ids=["busy", "fresh"])
@pytest.mark.parametrize(
    ("accept", "parse"),
    [("", parse_text), (OPENMETRICS, parse_openmetrics)],
    ids=["text", "openmetrics"],
)
def test_every_sample_is_what_the_status_says(
    status: Status, accept: str, parse: Callable[[str], Iterable[Metric]]
) -> None:
    assert samples(families(status, accept, parse)) == expected(status)


def test_every_field_of_the_status_is_shown_somewhere() -> None:
    # The process' own collector has the start; times and words of the agent's are no metrics.
    # A thread that ended is a problem, too, and shown as one. A node that waits is not ready.
    left_out = {"started", "heartbeat", "origin", "ended", "awaiting", "warnings"}
    before = expected(Status())

    for field in structs.fields(Status):
        changed = structs.replace(Status(peers={4: 5}), **{field.name: getattr(STATUS, field.name)})
        shown = samples(families(changed)) != samples(families(Status(peers={4: 5})))
        assert shown is (field.name not in left_out), field.name
    assert samples(families(Status())) == before


counts = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(0, 1 << 53), max_size=4)


@given(counts, counts, st.lists(st.floats(0, 100), max_size=20))
def test_any_names_and_numbers_survive(
    rejected: dict[str, int], drift: dict[str, int], seconds: list[float]
) -> None:
    apply = Durations()
    for one in seconds:
        apply = apply.with_one(one)
    status = Status(rejected=rejected, drift=drift, apply=apply)

    assert samples(families(status)) == expected(status)


def test_names_units_and_types_are_as_promtool_wants_them() -> None:
    """The rules of ``promtool check metrics``, as far as they concern names and types."""
    for family in families(STATUS):
        assert family.documentation, family.name
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", family.name)
        assert family.type in ("gauge", "counter", "histogram"), family.name
        assert not re.search(r"_(milli|micro|nano)?(ms|us|ns|minutes|hours)(_|$)", family.name)
        assert not re.search(r"(gauge|counter|histogram)", family.name)
        if family.type != "counter":
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        for sample in family.samples:
            assert re.fullmatch(r"[a-z][a-z_]*", "".join(sample.labels) or "none")


def test_buckets_are_cumulative_and_end_at_infinity() -> None:
    (family,) = [f for f in families(STATUS) if f.name == "flannel_dp_apply_seconds"]
    buckets = [(s.labels["le"], s.value) for s in family.samples if s.name.endswith("_bucket")]

    assert [float(le) for le, _ in buckets] == [*BUCKETS, float("inf")]
    assert buckets[0] == ("0.0005", 1.0)
    assert dict(buckets)["0.005"] == 3.0
    assert buckets[-1] == ("+Inf", 4.0)


def test_what_never_happened_has_no_sample() -> None:
    names = {name for name, _ in samples(families(Status()))}

    assert not {name for name in names if "timestamp" in name}


def test_the_process_is_described_as_everywhere_else() -> None:
    found = {sample.name: sample.value for f in families(STATUS) for sample in f.samples}

    assert found["process_start_time_seconds"] > 1_500_000_000
    assert found["process_resident_memory_bytes"] > 1_000_000


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        (OPENMETRICS, "application/openmetrics-text"),
        (f"{OPENMETRICS};q=0.5,text/plain;version=0.0.4;q=0.3", "application/openmetrics-text"),
        ("application/openmetrics-text; version=x", "text/plain"),
        ("text/plain; version=x", "text/plain"),
        ("text/plain; version=1.0.0; escaping=x", "text/plain"),
        ("text/plain; version=1.0.0; escaping=allow-utf-8", "text/plain"),
        (";;,=,;version", "text/plain"),
    ],
)
def test_form_is_what_was_asked_for(accept: str, kind: str) -> None:
    text, found = Exposition(StatusBoard(STATUS)).render(accept)

    assert found.startswith(f"{kind};")
    assert text.endswith(b"# EOF\n") is (kind != "text/plain")


def test_a_scrape_reads_the_board_anew() -> None:
    board = StatusBoard(STATUS)
    exposition = Exposition(board)
    first, _ = exposition.render()
    board.set(failures=1000)
    second, _ = exposition.render()

    assert b"flannel_dp_failures_total 14.0" in first
    assert b"flannel_dp_failures_total 1000.0" in second


def test_two_agents_do_not_share_a_registry() -> None:
    one, other = Exposition(StatusBoard(STATUS)), Exposition(StatusBoard(Status()))

    assert b"flannel_dp_leases_accepted 11.0" in one.render()[0]
    assert b"flannel_dp_leases_accepted 0.0" in other.render()[0]


def test_importing_loads_no_prometheus() -> None:
    script = "import sys, flannel_dp.agent.metrics; print('prometheus_client' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout == "False\n"


class FakeCounting:
    """Counters of 1,200 peers: more than are made objects of at once."""

    def refused(self) -> list[Any]:
        return []

    def read(self) -> dict[str, Any]:
        return {"flannel.1": FakeReading()}

    def by_peer(self, readings: dict[str, Any]) -> Iterator[PeerTraffic]:
        for number in range(1200):
            traffic = Traffic(number, 100 * number, 10**9 * bool(number))
            yield PeerTraffic(f'node"{number}', f"10.{number}.0.0/24", 4, "sent", traffic)


class FakeReading:
    drops = (
        Drop("02:00:00:00:00:01", 4, "sent", "NO_TX_TARGET", 2, 1),
        Drop("", 4, "", "NO_TX_TARGET", 3, 1),
    )


@pytest.mark.parametrize(
    ("accept", "parse"),
    [("", parse_text), (OPENMETRICS, parse_openmetrics)],
    ids=["text", "openmetrics"],
)
def test_traffic_of_many_peers_is_one_family(accept: str, parse: Callable[..., Any]) -> None:
    counting: Any = FakeCounting()

    body, _ = Exposition(StatusBoard(STATUS), lambda: counting).render(accept)

    families = {family.name: family for family in parse(body.decode())}
    packets = families["flannel_dp_peer_packets"].samples
    assert [sample.value for sample in packets] == [*range(1200)]
    assert packets[7].labels == {
        "peer": 'node"7',
        "subnet": "10.7.0.0/24",
        "family": "4",
        "direction": "sent",
    }
    assert len(families["flannel_dp_peer_last_packet_timestamp_seconds"].samples) == 1199
    (drops,) = families["flannel_dp_device_drops"].samples
    assert (drops.labels, drops.value) == ({"device": "flannel.1", "reason": "NO_TX_TARGET"}, 5)
    assert body.count(b"# TYPE flannel_dp_peer_packets") == 1
    assert "flannel_dp_peers" in families
