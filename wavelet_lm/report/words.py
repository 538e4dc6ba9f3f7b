"""Figures of runs as people read them; a dash where one is not known."""

from __future__ import annotations


def figure(value: float | None, digits: int = 4) -> str:
    """A measured number."""
    return "-" if value is None else f"{value:,.{digits}f}"


def amount(n: int | None) -> str:
    """A count.

    Examples:
        >>> from wavelet_lm.report.words import amount
        >>> amount(765806), amount(12), amount(None)
        ('765.8 k', '12', '-')
    """
    if n is None:
        return "-"
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {sign}"
    return str(n)


def duration(seconds: float) -> str:
    """A time.

    Examples:
        >>> from wavelet_lm.report.words import duration
        >>> duration(7.26), duration(75), duration(7325)
        ('7.3 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
