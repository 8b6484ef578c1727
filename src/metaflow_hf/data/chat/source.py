"""Where a chat template comes from, when it is not the tokenizer's own."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from metaflow_hf.errors import ConfigError

CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BUILT_IN: Final = {"chatml": CHATML}


def read_chat_template(value: str, tokenizer: Any = None) -> str:
    """The text of a template: Jinja itself, a file, a directory with a tokenizer, or a name.

    Names are those of the tokenizer's own templates (such as ``tool_use``), ``chatml``, and, where TRL is installed,
    those of its templates (such as ``qwen3_training``). Raises ``ConfigError`` for anything else.
    """
    if "{%" in value or "{{" in value:
        return value
    path = Path(value).expanduser()
    if path.is_dir():
        return _of_directory(path)
    if path.is_file():
        return _of_file(path)
    templates = getattr(tokenizer, "chat_template", None)
    named = {**_BUILT_IN, **(templates if isinstance(templates, dict) else {})}
    if value in named:
        return str(named[value])
    shipped = _shipped_by_trl()
    if value in shipped:
        return shipped[value].read_text("utf-8")
    known = ", ".join([*named, *shipped])
    raise ConfigError(
        f"data.chat_template must be Jinja, a file, a directory with a tokenizer, or one of {known}; got {value!r:.80}."
    )


def _of_directory(directory: Path) -> str:
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        if (directory / name).is_file() and (text := _of_file(directory / name)):
            return text
    raise ConfigError(
        f"data.chat_template: {directory} has no chat_template.jinja and no tokenizer with a template."
    )


def _of_file(path: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return text
    found = json.loads(text).get("chat_template")
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}
    if isinstance(found, dict):
        found = found.get("default")
    return str(found or "")


def _shipped_by_trl() -> dict[str, Path]:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        return {}
    return {path.stem: path for path in sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))}
