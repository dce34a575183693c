"""bench/model.py: its arithmetic, its words, and that docs/scaling.md quotes it as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import model
from bench.model import COEFFICIENTS, Node, Store

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_document_has_the_tables_that_the_program_prints() -> None:
    text = DOCUMENT.read_text()

    assert model.tables(model.SIZES, 4) in text
    assert model.coefficients() in text


@pytest.mark.parametrize("one", COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_a_coefficient_says_where_it_is_from(one: model.Coefficient) -> None:
    assert one.value > 0
    assert one.unit
    assert one.source
    assert one.origin in {"measured", "published", "deduced"}
    if one.origin == "measured":
        assert "bench" in one.source
    assert "|" not in one.source + one.unit  # it is a cell of a table


@given(st.integers(1_000, 10**7), st.sampled_from([4, 6]))
def test_a_nodes_costs_grow_with_the_cluster_and_no_faster(nodes: int, family: int) -> None:
    one, two = Node.of(nodes, family), Node.of(2 * nodes, family)

    assert two.entries == 2 * one.entries
    assert two.install == pytest.approx(2 * one.install)
    assert two.kernel_bytes == pytest.approx(2 * one.kernel_bytes)
    assert one.agent_bytes < two.agent_bytes < 2 * one.agent_bytes


@given(st.integers(1, 10**7))
def test_a_stores_costs_grow_with_the_square(nodes: int) -> None:
    for make in (Store.etcd, Store.kubernetes):
        one, two = make(nodes, nodes), make(2 * nodes, 2 * nodes)

        assert two.a_node == pytest.approx(2 * one.a_node)
        assert two.server == pytest.approx(4 * one.server)
        assert two.storm == pytest.approx(4 * one.storm)


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_relays_spare_the_server_and_not_the_nodes(nodes: int, watchers: int) -> None:
    every, some = Store.etcd(nodes, nodes), Store.etcd(nodes, watchers)

    assert some.a_node_bytes == every.a_node_bytes
    assert some.server_bytes * nodes == pytest.approx(every.server_bytes * watchers)


def test_ten_thousand_nodes_by_hand() -> None:
    """10,000 leases renewed every 23 hours, each seen by 10,000 nodes."""
    found = Store.etcd(10_000, 10_000)

    assert found.a_node == pytest.approx(10_000 / 82_800)
    assert found.server == pytest.approx(1_207.7, rel=1e-4)
    assert found.storm_bytes == pytest.approx(1e8 * COEFFICIENTS["lease"].value)
    assert Node.of(10_000, 4).entries == 40_000
    assert Node.of(10_000, 6).entries == 30_000


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (0.0121, "/s", "0.0121 /s"),
        (999.6, "B", "1 kB"),
        (1_400_000, "B", "1.4 MB"),
        (3.83e9, "B/s", "3.83 GB/s"),
        (9.5e15, "B", "9.5 PB"),
        (0.011, "s", "11 ms"),
        (0.00021, "s", "210 us"),
        (11, "s", "11 s"),
        (150, "s", "2.5 min"),
        (7200, "s", "120 min"),
        (161_600, "s", "44.9 h"),
        (864_000, "s", "10 d"),
    ],
)
def test_amounts(value: float, unit: str, text: str) -> None:
    assert model.amount(value, unit) == text


def test_what_is_beyond_the_measured_has_a_star() -> None:
    head = model.table("title", [("row", str)], (model.MEASURED, model.MEASURED + 1))[0]

    assert head == "| title | 50,000 | 50,001 * |"


def test_the_program_prints_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--nodes", "5000", "--family", "6", "--watchers", "10"]) == 0
    printed = capsys.readouterr().out
    assert "| a node, IPv6 | 5,000 |" in printed
    assert printed == model.tables([5_000], 6, 10)

    assert model.main(["--coefficients"]) == 0
    assert capsys.readouterr().out == model.coefficients()


def test_the_made_up_node_is_what_the_agent_takes_for_one() -> None:
    event = json.loads(model.kube_event())

    assert event["object"]["kind"] == "Node"
    assert 8_000 < len(model.kube_event()) < 15_000
    found = model.measure_heartbeat(events=50)
    assert found["node"] == len(model.kube_event())
    assert 0 < found["look"] < 0.01
