"""Whatever is in a line: decoding it by known columns finds and refuses the same as decoding it whole."""

from typing import Any

import msgspec
import pytest

from metaflow_hf.data import line_texts
from metaflow_hf.data.line_texts import LineTexts

VALUES = [
    b'"ok"', b"1", b"-0", b"1.5", b"null", b"true", b'{"a":[1,{"b":2}]}', b'"\\u00e9\\ud83d\\ude00"', b"12345678901234567890123",
    b"01", b"-01", b"+1", b"-", b"1.", b"1e", b"1e999", b"9" * 5000, b"NaN", b"nul", b'"\\x"', b'"\\u12G4"', b'"\\ud800"',
    b'"a\x01"', b'"\xff"', b'"\xed\xa0\x80"', b"[1,]", b'{"a":1,}', b'{"a" 1}', b"{1:1}", b'{"\xff":1}', b'{"\\ud800":1}',
    b"[" * 5000 + b"]" * 5000, b'"', b"1 2",
]  # fmt: skip
# Known ones, new ones, and such as no field can be called.
COLUMNS = [b"text", b"x", b"new", b"te\\u0078t", b'a\\"b', b"a\\nb", b"", b"\xff"]


def plainly(lines: bytes) -> list[Any]:
    return [row.get("text") for row in msgspec.json.Decoder(dict[str, Any]).decode_lines(lines)]


def found(decode, lines: bytes) -> list[Any] | None:
    try:
        return decode(lines)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


@pytest.mark.parametrize("column", COLUMNS, ids=repr)
def test_lines_of_known_columns_are_judged_as_all_lines_are(column: bytes):
    for value in VALUES:
        lines = (
            b'{"text":"a","id":2}\n{"text":"t","id":1,"'
            + column
            + b'":'
            + value
            + b'}\n{"id":3}\n{"text":"b","x":1}\n'
        )
        decode = LineTexts("text")
        assert decode(b'{"text":"a","x":1,"id":2}\n') == ["a"]
        for _ in range(3):
            assert found(decode, lines) == found(plainly, lines), value[:30]


@pytest.mark.parametrize(
    "line", [b"[]", b'["a"]', b"1", b"null", b'{"text":"a"', b'{"text":"a"} {"text":"b"}', b"{}{}", b""]
)
def test_lines_that_are_no_objects(line: bytes):
    decode = LineTexts("text")
    decode(b'{"text":"a"}\n')
    lines = b'{"text":"b"}\n' + line + b"\n"
    assert found(decode, lines) == found(plainly, lines)


def test_columns_that_are_always_others_are_not_guessed_for_ever(monkeypatch):
    guesses = []
    monkeypatch.setattr(line_texts.LineTexts, "_learn", lambda self, rows: guesses.append(rows))
    decode = LineTexts("text")
    for number in range(50):
        assert decode(b'{"text":"a","%d":1}\n' % number) == ["a"]
    assert len(guesses) == 4
