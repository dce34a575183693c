"""Pictures of saved benchmarks, as SVG and PNG.

    python -m bench.plot [FILE.json ...] [--out DIRECTORY]

FILE is what pytest-benchmark wrote (``--benchmark-json`` or ``--benchmark-save``); without
one it is the newest below bench/results. Of several, all benchmarks are taken together.

| picture | from |
|---|---|
| cost-vxlan, cost-host-gw | test_peers.py: installing, by nodes, the library and its peers |
| stages | test_linearity.py: microseconds a node, by stage |
| latency | test_update.py: how long updates of one peer take, as a distribution |

A picture that the files have nothing for is left out, and named. Colours are those of
Okabe and Ito, which people who see colours differently can tell apart; no line is told
by its colour alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, median_low
from typing import Any

from bench import linear

RESULTS = Path(__file__).parent / "results"

OURS = "flannel_dp"
_GROWTH_FROM = 1_000
_FIT_TO = 50_000.0

#: Colour and marker of each; the same in all pictures.
_LOOKS: Mapping[str, tuple[str, str]] = {
    OURS: ("#000000", "o"),
    "floor": ("#56B4E9", "v"),
    "flannel-style C": ("#D55E00", "s"),
    "ip -batch": ("#E69F00", "D"),
    "ip -batch, nexthops": ("#999999", "^"),
    "FRR zebra": ("#009E73", "P"),
    "BIRD": ("#CC79A7", "X"),
    "pyroute2 IPBatch": ("#009E73", "<"),
    "pyroute2": ("#0072B2", ">"),
}
_STAGES: Mapping[str, tuple[str, str]] = {
    "desired": ("#56B4E9", ""),
    "snapshot": ("#E69F00", "//"),
    "diff": ("#009E73", ".."),
    "apply": ("#0072B2", ""),
    "the rest": ("#BBBBBB", "\\\\"),
}
_STYLES = {1_000: "#56B4E9", 10_000: "#E69F00", 50_000: "#D55E00"}

_UPDATE = re.compile(r"test_update_one\[ipv(\d)-(\d+)-(join and leave|move)-unnamed\]")

Costs = dict[tuple[str, int], dict[str, list[linear.Point]]]


@dataclass
class Data:
    """What the pictures are of. ``costs`` has nodes and median seconds, by layout, family
    and who; ``stages`` seconds, by work, family, nodes and stage; ``updates`` seconds, by
    change, family and nodes; ``machine`` is a line for the foot."""

    costs: Costs = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    stages: dict[tuple[str, int, int], dict[str, float]] = field(default_factory=dict)
    updates: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""


def newest(folder: Path = RESULTS) -> Path:
    """The last file that was written. Raises FileNotFoundError when there is none."""
    found = sorted(folder.rglob("*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no results: run the benchmarks with "
            f"--benchmark-json={folder}/NAME.json, or name a file"
        )
    return found[-1]


def read(paths: Iterable[Path]) -> Data:
    """Collect what the pictures need. Raises ValueError for a file of another kind."""
    data = Data()
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(document, dict) or "benchmarks" not in document:
            raise ValueError(f"{path} is not a result of pytest-benchmark: no key 'benchmarks'")
        machine = document.get("machine_info", {})
        cpu = machine.get("cpu", {}).get("brand_raw", "")
        count = machine.get("processors", "?")
        data.machine = f"Linux {machine.get('kernel', '?')}, {count} processors {cpu}".strip()
        for benchmark in document["benchmarks"]:
            _take(data, benchmark)
    return data


def _take(data: Data, benchmark: dict[str, Any]) -> None:
    extra = benchmark.get("extra_info", {})
    if extra.get("work") == "installing" and "peers" in extra:
        costs = data.costs[extra["layout"], extra["family"]]
        costs[OURS].append((extra["nodes"], benchmark["stats"]["median"]))
        for name, peer in extra["peers"].items():
            data.versions[name] = peer["version"]
            costs[name].append((extra["nodes"], median(peer["seconds"])))
    if "stages" in extra:
        key = (extra["work"], extra["family"], extra["nodes"])
        data.stages[key] = _typical(extra["stages"])
    update = _UPDATE.fullmatch(benchmark["name"])
    if update and benchmark["stats"].get("data"):
        family, nodes, change = update.groups()
        data.updates[change, int(family), int(nodes)] = benchmark["stats"]["data"]


def _typical(stages: Mapping[str, list[float]]) -> dict[str, float]:
    """The stages of the round whose total is the median: of one round, so that they add up."""
    totals = stages["total"]
    place = totals.index(median_low(totals))
    return {name: taken[place] for name, taken in stages.items()}


# --- cost against nodes -----------------------------------------------------------------


def fitted(points: Sequence[linear.Point], to: float = _FIT_TO) -> list[linear.Point]:
    """Points of the fitted curve from the largest size that was measured on to ``to``; none
    where that is not beyond, or where there are too few sizes."""
    relevant = linear.relevant(sorted(points), _GROWTH_FROM)
    largest = max(nodes for nodes, _ in points)
    if largest >= to or len({nodes for nodes, _ in relevant}) < linear.LEAST_SIZES:
        return []
    curve = linear.curve(relevant)
    steps = 24
    return [
        (nodes, curve.at(nodes))
        for nodes in (largest * (to / largest) ** (step / steps) for step in range(steps + 1))
    ]


def _cost(data: Data, layout: str) -> Any:
    from matplotlib.lines import Line2D

    families = sorted(family for which, family in data.costs if which == layout)
    figure, axes = _panels(len(families), 5.2)
    names: dict[str, None] = {}
    for panel, family in zip(axes, families, strict=True):
        costs = data.costs[layout, family]
        for name in sorted(costs, key=lambda one: -max(costs[one])[1]):
            names[name] = None
            _line(panel, name, sorted(costs[name]))
        panel.set(xscale="log", yscale="log", title=f"IPv{family}", xlabel="nodes in the cluster")
        _plain_ticks(panel)
    axes[0].set_ylabel("time to install all peers (seconds)")
    handles = [
        Line2D([], [], color=_look(name)[0], marker=_look(name)[1], label=_label(data, name))
        for name in names
    ]
    handles.append(Line2D([], [], color="#666666", linestyle="--", label="fit, not measured"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    what = {
        "vxlan": "vxlan: a route, a neighbour and an FDB entry for each node",
        "host-gw": "host-gw: a route for each node",
    }
    _finish(figure, data, what.get(layout, layout))
    return figure


def _line(panel: Any, name: str, points: Sequence[linear.Point]) -> None:
    colour, marker = _look(name)
    width = 2.4 if name == OURS else 1.4
    order = 3 if name == OURS else 2
    panel.plot(*zip(*points, strict=True), color=colour, marker=marker, lw=width, zorder=order)
    beyond = fitted(points)
    if beyond:
        panel.plot(*zip(*beyond, strict=True), color=colour, lw=width, ls="--", zorder=order)


def _look(name: str) -> tuple[str, str]:
    return _LOOKS.get(name, ("#666666", "*"))


def _label(data: Data, name: str) -> str:
    version = data.versions.get(name, "")
    if name == "floor":
        return "floor: the kernel alone"
    return name if "gcc" in version else f"{name} {version}".strip()


# --- where the time goes -------------------------------------------------------------------


def shares(stages: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, and as "the rest" what the total has beyond them."""
    known = {name: stages.get(name, 0.0) for name in _STAGES if name != "the rest"}
    return {**known, "the rest": max(stages["total"] - sum(known.values()), 0.0)}


