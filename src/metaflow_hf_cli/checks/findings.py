"""What an examination finds: one line that says how it stands, and what to do where that is not well."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from metaflow_hf.errors import MetaflowHFError

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """How one thing stands. ``fix`` says what to do; there is one wherever ``status`` is not ``ok``."""

    subject: str
    status: Status
    message: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.fix or self.status == "ok", f"what is to be done about {self.message!r}?"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Check:
    """Something to look at; ``look`` yields what it finds. An error of metaflow-hf is a problem, with ``fix``."""

    subject: str
    look: Callable[[], Iterable[Finding]]
    fix: str

    def findings(self) -> Iterator[Finding]:
        try:
            yield from self.look()
        except MetaflowHFError as error:
            yield Finding(self.subject, "problem", str(error), self.fix)


def ok(subject: str, message: str) -> Finding:
    """It is well."""
    return Finding(subject, "ok", message)


def warning(subject: str, message: str, fix: str) -> Finding:
    """It works, but not as well as it could, or not for long."""
    return Finding(subject, "warning", message, fix)


def problem(subject: str, message: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(subject, "problem", message, fix)
