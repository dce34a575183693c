"""Log lines: one per record, as ``key=value`` text or as JSON, and no line said a thousand times.

Text is ``time=... level=INFO logger=flannel_dp.x message``. A field is an argument that the
format of a call names, ``log.info("device=%s mtu=%d", name, mtu)``, or is passed by itself where
their number varies, ``extra={"fields": {...}}``. Fields are read from the format and the arguments
and never from the finished sentence: arguments hold what strangers wrote (names in leases, answers
of servers), and such a text can neither add a field nor end one. Control characters are written
as escapes, so that no text begins a second line or steers the terminal of a reader.
"""

from __future__ import annotations

import contextlib
import json as _json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from flannel_dp.errors import ConfigError, FlannelDPError

#: C0 and C1 controls, and the two separators of Unicode that some readers break lines at.
_ESCAPES = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029)
} | {9: "\\t", 10: "\\n", 13: "\\r"}

#: Whose formats are known to be constant texts: a library may log a text that is an answer.
_OURS = "flannel_dp"

#: A field in a format. ``error`` is a sentence up to the end; other values end at a blank.
_FIELD = re.compile(
    r"""(?:^|(?<=\s))([A-Za-z_][\w.-]*)=((?<=\berror=).+|"[^"]*"|'[^']*'|\S*?(?=[,;]*(?:\s|$)))""",
    re.DOTALL,
)
_CONVERSION = re.compile(r"%(?:%|[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])")


def one_line(text: str) -> str:
    """Return ``text`` with control characters and lone surrogates as escapes: printable on one
    line."""
    return _utf8(text.translate(_ESCAPES))


def _utf8(text: str) -> str:
    """Return lone surrogates, which stand for bytes that were no text, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class _Piece(NamedTuple):
    """A part of a message: a field with its key, or the words between two fields (key "")."""

    key: str
    text: str
    given: bool  # made of an argument, and not of the format alone


def _pieces(form: str, args: tuple[object, ...]) -> list[_Piece]:
    """Format a message in pieces. Raises what formatting raises, TypeError for other arguments
    than the format has."""
    found: list[_Piece] = []
    at = used = 0

    def add(key: str, part: str) -> None:
        nonlocal used
        count = sum(match[0] != "%%" for match in _CONVERSION.finditer(part))
        text = part % args[used : used + count] if args else part
        used += count if args else 0
        found.append(_Piece(key, text, bool(count and args)))

    for match in _FIELD.finditer(form):
        add("", form[at : match.start(2)])
        add(match[1], match[2])
        at = match.end()
    add("", form[at:])
    if used != len(args):
        raise TypeError(f"{len(args)} arguments for {used} in the format")
    return found


def _named_pieces(record: logging.LogRecord) -> list[_Piece]:
    """Return the message in pieces; one without a key where it has no fields or cannot be
    formatted."""
    own = record.name.partition(".")[0] == _OURS
    if isinstance(record.args, Mapping):
        return [_Piece("", _message(record), given=False)]
    if own and isinstance(record.msg, str) and isinstance(record.args, tuple | None):
        with contextlib.suppress(Exception):  # the message says that it cannot be formatted
            return _pieces(record.msg, record.args or ())
    return [_Piece("", _message(record), given=False)]


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Return the fields of a record of this package in their order, as text; the last one of a
    key counts."""
    if isinstance(record.args, Mapping):
        own = record.name.partition(".")[0] == _OURS
        return {str(key): str(value) for key, value in record.args.items()} if own else {}
    found = {
        one.key: one.text if one.given else _unquoted(one.text)
        for one in _named_pieces(record)
        if one.key
    }
    more = getattr(record, "fields", None)
    if isinstance(more, dict):
        found |= {str(key): str(value) for key, value in more.items()}
    return found


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _text_of(record: logging.LogRecord) -> str:
    """Return the message for a text line: values that hold a blank or a quote are quoted, except
    that of ``error``, which is a sentence."""
    return "".join(
        _json.dumps(one.text, ensure_ascii=False)
        if one.given and one.key not in ("", "error") and re.search(r"[\s\"]", one.text)
        else one.text
        for one in _named_pieces(record)
    )


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
            _text_of(record),
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
