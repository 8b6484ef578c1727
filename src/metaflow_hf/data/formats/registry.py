"""The row formats that are known, by name: those of this package and those that users register."""

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from metaflow_hf.data.formats.alpaca import AlpacaFormat
from metaflow_hf.data.formats.messages import MessagesFormat
from metaflow_hf.data.formats.prompt_completion import PromptCompletionFormat
from metaflow_hf.data.formats.row_format import RowFormat
from metaflow_hf.data.formats.sharegpt import ShareGptFormat
from metaflow_hf.data.formats.text import TextFormat
from metaflow_hf.errors import FormatError

AUTO: Final = "auto"
_FORMATS: Final[dict[str, RowFormat]] = {}


def register_format(form: RowFormat) -> None:
    """Makes a format known by its name in this process; ``auto`` recognizes it by its required roles.

    A process that reads or trains its rows must register it too. A name like ``package.module:FORMAT``, given as
    ``data.format``, needs no registration. Raises ``FormatError`` for a name that is taken by another format.
    """
    if form.name == AUTO or not form.roles:
        raise FormatError(f"A row format must have roles and a name other than {AUTO!r}, got {form.name!r}.")
    if _FORMATS.get(form.name, form) is not form:
        raise FormatError(f"There is already a row format named {form.name!r}. Choose another name.")
    _FORMATS[form.name] = form


def known_formats() -> Mapping[str, RowFormat]:
    """All registered formats by name."""
    return dict(_FORMATS)


def find_format(name: str) -> RowFormat:
    """The format of a name. Raises ``FormatError`` that lists the known ones."""
    if name in _FORMATS:
        return _FORMATS[name]
    module, colon, attribute = name.partition(":")
    if colon and module and attribute:
        try:
            found: RowFormat = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise FormatError(f"data.format {name!r} cannot be imported: {error}.") from error
        if not all(hasattr(found, member) for member in ("name", "roles", "example")):
            raise FormatError(
                f"data.format {name!r} is no row format: it lacks a name, roles or example(row, columns)."
            )
        return found
    raise FormatError(
        f"data.format must be one of {AUTO}, {', '.join(_FORMATS)}, or module:attribute of a format of your own; "
        f"got {name!r}."
    )


for _form in (TextFormat(), MessagesFormat(), ShareGptFormat(), PromptCompletionFormat(), AlpacaFormat()):
    register_format(_form)
