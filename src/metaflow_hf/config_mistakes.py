"""What is wrong with a configuration, in words: path, what was given, what is allowed, the nearest spelling."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic import BaseModel


def describe(
    error: pydantic.ValidationError, root: type[BaseModel], *, top_level_keys: Sequence[str] = ()
) -> Iterator[str]:
    """One line per mistake of ``error`` in a configuration of type ``root``: path, what is allowed, what was given.

    ``top_level_keys`` are spellings that are known beside ``root``'s own fields.
    """
    seen: set[tuple[str, ...]] = set()
    for item in error.errors(include_url=False):
        place = item["loc"]
        if item["type"] == "missing" and isinstance(place[-1], int):
            # A list that is too short: what is wrong is the list.
            place = place[:-1]
        path, annotation = _resolve(root, place)
        if path in seen:
            continue
        seen.add(path)
        yield f"{'.'.join(path)}: {_explain(item, path, annotation, root, top_level_keys)}"


def _explain(
    item: Any, path: tuple[str, ...], annotation: Any, root: type[BaseModel], top_level_keys: Sequence[str]
) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, root, top_level_keys)
    if item["type"] == "missing" and isinstance(item["loc"][-1], str):
        return "is required"
    allowed = f"must be {_spell(annotation)}" if annotation is not None else item["msg"]
    if item["type"] == "value_error":
        allowed = str(item["ctx"]["error"])
    given = item["input"]
    choices = [str(choice) for choice in _literals(annotation)]
    close = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.5) if isinstance(given, str) else []
    meant = [*close] if _is_list(annotation) else next(iter(close), None)
    hint = f"; did you mean {meant!r}?" if close else ""
    if isinstance(given, bool) and given and _section_in(annotation) is not None:
        hint = "; for its defaults write {}"
    if item["type"] == "value_error" and isinstance(given, (Mapping, list)):
        # About several values of a section, which the sentence names.
        return allowed
    constraint = ""
    if item["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        constraint = f" ({item['msg'].removeprefix('Input should be ')})"
    return f"{allowed}{constraint}, got {_as_written(given):.80}{hint}"


def _as_written(value: Any) -> str:
    """A value as YAML has it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def _unknown_key(path: tuple[str, ...], root: type[BaseModel], top_level_keys: Sequence[str]) -> str:
    section: Any = root
    for part in path[:-1]:
        section = _section_in(section.model_fields[part.partition("[")[0]].annotation)
    names = list(section.model_fields)
    candidates = names if section is not root else [*names, *top_level_keys]
    close = difflib.get_close_matches(path[-1], candidates, n=1)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    elsewhere = {
        key: f"{name}.{key}"
        for name, info in reversed(root.model_fields.items())
        if (nested := _section_in(info.annotation)) is not None
        for key in nested.model_fields
    }
    near = difflib.get_close_matches(path[-1], elsewhere, n=1, cutoff=0.7)
    if near:
        return f"unknown key here; did you mean {elsewhere[near[0]]!r}?"
    return f"unknown key; known are {', '.join(names)}"


def _resolve(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[tuple[str, ...], Any]:
    """The path of a pydantic location without the names of union branches, and the type that is wanted there."""
    path: list[str] = []
    section: type[BaseModel] | None = root
    annotation: Any = None
    for part in location:
        if isinstance(part, int) and section is not None and _is_list(annotation):
            path[-1] += f"[{part}]"
            annotation = section
        elif section is not None and isinstance(part, str) and part in section.model_fields:
            path.append(part)
            annotation = section.model_fields[part].annotation
            section = _section_in(annotation)
        elif section is not None:
            path.append(str(part))
            annotation, section = None, None
        elif isinstance(part, int):
            path.append(str(part))
            annotation = next(iter(get_args(annotation)), None)
    return tuple(path), annotation


def _section_in(annotation: Any) -> Any:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for option in get_args(annotation) for choice in _literals(option)]


def _spell(annotation: Any) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _spell(options[0])
    if origin in (Union, UnionType):
        return " or ".join(_spell(option) for option in options)
    if origin is Literal:
        return " or ".join(repr(option) for option in options)
    if origin is tuple:
        return f"a list of {len(options)} values, each {_spell(options[0])}"
    if origin is list:
        return f"a list of {_spell(options[0])}" if options else "a list"
    if origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, "a section" if _section_in(annotation) else str(annotation))
