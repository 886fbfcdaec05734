"""The last posteriors of a fit, which need not be drawn and judged twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from pplvi.posterior.posterior import Posterior
from pplvi.programs.deadline import is_time_over

_MOST = 2


class Kept:
    """The last two posteriors, by what they were asked for; each as long as programs, parameters and data stay."""

    def __init__(self) -> None:
        self._table: OrderedDict[Hashable, Posterior] = OrderedDict()

    def find(self, key: Hashable, draw: Callable[[], Posterior]) -> Posterior:
        """The one of this key if it is current (:attr:`pplvi.Posterior.is_current`), or a new one.

        :param key: everything that draws depend on, besides programs, parameters and data.
        :param draw: what makes it.
        """
        found = self._table.pop(key, None)
        if found is None or not found.is_current:
            found = draw()
            if is_time_over():  # it may have fewer draws than were asked for
                return found
        self._table[key] = found
        if len(self._table) > _MOST:
            self._table.popitem(last=False)
        return self._table[key]
