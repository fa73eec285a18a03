"""Overrides with letters that Hydra's grammar does not know, such as umlauts, get quotes and can be typed without."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

__all__ = ["quoted"]

BRACKETS = re.compile(r"([\[\]{}(),:])")
PLAIN = re.compile(r"[\w .:/+%@?*|$\\-]*", re.ASCII)  # what Hydra reads outside of quotes
UNKNOWN_LETTER = "LexerNoViableAlt"


def quoted(override: str) -> str:
    """Return an override with quotes around what Hydra cannot read without; all others are returned as they are.

    Example:
        >>> quoted("data.root=Zellen über alles"), quoted("task.class_names=[ground,Bäume]")
        ("data.root='Zellen über alles'", "task.class_names=[ground,'Bäume']")
        >>> quoted("net=fpn"), quoted("data.root='Übung'"), quoted("task.class_names=[a")
        ('net=fpn', "data.root='Übung'", 'task.class_names=[a')
    """
    key, equals, value = override.partition("=")
    if not equals or key.startswith("-") or not _is_unreadable(override):
        return override
    readable = (f"{key}={each}" for each in _quotations(value))
    return next((each for each in readable if not _error(each)), override)


def _is_unreadable(override: str) -> bool:
    value = override.partition("=")[2]
    return not PLAIN.fullmatch(BRACKETS.sub("", value)) and UNKNOWN_LETTER in _error(override)


def _quotations(value: str) -> Iterator[str]:
    """Yield the value as one text, if it is no list, and with quotes around each word of a list."""
    if not re.search(r"[\[\]{}(),]", value):
        yield _text(value)
    if not re.search(r"['\"]", value):
        yield "".join(map(_word, BRACKETS.split(value)))


def _word(part: str) -> str:
    return part if PLAIN.fullmatch(part) or BRACKETS.fullmatch(part) else _text(part)


def _text(word: str) -> str:
    inner = re.sub(r"(\\*)'", r"\1\1\\'", word)
    return f"'{inner}'"


def _error(override: str) -> str:
    """Return why Hydra cannot read an override; empty if it can."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return f"{type(error.__cause__).__name__} {error}"
    return ""
