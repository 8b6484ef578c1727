"""Values that JSON has no type for, converted as `datasets.Dataset.to_json` converts them.

Timestamps, dates and durations become whole milliseconds, times and decimals become text, NaN and infinities become
null, numpy values become plain ones. Floats keep all their digits, where `to_json` keeps ten.
"""

import math
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final

import numpy as np

_PLAIN: Final = frozenset({str, int, bool, type(None)})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


class NotStorable(Exception):  # noqa: N818  caught by the encoder
    """Raised for a value that JSON cannot hold; the message says what it is."""


def json_value(value: Any) -> Any:
    """Return ``value`` with everything in it that JSON has no type for converted.

    Values of types that are not known here are returned as they are. Raises ``NotStorable`` for bytes.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise NotStorable("bytes, which JSON cannot keep")
    return _converted(value)


def _converted(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        if value.dtype.kind in "mM":
            # As whole milliseconds; numpy's own nanoseconds would come out as bare integers.
            value = value.astype(f"{value.dtype.kind}8[ms]")
        return json_value(value.tolist())
    if value != value:  # noqa: PLR0124  NaT and the NaN of a Decimal
        return None
    if isinstance(value, datetime):
        moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return (moment - _EPOCH) // _MILLISECOND
    if isinstance(value, date):
        return (value - _EPOCH.date()) // _MILLISECOND
    if isinstance(value, time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value // _MILLISECOND
    if isinstance(value, Decimal):
        return str(value)
    return value
