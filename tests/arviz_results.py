"""Results of ArviZ under one name, whichever version is installed: the tests hold the same numbers against both."""

from __future__ import annotations

from typing import Any

import numpy as np

from pplvi.posterior.arviz.versions import is_legacy

RENAMED = {"elpd_loo": "elpd", "p_loo": "p", "loo_i": "elpd_i"}


def field(result: Any, name: str) -> Any:
    """A field of ``ELPDData`` by its name in 0.23."""
    return result[name if is_legacy() else RENAMED.get(name, name)]


def elpd(result: Any) -> float:
    return float(field(result, "elpd_loo"))


def pointwise(result: Any) -> np.ndarray:
    return field(result, "loo_i").values


def from_dict(groups: dict[str, dict[str, np.ndarray]]) -> Any:
    import arviz

    return arviz.from_dict(**groups) if is_legacy() else arviz.from_dict(groups)


def psislw(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of smoothed weights that sum to one, and k-hat; draws in the last dimension."""
    if is_legacy():
        import arviz

        return arviz.psislw(log_weight, normalize=True)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weight)
