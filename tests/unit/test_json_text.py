"""JSON text: the fast decoder says what the strict one says, or leaves it to that one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flannel_dp.cluster import json_text
from flannel_dp.cluster.json_text import read_json
from flannel_dp.errors import ConfigError


def _read(reader: Any, text: str) -> Any:
    """Return what a reader makes of a text: ("read", the document) or ("error", its message)."""
    try:
        return "read", reader(text, "net-conf", ConfigError, hint="correct it")
    except ConfigError as error:
        return "error", error.message


def _spelled(document: Any) -> st.SearchStrategy[str]:
    """Return texts of one document, as different writers spell it."""
    dumps = (
        lambda: json.dumps(document),
        lambda: json.dumps(document, ensure_ascii=False),
        lambda: json.dumps(document, indent=2, separators=(" ,", " : ")),
    )
    return st.sampled_from(dumps).map(lambda write: write())


KEYS = st.sampled_from(["Network", "network", "Backend", "a:b", ":", '"', "\\", "é", ""])
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(':"\\{}é\n', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)
TEXTS = [
    '{"a": 1, "a": 2}',
    '{"a": 1, "b": {"c": 3, "c": 4}}',
    '{"a": 1, "a": ":"}',
    '{"a": ":", "a": 1}',
    '[{"a": 1}, {"a": 1, "a": {}}]',
    '{"a": 18446744073709551616}',
    '{"a": 1e400}',
    '{"a": NaN}',
    '{"a": -0}',
    '{"a": 1.0}',
    '{"a": "\\u003a"}',
    '{"\\u0061": 1, "a": 2}',
    '{"a": "\\ud800"}',
    '{"a": 01}',
    '{"a": 1,}',
    "{'a': 1}",
    '{"a": 1} x',
    "\ufeff{}",
    '{"a"',
    "[" * 100_000,
    "",
    " \n",
]


def _strictly(text: str, origin: str, error: Any, *, hint: str) -> Any:
    """Read as ``read_json`` did before it had a fast way."""
    if not text.strip():
        return read_json(text, origin, error, hint=hint)
    return json_text._read_strictly(text, origin, error, hint=hint)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:40] or "empty")
def test_the_fast_decoder_reads_what_the_strict_one_reads(text: str) -> None:
    assert repr(_read(read_json, text)) == repr(_read(_strictly, text))


@given(DOCUMENTS.flatmap(_spelled))
def test_the_fast_decoder_reads_any_document_alike(text: str) -> None:
    assert repr(_read(read_json, text)) == repr(_read(_strictly, text))


def test_a_plain_configuration_is_read_without_the_slow_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_text, "_read_strictly", None)
    text = '{"Network": "10.244.0.0/16", "IPv6Network": "fd00::/48", "Backend": {"Type": "vxlan"}}'

    assert read_json(text, "net-conf", ConfigError, hint="") == json.loads(text)
