"""Write the pages of docs/reference that are made from the code: flags, metrics, log messages.

    .venv/bin/python scripts/reference.py

tests/unit/test_reference.py compares the pages with what this script makes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import click

import flannel_dp
from flannel_dp.agent.metrics import ProbeCollector, StatusCollector, TrafficMetrics
from flannel_dp.agent.status import Status, StatusBoard
from flannel_dp.command.cli import command
from flannel_dp.command.output import GROUPS

REFERENCE = Path(__file__).resolve().parents[1] / "docs/reference"
PACKAGE = Path(flannel_dp.__file__).parent

_LEVELS = {
    "critical": "CRITICAL",
    "error": "ERROR",
    "exception": "ERROR",
    "warning": "WARNING",
    "info": "INFO",
    "debug": "DEBUG",
}
_RANK = {name: rank for rank, name in enumerate(dict.fromkeys(_LEVELS.values()))}

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

LOG = """\
# Log messages

Made by scripts/reference.py from the code. `sync --watch` logs to standard error from INFO on,
with `-v` from DEBUG on; other commands with `-v` (INFO) and `-vv`. A line is a time, a level, the
part of the package that logs, and a sentence. With `--log-json` it is one object with `time`,
`level`, `logger`, `message` and `fields`, the values of the sentence (and some besides) by
name, as text; an error has `error` with `type`, `message`, `hint` or `traceback`. Where standard
error is the systemd journal each line has the priority of its level.

Of peers, rejected leases and repaired entries that come at once the first five are told, and then
how many more there were. Words in *italics* are fields.
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
    board = StatusBoard(Status(peers={4: 1}, rejected={"overlap": 1}, lives={4: {"alive": 1}}))
    own = [_metric_row(metric) for metric in StatusCollector(board).collect()]
    own += [_metric_row(metric) for metric in ProbeCollector(_prober).collect()]
    counted = [_metric_row(next(pieces)) for pieces in _traffic().families()]
    head = "metric|type|labels|meaning"
    lines = [METRICS, *_table(head, own), "", COUNTERS, *_table(head, counted), ""]
    return "\n".join(lines)


def log_page() -> str:
    """Return docs/reference/log.md."""
    lines, found = [LOG], sorted(log_calls(), key=lambda one: (_RANK[one.level], one.form))
    for level in _RANK:
        rows = {
            (_italic(one.form), ", ".join(f"`{field}`" for field in one.fields), f"`{one.logger}`")
            for one in found
            if one.level == level
        }
        lines += [f"## {level}", "", *_table("message|fields|logger", sorted(rows)), ""]
    return "\n".join(lines)


class LogCall(NamedTuple):
    """One call that logs: ``fields`` are the keys of its values, ``where`` its file and line."""

    level: str
    form: str
    fields: tuple[str, ...]
    logger: str
    where: str


def log_calls() -> Iterator[LogCall]:
    """Yield every call of the package that logs. Raises ValueError for one whose message is no
    constant sentence, or whose values have no names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "agent/logs.py":  # it hands on what others log
            continue
        for scope, node in _in_functions(ast.parse(path.read_text()), None):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            method = node.func.attr
            if name in ("log", "_log", "_first") and method in (*_LEVELS, "log"):
                where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
                level = _LEVELS.get(method) or "WARNING"
                form, *values = node.args[1 if name == "_first" or method == "log" else 0 :]
                parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
                fields = _keys(values, scope, where)
                if not isinstance(form, ast.Constant) or not isinstance(form.value, str):
                    raise ValueError(f"{where}: the message is no constant")
                yield LogCall(level, form.value, fields, ".".join(parts), where)


def _in_functions(tree: ast.AST, scope: ast.AST | None) -> Iterator[tuple[ast.AST | None, ast.AST]]:
    """Yield each node with the function that it is in."""
    for node in ast.iter_child_nodes(tree):
        yield scope, node
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _in_functions(node, node if inner else scope)


def _keys(values: list[ast.expr], scope: ast.AST | None, where: str) -> tuple[str, ...]:
    if not values:
        return ()
    (given,) = values if len(values) == 1 else (None,)
    if isinstance(given, ast.Name) and scope is not None:
        assigned = (n.value for n in ast.walk(scope) if _assigns(n, given.id))
        given = next(assigned, None)
    keys = given.keys if isinstance(given, ast.Dict) else [None]
    names = tuple(key.value for key in keys if isinstance(key, ast.Constant))
    if len(names) != len(keys):
        raise ValueError(f"{where}: the values are not given by name")
    return names


def _assigns(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == name for target in node.targets
    )


def _italic(form: str) -> str:
    return re.sub(r"%\((\w+)\)[-\d.]*[a-z]", r"*\1*", form).replace("|", "\\|")


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    return {"flags.md": flags_page(), "metrics.md": metrics_page(), "log.md": log_page()}


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
        others = sorted({*command.commands} - {*commands})
        named = ", ".join(commands)
        if len(others) <= 2:
            named = f"all but {' and '.join(others)}" if others else "all"
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


def _prober() -> Any:
    """A prober that knows of one dead peer."""
    peer = SimpleNamespace(subnet="a", family=4, endpoint="b", path_mtu=1)
    totals = SimpleNamespace(sent=1, answered=1, trips=(0,) * 12, trip_sum=0.0)
    return SimpleNamespace(
        totals=totals, peers=lambda *lives, most: [peer], narrow=lambda most: [peer]
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
