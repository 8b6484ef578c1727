"""What a user asks of the hub, checked before it is used for anything: repository, revision, selection."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from metaflow_hf.errors import SelectionError
from metaflow_hf.store.objects import encode_json, quote_part

REPO_TYPES: Final = ("model", "dataset", "space")
DEFAULT_REVISION: Final = "main"
MAX_REVISION_LENGTH: Final = 255
_PART: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID: Final = re.compile(rf"(?:{_PART}/)?{_PART}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def check_repo_id(repo_id: object) -> str:
    """Returns ``repo_id`` if it follows the hub's naming rule, else raises ``SelectionError``."""
    if (
        isinstance(repo_id, str)
        and _REPO_ID.fullmatch(repo_id)
        and "--" not in repo_id
        and ".." not in repo_id
        and not repo_id.endswith(".git")
    ):
        return repo_id
    raise SelectionError(
        f"{repo_id!r} is not the id of a repository: write name or owner/name with letters, digits, '-', '_' and '.' "
        "(each part at most 96 characters, no '--', no '..', no '.git' at the end)."
    )


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository of a hub: id as the user wrote it, and type."""

    repo_id: str
    repo_type: str = "model"

    @classmethod
    def of(cls, repo_id: object, repo_type: object = None) -> Self:
        """Checks both; ``None`` is a model. Raises ``SelectionError``."""
        kind = "model" if repo_type is None else repo_type
        if kind not in REPO_TYPES:
            raise SelectionError(f"repo_type {kind!r} is none of {', '.join(REPO_TYPES)}.")
        return cls(check_repo_id(repo_id), str(kind))

    @property
    def key(self) -> str:
        """The key part that names it: ``models--org--name``."""
        return f"{self.repo_type}s--{self.repo_id.replace('/', '--')}"

    @property
    def web_path(self) -> str:
        """Where it lies on the hub's web pages and below ``resolve``: models have no prefix."""
        return self.repo_id if self.repo_type == "model" else f"{self.repo_type}s/{self.repo_id}"

    def __str__(self) -> str:
        return f"{self.repo_type} {self.repo_id!r}"


def check_revision(revision: object) -> str:
    """The branch, tag, commit or ``refs/pr/N``; ``None`` is ``main``. Raises ``SelectionError``."""
    if revision is None:
        return DEFAULT_REVISION
    if (
        isinstance(revision, str)
        and 0 < len(revision) <= MAX_REVISION_LENGTH
        and revision.isprintable()
        and not revision.isspace()
    ):
        return revision
    raise SelectionError(f"{revision!r} is not a revision: name a branch, tag, commit hash or refs/pr/N.")


def is_commit_hash(revision: str) -> bool:
    """Whether the revision is a full commit hash, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a commit: glob patterns, each list sorted and without repetitions; ``None`` is no limit."""

    allow: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None

    @classmethod
    def of(cls, allow: object = None, ignore: object = None) -> Self:
        """From huggingface_hub's arguments: a pattern, several, or ``None``. Raises ``SelectionError``."""
        return cls(_patterns("allow_patterns", allow), _patterns("ignore_patterns", ignore))

    @classmethod
    def file(cls, path: str) -> Self:
        """Exactly one file, whatever glob characters its name has."""
        return cls(allow=(re.sub(r"([*?\[])", r"[\1]", path),))

    @property
    def key(self) -> str:
        """The key part that names it: ``all``, or a hash of the patterns."""
        if self.allow is None and not self.ignore:
            return "all"
        return hashlib.sha256(encode_json(self.to_json())).hexdigest()[:16]

    def to_json(self) -> dict[str, list[str]]:
        lists = {"allow_patterns": self.allow, "ignore_patterns": self.ignore or None}
        return {name: list(value) for name, value in lists.items() if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.to_json().items()) or "all files"


def _patterns(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(item, str) for item in items):
        raise SelectionError(f"{name}={value!r} must be a pattern or a list of patterns such as '*.json'.")
    return tuple(sorted(set(items)))


def endpoint_key(netloc: str) -> str:
    """The key part that names a hub: host and port."""
    return quote_part(netloc.lower())
