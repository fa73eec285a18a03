"""Numbers as text."""

from __future__ import annotations


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
