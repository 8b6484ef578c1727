"""Templates that print the current date, with a date of ours instead.

transformers gives templates a function ``strftime_now`` and lets nobody else give them one, so a template gets a macro
of this name, in front of its own text.
"""

import datetime as dt
import re
from functools import lru_cache
from typing import Final

_CALL: Final = re.compile(r"strftime_now\s*\(")
# String literals with a directive of strftime, wherever a template keeps them.
_FORMATS: Final = re.compile(r"""'[^'\n{}]*%-?[A-Za-z][^'\n{}]*'|"[^"\n{}]*%-?[A-Za-z][^"\n{}]*\"""")


@lru_cache(maxsize=8)
def with_date(template: str, date: dt.date) -> str:
    """The template, which prints ``date`` where it would print today's."""
    if not _CALL.search(template):
        return template
    branches = "".join(
        f"{{% if format == {literal} %}}{_printed(date, literal)}{{% else %}}"
        for literal in dict.fromkeys(_FORMATS.findall(template))
    )
    unknown = (
        "{{ raise_exception('the format of the date in data.chat_template is not certain: ' ~ format) }}"
    )
    ends = "{% endif %}" * branches.count("{% else %}")
    # The line ends with a block, whose newline is trimmed: the template begins as it did.
    return f"{{% macro strftime_now(format) %}}{branches}{unknown}{ends}{{% endmacro %}}\n{template}"


def _printed(date: dt.date, literal: str) -> str:
    moment = dt.datetime.combine(date, dt.time())
    return f"{{{{ {moment.strftime(literal[1:-1])!r} }}}}"
