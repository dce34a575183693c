"""bench/plot.py: from pytest-benchmark's JSON to pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import plot


def _installing(nodes: int, capped: bool) -> dict[str, Any]:
    found = {"floor": {"version": "gcc 12", "seconds": [nodes * 1e-5]}}
    if not capped:
        seconds = [nodes * 1e-5 + nodes**2 * 1e-8]
        found["BIRD"] = {"version": "2.0.12", "seconds": seconds}
    return {
        "name": f"test_installing[{nodes}]",
        "stats": {"median": nodes * 1.1e-5, "data": [nodes * 1.1e-5]},
        "extra_info": {
            **{"work": "installing", "layout": "host-gw", "family": 4, "nodes": nodes},
            "peers": found,
        },
    }


def _update(nodes: int) -> dict[str, Any]:
    return {
        "name": f"test_update_one[ipv4-{nodes}-move-unnamed]",
        "stats": {"median": 1e-4, "data": [1e-4, 3e-4, 2e-4]},
        "extra_info": {"figures": {}},
    }


def _stages(nodes: int) -> dict[str, Any]:
    stages = {
        stage: [0.1, 0.3, 0.2] for stage in ("source", "desired", "snapshot", "diff", "apply")
    }
    return {
        "name": f"test_installing[ipv4-{nodes}]",
        "stats": {"median": 1.5, "data": [1.5]},
        "extra_info": {
            **{"work": "installing", "family": 4, "nodes": nodes},
            "stages": {**stages, "total": [1.2, 3.1, 1.5]},
        },
    }


def _write(path: Path, benchmarks: list[dict[str, Any]]) -> Path:
    machine = {"kernel": "6.18", "processors": 2, "cpu": {"brand_raw": "Some CPU"}}
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return path


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    sizes = (300, 1_000, 3_000, 10_000)
    cost = [_installing(nodes, capped=nodes > 3_000) for nodes in sizes]
    rest = [_update(1_000), _update(50_000), _stages(1_000), _stages(30_000)]
    return _write(tmp_path / "results.json", cost + rest)


def test_draws_what_there_is_and_names_what_there_is_not(
    everything: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = plot.main([str(everything), "--out", str(tmp_path / "out")])

    said = capsys.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert code == 0
    assert names == {
        f"{name}.{kind}"
        for name in ("cost-host-gw", "stages", "latency")
        for kind in ("svg", "png")
    }
    assert said.err == "bench.plot: nothing to draw cost-vxlan from\n"
    text = (tmp_path / "out" / "cost-host-gw.svg").read_text()
    for words in ("BIRD 2.0.12", "fit, not measured", "nodes in the cluster", "(seconds)", "6.18"):
        assert words in text


def test_same_data_same_picture(tmp_path: Path) -> None:
    updates = _write(tmp_path / "results.json", [_update(1_000), _update(50_000)])
    for name in ("one", "two"):
        plot.main([str(updates), "--out", str(tmp_path / name)])

    one, two = tmp_path / "one" / "latency.svg", tmp_path / "two" / "latency.svg"
    assert one.read_bytes() == two.read_bytes()


def test_reads_medians_of_each_peer_and_size(everything: Path) -> None:
    data = plot.read([everything])

    costs = data.costs["host-gw", 4]
    assert [nodes for nodes, _ in costs["floor"]] == [300, 1_000, 3_000, 10_000]
    assert costs["BIRD"][-1] == pytest.approx((3_000, 0.12))
    assert data.stages["installing", 4, 1_000]["apply"] == 0.2
    assert data.updates["move", 4, 50_000] == [1e-4, 3e-4, 2e-4]


def test_only_what_was_not_measured_is_fitted(everything: Path) -> None:
    costs = plot.read([everything]).costs["host-gw", 4]

    beyond = plot.fitted(costs["BIRD"], 50_000)

    assert beyond[0][0] == pytest.approx(3_000)
    assert beyond[-1] == pytest.approx((50_000, 0.5 + 25.0), rel=1e-6)
    assert plot.fitted(costs["floor"], 10_000) == []
    assert plot.fitted(costs["BIRD"][:2], 50_000) == []


def test_stages_add_up_to_the_total(everything: Path) -> None:
    stages = plot.read([everything]).stages["installing", 4, 30_000]

    assert plot.shares(stages)["the rest"] == pytest.approx(1.5 - 4 * 0.2)
    assert sum(plot.shares(stages).values()) == pytest.approx(stages["total"])


def test_newest_result_is_taken(tmp_path: Path) -> None:
    old = _write(tmp_path / "b.json", [])
    (tmp_path / "deeper").mkdir()
    new = _write(tmp_path / "deeper" / "a.json", [])
    os.utime(old, (1_000, 1_000))
    os.utime(new, (2_000, 2_000))

    assert plot.newest(tmp_path) == new


def test_no_result_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--benchmark-json="):
        plot.newest(tmp_path)


@pytest.mark.parametrize(("text", "says"), [("{}", "no key 'benchmarks'"), ("[", "is not JSON")])
def test_other_files_are_refused(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)

    assert plot.main([str(path)]) == 1
    assert says in capsys.readouterr().err


def test_nothing_to_draw_is_a_failure(tmp_path: Path) -> None:
    path = _write(tmp_path / "empty.json", [])

    assert plot.main([str(path), "--out", str(tmp_path / "out")]) == 1
