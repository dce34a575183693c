"""Log lines: one per record, as text or as JSON, and no line said a thousand times.

A message is a sentence whose values have names: ``log.info("Peer %(peer)s was added", {"peer":
name})``. Text is ``time=... level=INFO logger=flannel_dp.x Peer node7 was added``; JSON has the
sentence and, as ``fields``, the values by name, also those that the sentence does not name. Fields
are what a call passed and are never read from the finished sentence: values hold what strangers
wrote (names in leases, answers of servers), and such a text can neither add a field nor end one.
Control characters are written as escapes, so that no text begins a second line or steers the
terminal of a reader. Where the stream is the journal's (systemd.exec(5)) each line begins with its
priority (sd-daemon(3)), which the journal takes off.
"""

from __future__ import annotations

import json as _json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from flannel_dp.errors import ConfigError, FlannelDPError

#: C0 and C1 controls, and the two separators of Unicode that some readers break lines at.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
} | {9: "\\t", 10: "\\n", 13: "\\r"}

#: Whose formats are known to be constant texts: a library may log a text that is an answer.
_OURS = "flannel_dp"


_PRIORITIES = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)


def one_line(text: str) -> str:
    """Return ``text`` with control characters and lone surrogates as escapes: printable on one
    line."""
    return _utf8(text.translate(_ESCAPES))


def _utf8(text: str) -> str:
    """Return lone surrogates, which stand for bytes that were no text, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Return the fields of a record of this package in their order, as text."""
    own = record.name.partition(".")[0] == _OURS
    if not own or not isinstance(record.args, Mapping):
        return {}
    return {str(key): str(value) for key, value in record.args.items()}


def configure(
    level: int | str, json: bool = False, stream: TextIO | None = None
) -> logging.Handler:
    """Log to ``stream`` (standard error when None) from ``level`` on, and return the handler.

    Calling it again replaces what the last call set up. ``level`` is a number of
    ``logging`` or a name in any case; it holds for this package. Libraries log from
    WARNING on, and with DEBUG from INFO on, never lower: some of them print the headers
    of their requests there, credentials included.

    Raises ConfigError for a level that is none.
    """
    number = _level(level)
    handler = _LogHandler(sys.stderr if stream is None else stream)
    form = JsonFormatter() if json else TextFormatter()
    handler.setFormatter(_WithPriority(form) if _is_journal(handler.stream) else form)
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _LogHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.INFO if number <= logging.DEBUG else logging.WARNING))
    logging.getLogger("flannel_dp").setLevel(number)
    return handler


def _level(level: int | str) -> int:
    names = logging.getLevelNamesMapping()
    found = level if isinstance(level, int) else names.get(level.upper())
    if found is None:
        raise ConfigError(
            f"log level {level!r} is none", hint="one of debug, info, warning, error, critical"
        )
    return found


def _is_journal(stream: TextIO) -> bool:
    """Return whether ``stream`` is the one that systemd has connected to the journal."""
    named = os.environ.get("JOURNAL_STREAM", "")
    if not named:
        return False
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream that is no file
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


