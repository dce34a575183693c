"""Log lines: one per record, as ``key=value`` text or as JSON, and no line said a thousand times.

Text is ``time=... level=INFO logger=flannel_dp.x message``. Messages hold what strangers
wrote (names in leases, answers of servers), so control characters are written as escapes:
nobody can forge a second line, or paint the terminal of whoever reads the log.
"""

from __future__ import annotations

import json as _json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from flannel_dp.errors import ConfigError, FlannelDPError

#: C0 and C1 controls, and the two separators of Unicode that some readers break lines at.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
} | {9: "\\t", 10: "\\n", 13: "\\r"}

#: ``error`` comes last in a message and is a sentence; every other value ends at a blank.
_FIELD = re.compile(
    r"""(?:^|(?<=\s))([A-Za-z_][\w.-]*)=((?<=\berror=).+|"[^"]*"|'[^']*'|\S*)""", re.DOTALL
)


def one_line(text: str) -> str:
    """``text`` with control characters and lone surrogates as escapes: printable on one line."""
    return _utf8(text.translate(_ESCAPES))


def _utf8(text: str) -> str:
    """Lone surrogates, which stand for bytes that were no text, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def fields(message: str) -> dict[str, str]:
    """The ``key=value`` pairs of a message, in their order; values stay text.

    A value ends at the next blank, or at its closing quote when it begins with one.
    That of ``error`` is all the rest. The last one of a key counts.
    """
    return {key: _unquoted(value) for key, value in _FIELD.findall(message)}


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value.rstrip(",;")


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
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
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
        return f"{record.msg} error=cannot be formatted: {error}"


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _failure(record: logging.LogRecord) -> dict[str, str]:
    """``exc_info`` as type, message and hint; one that nobody meant to raise, with a traceback."""
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
        message = _utf8(_message(record))
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "fields": fields(message),
        }
        if failure := _failure(record):
            line["error"] = {key: _utf8(value) for key, value in failure.items()}
        if record.stack_info:
            line["stack"] = record.stack_info
        return _json.dumps(line, separators=(",", ":"))


# ---- not a thousand times ------------------------------------------------------


def _formatted(form: str, args: tuple[object, ...]) -> str:
    """As ``logging`` does it, and no error from a wrong format."""
    return _message(logging.LogRecord("", 0, "", 0, form, args, None))


class _Count:
    """What is known of one kind: when it was last said, and how often it was not since."""

    __slots__ = ("last", "level", "more", "said", "total")

    def __init__(self, said: float) -> None:
        self.said = said
        self.more = 0
        self.total = 1
        self.level = logging.WARNING
        self.last = ""


class FirstOfKind:
    """Log the first failure of a kind in full and count the rest.

    ``warning(kind, format, *args)`` logs the first one. Those that follow are counted,
    and told of as "... and N more", with the last of them in full, at most every
    ``every`` seconds and when the kind is over. No timer runs: the count is told by the
    next failure, by ``recovered`` or by ``flush``. ``clock`` is in seconds and monotonic. At most
    ``kinds`` kinds are remembered; beyond, the one that was silent for longest is let go.
    Thread-safe.
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

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that are not over."""
        with self._lock:
            return frozenset(self._counts)

    def warning(self, kind: str, form: str, *args: object) -> None:
        """A failure of ``kind``, with level WARNING."""
        self.log(logging.WARNING, kind, form, *args)

    def error(self, kind: str, form: str, *args: object) -> None:
        """A failure of ``kind``, with level ERROR."""
        self.log(logging.ERROR, kind, form, *args)

    def log(self, level: int, kind: str, form: str, *args: object) -> None:
        """A failure of ``kind``: logged when it is the first, else counted."""
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
                count.level = level
                count.last = _formatted(form, args)
            self._counts[kind] = count  # the last one now: the first is silent for longest
            if first:
                self._log.log(level, form, *args)
            elif now - count.said >= self._every:
                self._log_count(kind, count)
                count.said = now

    def recovered(self, kind: str) -> bool:
        """``kind`` has come to its end: tell the count, and that it is over.

        The next failure of this kind is a first one again. Returns whether there was one.
        """
        with self._lock:
            count = self._counts.pop(kind, None)
            if count is None:
                return False
            self._log_count(kind, count)
            self._log.info("kind=%s failures=%d over", kind, count.total)
            return True

    def flush(self) -> None:
        """Tell what was counted and not told yet, before an end."""
        now = self._clock()
        with self._lock:
            for kind, count in self._counts.items():
                if self._log_count(kind, count):
                    count.said = now

    def _drop_oldest(self) -> tuple[str, _Count]:
        kind = next(iter(self._counts))
        return kind, self._counts.pop(kind)

    def _log_count(self, kind: str, count: _Count) -> bool:
        if not count.more:
            return False
        form = "kind=%s ... and %d more, the last: %s"
        self._log.log(count.level, form, kind, count.more, count.last)
        count.more = 0
        return True
