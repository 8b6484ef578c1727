"""One warning for each column of a dataset that cannot be stored."""

import logging
from collections.abc import Mapping

logger = logging.getLogger("metaflow_hf.data")


class LeftOutColumns:
    """Warns once for each column that was left out of rows, whichever process read them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: set[str] = set()

    def warn(self, left_out: Mapping[str, str]) -> None:
        """Log the columns of ``left_out`` (name -> reason) that were not logged before."""
        for column, reason in left_out.items():
            if column not in self._told:
                self._told.add(column)
                logger.warning(
                    "%s: column %r is left out of rows in which it cannot be stored: it holds %s",
                    self._name,
                    column,
                    reason,
                )