class _LogHandler(logging.StreamHandler[TextIO]):
    """A log that cannot be written (a full disk, a closed pipe) is no reason to fail."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


# ---- the two forms -------------------------------------------------------------


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # whatever a value's __str__ raises: the line is not lost
        return f"{record.msg} (cannot be formatted: {error})"


def _time(record: logging.LogRecord) -> str:
    """Return the time in RFC 3339, UTC, milliseconds."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _failure(record: logging.LogRecord) -> dict[str, str]:
    """Return ``exc_info`` as type, message and hint; an unexpected error with its traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return {}
    if isinstance(error, FlannelDPError):
        return {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)).rstrip(),
    }


class TextFormatter(logging.Formatter):
    """``time=2026-03-01T12:00:00.000Z level=INFO logger=flannel_dp.agent.agent message``.

    ``exc_info`` is appended as ``error=Type: message - hint``, with ``traceback=`` for
    errors that are not of this package.
    """

    def format(self, record: logging.LogRecord) -> str:
        parts = [
            f"time={_time(record)} level={record.levelname} logger={record.name}",
            _message(record),
        ]
        if failure := _failure(record):
            hint = f" - {failure['hint']}" if failure.get("hint") else ""
            parts.append(f"error={failure['type']}: {failure['message']}{hint}")
            if "traceback" in failure:
                parts.append(f"traceback={failure['traceback']!r}")
        if record.stack_info:
            parts.append(f"stack={record.stack_info!r}")
        return one_line(" ".join(parts))


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message, fields, and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _utf8(_message(record)),
            "fields": {_utf8(key): _utf8(value) for key, value in fields_of(record).items()},
        }
        if failure := _failure(record):
            line["error"] = {key: _utf8(value) for key, value in failure.items()}
        if record.stack_info:
            line["stack"] = record.stack_info
        return _json.dumps(line, separators=(",", ":"))


def in_words(seconds: float) -> str:
    """Return a time as "0.3 s", "48 s", "3 min 20 s", "2 h 5 min" or "3 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, below in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {below}"
    return f"{whole} s"


class _WithPriority(logging.Formatter):
    """Another form, with the priority of syslog(3) in front."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        priority = next((n for level, n in _PRIORITIES if record.levelno >= level), 7)
        return f"<{priority}>{self._form.format(record)}"


# ---- not a thousand times ------------------------------------------------------


def _formatted(form: str, args: tuple[object, ...]) -> str:
    """Return the message as ``logging`` does, and no error from a wrong format."""
    return _message(logging.LogRecord("", 0, "", 0, form, args, None))


class _Count:
    """What is known of one kind: when it was last logged, and how often it was not since."""

    __slots__ = ("last", "logged", "more", "total")

    def __init__(self, logged: float) -> None:
        self.logged = logged
        self.more = 0
        self.total = 1
        self.last = ""


class FirstOfKind:
    """Log the first failure of a kind in full and count the rest.

    ``warning(kind, format, *args)`` logs the first one. Later ones are counted, and logged as
    "... and N more" with the last of them in full, at most every ``every`` seconds and when the
    kind has recovered. No timer runs: the count is logged by the next failure or by
    ``recovered``. ``clock`` is in seconds and monotonic. At most ``kinds`` kinds are remembered;
    beyond that, the one that was silent for longest is dropped. Thread-safe.
    """

    def __init__(
        self,
        log: logging.Logger,
        every: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        kinds: int = 256,
    ) -> None:
        self._log, self._every, self._clock, self._most = log, every, clock, kinds
        self._lock = threading.Lock()
        self._counts: dict[str, _Count] = {}

    def warning(self, kind: str, form: str, *args: object) -> None:
        """Note a failure of ``kind``: log it when it is the first, else count it."""
        now = self._clock()
        with self._lock:
            count = self._counts.pop(kind, None)
            first = count is None
            if count is None:
                if len(self._counts) >= self._most:
                    self._log_count(*self._drop_oldest())
                count = _Count(now)
            else:
                count.more += 1
                count.total += 1
                count.last = _formatted(form, args)
            self._counts[kind] = count  # the last one now: the first is silent for longest
            if first:
                self._log.warning(form, *args)
            elif now - count.logged >= self._every:
                self._log_count(kind, count)
                count.logged = now

    def recovered(self, kind: str) -> int:
        """Log the count of ``kind``; the next failure of it is a first one again.

        Return how many failures there were, 0 where none is remembered.
        """
        with self._lock:
            count = self._counts.pop(kind, None)
            if count is None:
                return 0
            self._log_count(kind, count)
            return count.total

    def _drop_oldest(self) -> tuple[str, _Count]:
        kind = next(iter(self._counts))
        return kind, self._counts.pop(kind)

    def _log_count(self, kind: str, count: _Count) -> None:
        if count.more:
            self._log.warning(
                "... and %(more)d more of %(kind)s, the last: %(last)s",
                {"more": count.more, "kind": kind, "last": count.last},
            )
            count.more = 0
