"""JSON text, read as strictly as Go's encoding/json reads it, and one object of it by typed keys.

The errors name the text, the key (or line and column) and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

import msgspec

from flannel_dp.errors import ConfigError, FlannelDPError, require

#: What msgspec's typed decoders raise for a text that they do not take.
NOT_TYPED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

#: Integers up to this have one meaning for all decoders.
_EVERY_INTEGER = 2**53


def read_json(data: str | bytes, origin: str, error: type[FlannelDPError], *, hint: str) -> object:
    """Decode JSON text as strictly as Go's encoding/json does, and say where it is broken.

    The standard library's decoder is used where repeated keys may be meant (the last one must
    win, also among keys that differ in case only) and where line and column have to be reported:
    objects come back as dicts ordered by the *last* occurrence of each key. A text that
    is plain is read by msgspec's, which is loaded anyhow.

    Raises ``error`` (with ``hint``) naming ``origin``, line and column.
    """
    require(isinstance(data, (str, bytes, bytearray)), "data", data, "JSON text")
    if not data.strip():
        raise error(f"{origin}: it is empty", hint=hint)
    try:
        if isinstance(data, str):  # half of a character is no text, wherever it came from
            data = data.encode("utf-8", "surrogatepass")
        text = data.decode()
        plain, document = _read_plain(text)
        if plain:
            return document
    except UnicodeDecodeError as broken:
        before = broken.object[: broken.start]
        line = before.count(b"\n") + 1
        column = broken.start - before.rfind(b"\n")
        message = f"{origin}: line {line}, column {column}: not UTF-8 text"
        raise error(message, hint=hint) from broken
    return _read_strictly(text, origin, error, hint=hint)


def _read_plain(text: str) -> tuple[bool, object]:
    """Decode JSON text; False with it where another decoder may see more: it is broken, an object
    may have a key twice, a string is escaped or a number is larger than all decoders hold."""
    if "\\" in text:
        return False, None
    try:
        document = msgspec.json.decode(text)
    except NOT_TYPED:
        return False, None
    # A colon is a key's, or is in a string; a key that the decoder dropped has one more.
    return text.count(":") == _colons(document), document


def _colons(value: object) -> int:
    """Return how many colons there are in the text of a document, -1 where that is unknown."""
    if isinstance(value, str):
        return value.count(":")
    if isinstance(value, dict):
        found = [_colons(part) for pair in value.items() for part in pair]
        return -1 if -1 in found else len(value) + sum(found)
    if isinstance(value, list):
        found = [_colons(part) for part in value]
        return -1 if -1 in found else sum(found)
    is_large = isinstance(value, float) or (isinstance(value, int) and abs(value) > _EVERY_INTEGER)
    return -1 if is_large else 0


def _read_strictly(text: str, origin: str, error: type[FlannelDPError], *, hint: str) -> object:
    import json

    try:
        document: object = json.loads(
            text, object_pairs_hook=_last_wins, parse_constant=_no_constant
        )
        return _without_surrogates(document) if "\\ud" in text.lower() else document
    except json.JSONDecodeError as broken:
        place = f"line {broken.lineno}, column {broken.colno}"
        if broken.pos >= len(broken.doc.rstrip()):
            place += " (the end, so it is cut short)"
        raise error(f"{origin}: {place}: {broken.msg}", hint=hint) from broken
    except RecursionError as broken:
        raise error(f"{origin}: its JSON is nested too deeply", hint=hint) from broken
    except ValueError as broken:  # NaN, Infinity, or a number of thousands of digits
        raise error(f"{origin}: {broken}", hint=hint) from broken


def _last_wins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            found.pop(key, None)
            found[key] = value
    return found


def _without_surrogates(value: object) -> object:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD, as Go does."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def fold_keys(document: Mapping[str, object]) -> dict[str, object]:
    """Return keys without case, ``null`` dropped: what Go's decoder would have stored.

    Later keys win over earlier ones that differ from them in case only; a
    ``null`` leaves what an earlier one said, as it does in Go.
    """
    return {key.casefold(): value for key, value in document.items() if value is not None}


class Section:
    """One JSON object of the document: typed reads, and errors with the key's full name."""

    def __init__(self, document: object, origin: str, prefix: str) -> None:
        self.origin = origin
        self.prefix = prefix
        if not isinstance(document, dict):
            name = prefix.rstrip(".") or "the document"
            raise ConfigError(
                f"{origin}: {name}: expected an object, got {shown(document)}",
                hint='write {"Key": value, ...}',
            )
        self.written: dict[str, object] = document
        self.values = fold_keys(document)
        self.read: set[str] = set()

    def get(self, key: str) -> object:
        """Return the value of ``key``, None when absent."""
        folded = key.casefold()
        self.read.add(folded)
        return self.values.get(folded)

    def fail(self, key: str, problem: str, hint: str) -> NoReturn:
        raise ConfigError(f"{self.origin}: {self.prefix}{key}: {problem}", hint=hint)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        self.fail(key, f"expected a string, got {shown(value)}", "put the value in quotes")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self.fail(
            key, f"expected true or false, got {shown(value)}", "write true or false, unquoted"
        )

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            hint = "write the number without quotes, fraction and exponent"
            self.fail(key, f"expected a whole number, got {shown(value)}", hint)
        if not low <= value <= high:
            hint = f"use a number from {low} to {high}"
            self.fail(key, f"{shown(value)} is out of range", hint)
        return value

    def unknown(self, known: Iterable[str] = ()) -> list[str]:
        """Return the keys that were not read, in the order of the document."""
        seen = self.read.union(known)
        return [key for key in self.written if key.casefold() not in seen]


def shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    import json

    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
