"""R-hat and effective sample size of many columns are those that ArviZ computes one by one."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pplvi.posterior import convergence
from pplvi.posterior.arviz.quiet import arviz_itself
from pplvi.posterior.convergence import rhat_and_ess


def chains(num_chains: int, num_draws: int) -> Tensor:
    """Autocorrelated columns, then one with ties and one with chains that disagree."""
    generator = torch.Generator().manual_seed(num_chains + num_draws)
    memory = torch.tensor([0.0, 0.5, 0.95, -0.6, 0.999, 0.3, 0.3], dtype=torch.float64)
    noise = torch.randn(num_chains, num_draws, 7, generator=generator, dtype=torch.float64)
    values = noise.clone()
    for t in range(1, num_draws):
        values[:, t] = memory * values[:, t - 1] + (1 - memory**2).sqrt() * noise[:, t]
    values[..., 5] = values[..., 5].round()
    values[..., 6] += torch.arange(num_chains)[:, None]
    return values


@pytest.mark.parametrize(
    ("num_chains", "num_draws"), [(4, 500), (2, 333), (2, 7), (4, 5), (4, 4), (3, 9), (2, 12), (1, 100)]
)
def test_they_are_those_of_arviz(num_chains, num_draws, monkeypatch):
    monkeypatch.setattr(convergence, "_MOST_ELEMENTS", 3 * num_chains * num_draws)  # columns in several parts
    arviz, given = arviz_itself(), chains(num_chains, num_draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        rhat, ess = ([float(f(c.numpy())) for c in given.unbind(-1)] for f in (arviz.rhat, arviz.ess))
    found = rhat_and_ess(given)
    np.testing.assert_allclose(found[0], rhat if num_chains > 1 else [math.nan] * 7, rtol=1e-10)
    np.testing.assert_allclose(found[1], ess, rtol=1e-10)


def test_columns_without_an_answer():
    """One that never varies has all its draws and no R-hat; where values are not finite there is neither."""
    given = chains(2, 50)
    given[..., 0] = 3.0
    given[0, 7, 1] = math.nan
    rhat, ess = rhat_and_ess(given)
    assert rhat.isnan().tolist() == [True, True] + [False] * 5
    assert ess[0] == 100
    assert ess.isnan().tolist() == [False, True] + [False] * 5
    few, size = rhat_and_ess(given[:, :3])
    assert few.isnan().all()
    assert size.isnan().all()
