"""Numbers as people read them: a figure, its unit, and no more digits than it deserves.

Every function is total: NaN and infinity come out as ``nan`` and ``inf``, never as an exception, because a
report about a run that diverged must still be written.
"""

import math

_DECIMAL = ("", "k", "M", "G", "T", "P")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def _scaled(value: float, base: float, units: tuple[str, ...], separator: str) -> str:
    power = 0
    # 999.6 thousands would print as "1000k": the next unit starts where rounding reaches it.
    while power + 1 < len(units) and round(abs(value), 1 if abs(value) < 9.95 else 0) >= base:
        value /= base
        power += 1
    digits = 1 if abs(value) < 9.95 and not float(value).is_integer() else 0
    return f"{value:.{digits}f}".removesuffix(".0") + separator + units[power]


def short_count(value: float) -> str:
    """``38k``, ``1.2M``: two or three significant digits, powers of 1,000."""
    return _scaled(value, 1000, _DECIMAL, "") if math.isfinite(value) else str(value)


def count(value: float) -> str:
    """``1,600``: every digit."""
    return f"{value:,.0f}"


def byte_size(value: float) -> str:
    """``1.3 GiB``: powers of 1,024."""
    return _scaled(value, 1024, _BINARY, " ") if math.isfinite(value) else str(value)


def duration(seconds: float) -> str:
    """``0.2 s``, ``42 s``, ``12 min``, ``3.4 h``, ``2.5 days``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def loss(value: float | None) -> str:
    """``3.21``, nats per token; ``-`` when nothing was measured."""
    return "-" if value is None else f"{value:.2f}"


def perplexity(value: float) -> str:
    """``24.8``, ``3,018``: about three significant digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def learning_rate(value: float) -> str:
    """``2.0e-4``: no padding zero in the exponent."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def percent(part: float, whole: float) -> str:
    """``26 %``; ``-`` of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "-"


def ratio(before: float, after: float) -> str:
    """How many times smaller ``after`` is: ``83x lower``, ``1.4x higher``, ``unchanged``."""
    if not (before > 0 and after > 0 and math.isfinite(before) and math.isfinite(after)):
        return ""
    factor, word = (before / after, "lower") if before >= after else (after / before, "higher")
    if factor < 1.005:
        return "unchanged"
    return f"{factor:,.0f}x {word}" if factor >= 9.95 else f"{factor:.2g}x {word}"
