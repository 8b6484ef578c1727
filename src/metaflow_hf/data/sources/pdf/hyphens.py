"""Whether the hyphen at the end of a line belongs to its word.

The document itself decides: by the words that it writes elsewhere within a line, then by its other compounds.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

HYPHENS: Final = "-\u2010"
_WORD: Final = re.compile(r"[^\W\d_]+(?:[-\u2010'’][^\W\d_]+)*")
_LAST: Final = re.compile(r"((?:[^\W_]+[-\u2010'’])*[^\W_]+)[-\u2010]$")
_FIRST: Final = re.compile(r"[^\W_]+(?:[-\u2010'’][^\W_]+)*")
_ADDRESS: Final = re.compile(r"://|[/_@\\]|^www\.")
# First parts that make a compound with whatever follows them, and with any other word of the document.
_SURE_FIRST_PARTS: Final = frozenset({"self", "well"})
_FIRST_PARTS: Final = frozenset({"so", "two", "three", "four", "first", "second", "third"})
# Last parts that make a compound with a whole word before them.
_LAST_PARTS: Final = frozenset(
    {"aware", "based", "dependent", "driven", "free", "friendly", "independent", "level", "oriented", "party"}
    | {"related", "specific", "style"}
)
# Words before which a hyphen stands for what a later word says: pre- and postfix.
_SUSPENDING: Final = frozenset({"and", "or", "to", "und", "oder", "bzw"})


@dataclass(slots=True)
class Vocabulary:
    """The words of a document that no line end cuts, in lower case."""

    words: Counter[str] = field(default_factory=Counter)
    first_parts: set[str] = field(default_factory=set)
    last_parts: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, lines: Iterable[list[str]]) -> "Vocabulary":
        """Of lines in order, each the list of its words."""
        known = cls()
        is_cut = False
        for words in lines:
            ends_cut = bool(words) and words[-1][-1:] in HYPHENS
            whole = words[1 if is_cut else 0 : len(words) - 1 if ends_cut else None]
            is_cut = ends_cut
            for match in _WORD.finditer(" ".join(whole).lower()):
                known.words[match.group().replace("\u2010", "-")] += 1
        for word in known.words:
            first, *_, last = word.split("-") if "-" in word else ("", "")
            known.first_parts.add(first)
            known.last_parts.add(last)
        return known

    def joined(self, line: str, following: str) -> str:
        """Two lines of a paragraph as one; a word that a hyphen cuts is whole again."""
        last, first = _LAST.search(line), _FIRST.match(following)
        if last is None or first is None or _ADDRESS.search(line.rpartition(" ")[2]):
            return f"{line}{_between(line, following)}{following}"
        before, after = last.group(1), first.group()
        if after.lower() in _SUSPENDING and not self._is_word(before + after):
            return f"{line} {following}"
        is_one_word = (after[0].islower() and before[-1].isalpha()) or (before + after).isupper()
        if not is_one_word or self._keeps_hyphen(before.lower(), after.lower()):
            return line + following
        return line[:-1] + following

    def _keeps_hyphen(self, before: str, after: str) -> bool:
        with_hyphen, without = self.words[f"{before}-{after}"], self.words[f"{before}{after}"]
        if with_hyphen or without:
            return with_hyphen > without
        if "-" in before or "-" in after:
            return True
        head, tail = before, after
        if head in _SURE_FIRST_PARTS and len(tail) > 3:
            return True
        if tail in _LAST_PARTS or tail in self.last_parts:
            return self._is_word(head) or head in _FIRST_PARTS or head in self.first_parts
        return self._is_word(tail) and (head in _FIRST_PARTS or head in self.first_parts)

    def _is_word(self, word: str) -> bool:
        return len(word) > 2 and self.words[word.lower()] > 0


def is_without_spaces(letter: str) -> bool:
    """Whether a letter is of a script that writes no spaces between words, such as Chinese and Japanese."""
    return "\u3000" <= letter <= "\u9fff" or "\uf900" <= letter <= "\ufaff" or "\uff00" <= letter <= "\uffef"


def _between(line: str, following: str) -> str:
    """Nothing after a dash within a word or an address, else a space."""
    if line.endswith(":") and following.startswith("//"):
        return ""
    if is_without_spaces(line[-1:]) and is_without_spaces(following[:1]):
        return ""
    return "" if re.search(r"\w[—/]$|://\S*[-/._]$|[^\W_]-$", line) else " "