def _stages(data: Data) -> Any:
    kinds = sorted({(work, family) for work, family, _ in data.stages})
    figure, axes = _panels(len(kinds), 3.4, share=False)
    for panel, (work, family) in zip(axes, kinds, strict=True):
        sizes = sorted(
            nodes for kind, version, nodes in data.stages if (kind, version) == (work, family)
        )
        _bars(panel, [(nodes, data.stages[work, family, nodes]) for nodes in sizes])
        panel.set(title=f"{work}, IPv{family}", xlabel="nodes")
    axes[0].set_ylabel("time per node (µs)")
    handles, labels = axes[0].get_legend_handles_labels()
    # From the top down, as the bars are stacked.
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    _finish(figure, data, "Where the time of a sync goes (above each bar: the whole sync)")
    return figure


def _bars(panel: Any, bars: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    places = range(len(bars))
    base = [0.0] * len(bars)
    for stage, (colour, hatch) in _STAGES.items():
        heights = [shares(stages)[stage] / nodes * 1e6 for nodes, stages in bars]
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": stage}
        panel.bar(places, heights, bottom=base, width=0.7, **style)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, top, (_, stages) in zip(places, base, bars, strict=True):
        taken = stages["total"] * 1e3
        text = f"{taken:,.0f} ms" if taken >= 100 else f"{taken:.3g} ms"
        panel.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", size=7)
    panel.set_xticks(places, [f"{nodes:,}" for nodes, _ in bars])
    panel.margins(y=0.1)


# --- how long one update takes ---------------------------------------------------------------


def _latency(data: Data) -> Any:
    from matplotlib.ticker import LogLocator

    kinds = sorted({change for change, _, _ in data.updates})
    figure, axes = _panels(len(kinds), 4.6)
    for panel, change in zip(axes, kinds, strict=True):
        for (kind, family, nodes), seconds in sorted(data.updates.items()):
            if kind != change:
                continue
            ordered = sorted(one * 1e6 for one in seconds)
            share = [(place + 1) / len(ordered) * 100 for place in range(len(ordered))]
            panel.step(
                ordered,
                share,
                where="post",
                color=_STYLES.get(nodes, "#000000"),
                ls="-" if family == 4 else ":",
                label=f"IPv{family}, {nodes:,} nodes",
            )
        title = {"join and leave": "a peer leaves or joins", "move": "a peer moves"}[change]
        panel.set(xscale="log", title=title, xlabel="time of one update (µs)", ylim=(0, 100))
        _plain_ticks(panel, both=False)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[0].set_ylabel("updates that took no longer (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _finish(
        figure, data, "How long it takes to follow a change of one peer, in clusters of three sizes"
    )
    return figure


# --- what all have in common -------------------------------------------------------------------


def _panels(count: int, width: float, *, share: bool = True) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + 2.2, 4.6), layout="constrained")
    axes = list(figure.subplots(1, count, sharey=share, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(visible=True, axis="y", color="#DDDDDD", lw=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def _plain_ticks(panel: Any, *, both: bool = True) -> None:
    """1,000 rather than 10 to the third."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for axis in (panel.xaxis, panel.yaxis) if both else (panel.xaxis,):
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )
        axis.set_minor_formatter(NullFormatter())


def _finish(figure: Any, data: Data, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(data.machine, x=0.01, ha="left", size=7, color="#666666")


def draw(data: Data, folder: Path) -> tuple[list[Path], list[str]]:
    """Write all pictures that there is data for; returns the files and what was left out."""
    import matplotlib as mpl

    # The same data gives the same file, byte for byte; text in an SVG stays text.
    mpl.rcParams.update({"svg.hashsalt": "flannel-dp", "svg.fonttype": "none", "font.size": 9})
    pictures: dict[str, tuple[bool, Callable[[], Any]]] = {
        f"cost-{layout}": (
            any(which == layout for which, _ in data.costs),
            lambda layout=layout: _cost(data, layout),  # type: ignore[misc]
        )
        for layout in ("vxlan", "host-gw")
    }
    pictures["stages"] = (bool(data.stages), lambda: _stages(data))
    pictures["latency"] = (bool(data.updates), lambda: _latency(data))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (there, make) in pictures.items():
        if there:
            figure = make()
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                written.append(folder / f"{name}.{kind}")
                figure.savefig(written[-1], dpi=150, metadata=metadata)
    return written, [name for name, (there, _) in pictures.items() if not there]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the files have; the status is 1 when that is nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description="pictures of saved benchmarks"
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "plots", metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    try:
        data = read(options.files or [newest()])
    except (OSError, ValueError) as error:
        print(f"bench.plot: {error}", file=sys.stderr)
        return 1
    written, missing = draw(data, options.out)
    for path in written:
        print(path)
    for name in missing:
        print(f"bench.plot: nothing to draw {name} from", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
