"""Rows of a `.json` file: an array, one object that wraps an array, objects one after the other, or JSON lines."""

import enum
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

import msgspec

from metaflow_hf.data.rows import InputRow
from metaflow_hf.data.sources.compression import READ_BYTES
from metaflow_hf.errors import SelectionError

_BOM: Final = b"\xef\xbb\xbf"
_BLANKS: Final = " \t\r\n"
_NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# A conversation alone in a file is a row, as `datasets` reads it, and no list of rows.
_CONVERSATION: Final = ({"role"}, {"from", "value"})


class JsonShape(enum.Enum):
    """What a `.json` file holds."""

    ARRAY = "an array"
    LINES = "an object a line"
    OBJECTS = "objects over several lines"


def json_shape(stream: io.BufferedReader) -> JsonShape:
    """What a file holds, by its beginning; reads one line, or all of an object that goes over several."""
    first = stream.readline(READ_BYTES).removeprefix(_BOM)
    while first and not first.strip():
        first = stream.readline(READ_BYTES)
    if first.lstrip()[:1] == b"[":
        return JsonShape.ARRAY
    if not first.endswith(b"\n") and len(first) >= READ_BYTES:
        first += stream.readline()
    if _decoded(first.strip()) is None:
        return JsonShape.OBJECTS if _is_begun(first.strip()) else JsonShape.LINES
    while following := stream.read(READ_BYTES):
        if following.strip():
            return JsonShape.LINES
    return JsonShape.OBJECTS


def array_elements(stream: BinaryIO, name: str) -> Iterator[InputRow]:
    """The text of each element of a JSON array as a line of its own; read in pieces, each element whole.

    The elements of an array of strings are rows with the column ``text``.
    """
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _scan_array(text, name)


def object_rows(stream: BinaryIO, name: str, field: str | None = None) -> Iterator[InputRow]:
    """The rows of a file of one or more objects, which is read as a whole.

    One object that holds exactly one list of objects wraps its rows (`{"version": …, "data": […]}`); ``field`` names
    the list otherwise. Each object is a row where there is no such list. Raises ``SelectionError`` where several lists
    of objects may be meant, and for what is not JSON.
    """
    text = stream.read().decode("utf-8-sig", "surrogateescape")
    scan, at, objects = json.JSONDecoder().raw_decode, _skip_blanks(text, 0), []
    while at < len(text):
        try:
            value, end = scan(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it nests too deep"
            raise SelectionError(
                f"{name}: not a JSON object, or not complete: {reason} near {text[at : at + 40]!r}."
            ) from error
        objects.append((value, at, end))
        at = _skip_blanks(text, end)
    if field is not None or len(objects) == 1:
        wrapped = _wrapped_rows(objects[0][0] if objects else None, name, field)
        if wrapped is not None:
            yield from wrapped
            return
    for _, begin, end in objects:
        yield _line(text[begin:end])


def _wrapped_rows(value: Any, name: str, field: str | None) -> list[InputRow] | None:
    if field is not None:
        rows = value.get(field) if isinstance(value, dict) else None
        if not isinstance(rows, list):
            raise SelectionError(f"{name}: there is no list {field!r} in it, which its configuration names.")
        return _rows_of(rows)
    lists = [key for key, item in value.items() if _holds_rows(item)] if isinstance(value, dict) else []
    if len(lists) > 1:
        raise SelectionError(
            f"{name} is one object with several lists of objects ({', '.join(lists)}): which one holds the rows? Write "
            "them as JSON lines, or name the list as `field` of a configuration in README.md."
        )
    return _rows_of(value[lists[0]]) if lists else None


def _rows_of(rows: list[Any]) -> list[InputRow]:
    # Written again: the encoder checks and refuses them as it does other rows.
    return [json.dumps({"text": row} if isinstance(row, str) else row).encode() for row in rows]


def _holds_rows(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        return False
    return not any(parts <= value[0].keys() for parts in _CONVERSATION)


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except _NOT_JSON:
        return None


def _is_begun(line: bytes) -> bool:
    """Whether a line begins an object that later lines go on with: an object that is cut off, not one that is wrong."""
    try:
        json.loads(line.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as error:
        return line[:1] == b"{" and error.pos >= len(error.doc)
    except RecursionError:
        return False
    return False


def _line(text: str) -> bytes:
    # Outside of strings, where none may stand, a line end is only white space.
    return text.replace("\n", " ").replace("\r", " ").encode("utf-8", "surrogateescape")


def _scan_array(text: io.TextIOWrapper, name: str) -> Iterator[InputRow]:
    scan = json.JSONDecoder().raw_decode
    buffer, size = text.read(READ_BYTES), READ_BYTES
    at = _skip_blanks(buffer, 0) + 1
    wants_comma = False
    is_of_texts: bool | None = None
    while True:
        at = _skip_blanks(buffer, at)
        if buffer[at : at + 1] == "]":
            _check_nothing_follows(buffer[at + 1 :], text, name)
            return
        try:
            start = _skip_comma(buffer, at) if wants_comma else at
            element, end = scan(buffer, start)
        except RecursionError as error:
            raise SelectionError(
                f"{name}: an element nests too deep near {buffer[at : at + 40]!r}."
            ) from error
        except json.JSONDecodeError as error:
            more = text.read(size)
            if not more:
                raise SelectionError(
                    f"{name}: not a complete JSON array, or not JSON at all: {error.msg} near "
                    f"{buffer[at : at + 40]!r}."
                ) from error
            # An element larger than what was read: read as much again, so that large ones cost no more.
            buffer, at, size = buffer[at:] + more, 0, size * 2
            continue
        if is_of_texts is None:
            is_of_texts = isinstance(element, str)
        line = _line(buffer[start:end])
        yield b'{"text":' + line + b"}" if is_of_texts and isinstance(element, str) else line
        at, size, wants_comma = end, READ_BYTES, True
        if at > READ_BYTES:
            buffer, at = buffer[at:] + text.read(READ_BYTES), 0


def _check_nothing_follows(rest: str, text: io.TextIOWrapper, name: str) -> None:
    while not rest.strip(_BLANKS):
        rest = text.read(READ_BYTES)
        if not rest:
            return
    raise SelectionError(f"{name}: more follows behind the array: {rest.lstrip()[:40]!r}.")


def _skip_comma(text: str, at: int) -> int:
    if text[at : at + 1] != ",":
        raise json.JSONDecodeError("',' or ']' expected", text, at)
    return _skip_blanks(text, at + 1)


def _skip_blanks(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _BLANKS:
        at += 1
    return at
