"""Numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LABELS = {"macs": "MACs", "params": "parameters", "activations": "activation memory", "latency": "latency"}


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in singular or plural.

    Args:
        number: how many.
        noun: in singular.
        plural: if it is not the noun with an s.

    Example:
        >>> counted(1, "layer"), counted(0, "layer"), counted(2, "batch", "batches")
        ('1 layer', '0 layers', '2 batches')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def si(number: float, digits: int = 3, separator: str = "", unit: str = "") -> str:
    """Return a number with an SI prefix, as text.

    Args:
        number: any number; those below 1000 get no prefix.
        digits: significant digits.
        separator: between the number and its prefix and unit.
        unit: after the prefix.

    Example:
        >>> si(412_345_678), si(1_500), si(12)
        ('412M', '1.5k', '12')
        >>> si(57_397_331, digits=4, separator=" ", unit="B")
        '57.4 MB'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{_rounded(number / factor, digits)}{separator}{prefix}{unit}"
    return f"{_rounded(number, digits)}{separator if unit else ''}{unit}"


def _rounded(number: float, digits: int) -> str:
    """Round to significant digits; 999.6 becomes 1000, where the format "g" would give 1e+03."""
    return f"{number:.0f}" if abs(number) >= 10**digits - 0.5 else f"{number:.{digits}g}"


def quantity(name: Any, value: Any) -> str:
    """Return a budget for people: a share of the dense network, or an amount.

    Example:
        >>> quantity("macs", 0.5), quantity("params", 2e6)
        ('50 % of the MACs', '2 M parameters')
    """
    label = LABELS.get(str(name), str(name))
    if not isinstance(value, (int, float)):
        return f"{value} {label}"
    return f"{100 * value:g} % of the {label}" if 0 < value <= 1 else f"{si(value, 4, ' ')} {label}"


def amounts(budget: Mapping[Any, Any]) -> str:
    """Return a budget of several resources in words.

    Example:
        >>> amounts({"macs": 0.5, "params": 2e6})
        '50 % of the MACs and 2 M parameters'
    """
    return " and ".join(quantity(name, value) for name, value in budget.items())
