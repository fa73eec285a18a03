"""The nearest of some names to one that does not exist, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean", "nearest"]


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

    Example:
        >>> did_you_mean("ipadd", ["lamp", "ipad"], "prune={}")
        'did you mean prune=ipad?'
    """
    found = nearest(name, names)
    return f"did you mean {form.format(found)}?" if found else ""
