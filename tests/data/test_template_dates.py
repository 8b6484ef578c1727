"""Templates that print the current date, with the date of a lineage."""

import copy
import datetime as dt
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from metaflow_hf.data.chat import ChatTemplate
from metaflow_hf.data.formats import RowProblem

SHIPPED = Path(find_spec("trl").origin).parent / "chat_templates"
DATE = dt.date(2031, 1, 5)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
BODY = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def base():
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def rendered(base, template, date=DATE):
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer, date=date).render(MESSAGES)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.jinja")), ids=lambda path: path.stem)
def test_nothing_but_the_date_changes(path, base, monkeypatch):
    from transformers.utils import chat_template_utils

    class Calendar(dt.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Calendar)
    template = path.read_text("utf-8")
    try:
        expected = rendered(base, template, date=None)
    except RowProblem:
        pytest.skip("the template expects content of another kind")
    assert rendered(base, template) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "05 Jan 2031"),
        ('{{ strftime_now("%Y-%m-%d") }}', "2031-01-05"),
        ("{%- set fmt = '%B %d' -%}\n{{ strftime_now(fmt) }}", "January 05"),
        ("{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}{{ today() }}", "2031"),
        ("{{ strftime_now('%Y') }}-{{ strftime_now('%m') }} it's 100% \"fine\"", '2031-01 it\'s 100% "fine"'),
        ("{{ strftime_now('%H:%M') }}", "00:00"),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%j') %}{% endif %}{{ d }}", "005"),
        ("  {% if true %}x{{ strftime_now('%Y') }}{% endif %}\n", "x2031"),
        ("\n{{ strftime_now('%Y') }}", "\n2031"),
    ],
)
def test_the_date_is_printed_in_each_format(template, said, base):
    assert rendered(base, template + BODY) == said + "hi\nho\n"


def test_a_format_that_is_put_together_is_refused(base):
    with pytest.raises(RowProblem, match="the format of the date in data.chat_template is not certain: %d%y"):
        rendered(base, "{{ strftime_now('%d' ~ '%y') }}" + BODY)
