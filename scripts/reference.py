"""Write the pages of docs/reference that are made from the code: flags and metrics.

    .venv/bin/python scripts/reference.py

tests/unit/test_reference.py compares the pages with what this script makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from flannel_dp.agent.metrics import StatusCollector, TrafficMetrics
from flannel_dp.agent.status import Status, StatusBoard
from flannel_dp.command.cli import command
from flannel_dp.command.output import GROUPS

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"

FLAGS = """\
# Flags

Made by scripts/reference.py from the command itself. Flags that flanneld has carry flanneld's
names; they may be written with one dash, and `FLANNELD_*` variables set them where the command
line does not.
"""

IGNORED = """\
## Accepted and ignored

A start script of flanneld works without a change, so `sync` accepts these flags of flanneld, too:
"""

METRICS = """\
# Metrics

Made by scripts/reference.py from the agent itself. `sync --watch` serves them at /metrics of
`--healthz-ip` and `--healthz-port`, as OpenMetrics or in Prometheus' text format, with the extra
`[metrics]`. Times are seconds since the epoch; a time that never was has no sample. `process_*`
metrics have their usual meaning.
"""

COUNTERS = """\
## With `--counters` or `--forwarding ebpf`

One series per peer, family and direction on every node: see "In Prometheus" in
[operations](../operations.md).
"""


def flags_page() -> str:
    """Return docs/reference/flags.md."""
    lines = [FLAGS]
    for title, names in GROUPS.items():
        rows = [row for name in names.split() for row in _flag_rows(name)]
        lines += [f"## {title}", "", *_table("flag|variable|default|commands|meaning", rows), ""]
    hidden = [
        (_spelt(option), option.help or "")
        for option in _options(command.commands["sync"])
        if option.hidden and option.name != "version"
    ]
    return "\n".join([*lines, IGNORED, *_table("flag|why it has no effect", hidden), ""])


def metrics_page() -> str:
    """Return docs/reference/metrics.md."""
    board = StatusBoard(Status(peers={4: 1}, rejected={"overlap": 1}))
    own = [_metric_row(metric) for metric in StatusCollector(board).collect()]
    counted = [_metric_row(next(pieces)) for pieces in _traffic().families()]
    head = "metric|type|labels|meaning"
    lines = [METRICS, *_table(head, own), "", COUNTERS, *_table(head, counted), ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {"flags.md": flags_page(), "metrics.md": metrics_page()}


def _options(one: click.Command) -> Iterator[click.Option]:
    yield from (each for each in one.params if isinstance(each, click.Option))


def _flag_rows(name: str) -> Iterator[tuple[str, ...]]:
    """The rows of a parameter: one, or several where commands differ in its meaning."""
    users: dict[str, tuple[click.Option, list[str]]] = {}
    for each, one in sorted(command.commands.items()):
        for option in _options(one):
            if option.name == name and not option.hidden:
                users.setdefault(option.help or "", (option, []))[1].append(each)
    for option, commands in users.values():
        named = "all" if len(commands) == len(command.commands) else ", ".join(commands)
        text, default = _help_of(option)
        variable = f"`{option.envvar}`" if option.envvar else ""
        yield _spelt(option), variable, default, named, text


def _spelt(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag or option.count:
        return names
    kind = "\\|".join(getattr(option.type, "choices", ())) or option.metavar or ""
    return f"{names} {kind}".replace("NAME|", "NAME\\|").replace("FILE|", "FILE\\|")


def _help_of(option: click.Option) -> tuple[str, str]:
    """The meaning, and the default, which may stand in brackets at the end of the help."""
    text = option.help or ""
    told = re.search(r" \[default(?P<when> [^:]*)?: (?P<what>.*)\]\.$", text)
    if told:
        when = f"{told['what']} ({told['when'].strip()})" if told["when"] else told["what"]
        return text[: told.start()].rstrip(".") + ".", when
    default: Any = option.default
    if option.is_flag:
        return text, "on" if default is True else "off"
    return text, f"`{default}`" if isinstance(default, (str, int, float)) and default else ""


def _metric_row(metric: Any) -> tuple[str, ...]:
    total = "_total" if metric.type == "counter" else ""
    labels = list(getattr(metric, "_labelnames", ()))
    return (
        f"`{metric.name}{total}`",
        metric.type,
        ", ".join(f"`{label}`" for label in labels),
        metric.documentation,
    )


def _traffic() -> TrafficMetrics:
    """The metrics of counters, with a sample of each."""
    traffic = SimpleNamespace(packets=1, bytes=1, last=1)
    peer = SimpleNamespace(peer="a", subnet="b", family=4, direction="sent", traffic=traffic)
    drop = SimpleNamespace(reason="no_peer", packets=1)
    counting: Any = SimpleNamespace(by_peer=lambda readings: [peer])
    readings: Any = {"flannel.1": SimpleNamespace(drops=[drop])}
    refused: Any = [drop]
    return TrafficMetrics(counting, readings, refused)


def _table(head: str, rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    names = head.split("|")
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    yield from (f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text)
        print(REFERENCE / name, file=sys.stderr)
