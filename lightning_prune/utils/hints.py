"""The nearest of some names to one that does not exist, for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

__all__ = ["did_you_mean", "nearest", "shortened", "value_hint"]

WORD = re.compile(r"[A-Za-z][\w.+-]*\w")
QUOTED = re.compile(r"['`\"]([\w.+-]+)['`\"]")
LONGEST = 1000  # characters of a message that are shown


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the name that is most alike, or an empty string if none is alike.

    Of a dotted key its last part counts too, since a key may be right in another place of the configuration.

    Example:
        >>> nearest("ipadd", ["lamp", "ipad", "ipad_layers"]), nearest("omegga", ["a.b.omega", "a.c"])
        ('ipad', 'a.b.omega')
        >>> nearest("xyz", ["lamp"])
        ''
    """
    names = list(names)
    if found := get_close_matches(name, names, n=1, cutoff=0.7):
        return found[0]
    by_last_part = {key.rpartition(".")[2]: key for key in reversed(names)}
    last = get_close_matches(name.rpartition(".")[2], by_last_part, n=1, cutoff=0.75)
    return by_last_part[last[0]] if last else ""


def did_you_mean(name: str, names: Iterable[str], form: str = "{}") -> str:
    """Return a question with the nearest name, in the given form; an empty string if none is alike.

    The first ``{}`` of the form stands for the name; other braces, such as those of a value, stay.

    Example:
        >>> did_you_mean("ipadd", ["lamp", "ipad"], "prune={}")
        'did you mean prune=ipad?'
        >>> did_you_mean("budgett", ["budget"], "prune.{}={macs:0.5}")
        'did you mean prune.budget={macs:0.5}?'
    """
    found = nearest(name, names)
    return f"did you mean {form.replace('{}', found, 1)}?" if found else ""


def value_hint(message: str, overrides: Iterable[str]) -> str:
    """Return what an override probably should be, where an error names both what was given and what there is.

    Args:
        message: of the error.
        overrides: ``KEY=VALUE`` of the command line.

    Example:
        >>> value_hint("no encoder `resnet17`, supported: ['resnet18', 'vgg']", ["net.encoder_name=resnet17"])
        'did you mean net.encoder_name=resnet18?'
        >>> value_hint("unknown resource 'maks'; known are macs, params", ["+prune.budget.maks=0.3"])
        'did you mean +prune.budget.macs=0.3?'
        >>> value_hint("num_classes=1: one object needs 2 classes", ["task.num_classes=1"])
        ''
        >>> value_hint("2 folders, but num_classes=3: set task.num_classes=2", ["task.num_classes=3"])
        ''
    """
    words = dict.fromkeys(WORD.findall(message))
    quoted = QUOTED.findall(message)
    for key, _, value in (override.partition("=") for override in overrides):
        path, _, last = key.rpartition(".")
        for given, form in ((value, f"{key}={{}}"), (last, f"{path}.{{}}={value}")):
            if given == value and Path(value).exists():
                continue  # a folder that is there is not misspelt
            others = [word for word in words if word not in (given, value, last, key.lstrip("+~"))]
            is_named = given in (
                words if given == value else quoted
            )  # a key that is right may be in a sentence
            if len(given) > 2 and is_named and (found := get_close_matches(given, others, 1, 0.74)):
                return f"did you mean {form.replace('{}', found[0], 1)}?"
    return ""


def shortened(message: str) -> str:
    """Return a message without the rest of a list that is longer than a screen.

    Example:
        >>> len(shortened("word " * 1000)) < 1020
        True
    """
    return message if len(message) <= LONGEST else f"{message[:LONGEST].rpartition(' ')[0]} ..."
