"""NEW."""

from __future__ import annotations


def si(number: float) -> str:
    """A number to three digits with its unit prefix.

    Example:
        >>> si(412_345_678), si(1_500), si(12)
        ('412M', '1.5k', '12')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return (
                f"{number / size:.3g}{prefix}"
                if abs(number) < 999.5 * size
                else f"{number / size:.0f}{prefix}"
            )
    return f"{number:.3g}"
