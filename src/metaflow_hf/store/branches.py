"""Which branch of a foreach a task is, by the values it is about: the same name in every process, retry and run."""

import io
import json
import pickle
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, ClassVar

# What values that cannot be pickled answer, each in its own way.
_UNPICKLABLE = (pickle.PicklingError, TypeError, AttributeError, NotImplementedError, RecursionError)


def task_identifier(values: Sequence[Any]) -> str:
    """The identifier of the branch over these foreach values, equal in every run; "" outside of a foreach.

    Values that are not JSON count by their pickle, in which sets have an order of their own: that of Python differs
    from process to process. Raises ``pickle.PicklingError``, ``TypeError``, … for values that cannot be pickled; see
    ``branch_value``.
    """
    return sha256(_encode(list(values))).hexdigest()[:16] if values else ""


def branch_value(index: int, value: Any) -> Any:
    """What stands for one foreach level in ``task_identifier``: the value, or its index where it is not at hand
    (``None``) or cannot be pickled.
    """
    if value is not None:
        try:
            _encode(value)
        except _UNPICKLABLE:
            value = None
    return {"index": index} if value is None else value


def _encode(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError):
        return _pickled(value)


def _pickled(value: Any) -> bytes:
    place = io.BytesIO()
    _SortedPickler(place, protocol=4).dump(value)
    return place.getvalue()


class _SortedPickler(pickle._Pickler):  # noqa: SLF001  the one written in Python
    """A pickler for which equal sets are equal bytes."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = {
        **pickle._Pickler.dispatch  # noqa: SLF001
    }

    def save_sorted(self, items: "set[Any] | frozenset[Any]") -> None:
        self.save([type(items).__name__, *sorted(map(_pickled, items))])  # type: ignore[attr-defined]

    dispatch[set] = save_sorted
    dispatch[frozenset] = save_sorted
