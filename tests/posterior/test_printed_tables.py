"""Posteriors as frames, against exact answers, and as HTML, whose names are escaped."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pplvi

Y = torch.tensor([1.0, 2.0, 0.5])


def model(y: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.deterministic("both", torch.stack([z, -2 * z], -1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide(y: torch.Tensor) -> None:
    """Beside the posterior, Normal(3.5 / 4, 1 / 2)."""
    pyro.sample("z", dist.Normal(0.6, 0.8))


def test_weighted_moments_and_quantiles_are_those_of_the_posterior() -> None:
    posterior = pplvi.Posterior(model, guide, (Y,), num_draws=20_000, seed=0)
    frame, mean, sd = posterior.to_frame(), Y.sum().item() / 4, 0.5
    assert list(frame.index) == ["z", "both[0]", "both[1]"]
    exact = torch.distributions.Normal(mean, sd).icdf(torch.tensor([0.05, 0.5, 0.95])).tolist()
    error = 4 * sd / math.sqrt(float(posterior.ess))
    assert frame.loc["z"].tolist() == pytest.approx([mean, sd, *exact], abs=2.2 * error)  # 2.1: of a 5 % quantile
    assert frame.loc["both[1]", "mean"] == pytest.approx(-2 * frame.loc["z", "mean"])
    assert frame.loc["both[1]", "5%"] == pytest.approx(-2 * frame.loc["z", "95%"], abs=2 * error)


def test_each_datum_has_its_own_weights() -> None:
    def local(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def prior(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = pplvi.Posterior(local, prior, (Y,), num_draws=20_000, seed=0)
    errors = 4 * 0.5**0.5 / posterior.ess.sqrt()
    found = torch.tensor(posterior.to_frame()["mean"].to_numpy())
    assert ((found - Y / 2).abs() < errors).all()


def test_mcmc_draws_count_alike() -> None:
    fit = pplvi.fit(model, "nuts", args=(Y,), num_steps=20, seed=0, progress=False)
    frame = fit.summary().frame
    assert frame is not None
    assert frame.loc["z", "mean"] == pytest.approx(fit.posterior().draws.latents["z"].mean().item(), rel=1e-5)


def odd() -> None:
    pyro.sample("<script>x", dist.Normal(torch.zeros(30), 1.0).to_event(1))


def test_a_notebook_shows_the_verdict_and_the_first_rows() -> None:
    fit = pplvi.fit(odd, AutoNormal, num_steps=5, seed=0, progress=False)
    for shown in (fit._repr_html_(), fit.posterior()._repr_html_(), fit.summary()._repr_html_()):
        assert "<script>" not in shown
        assert len(re.findall(r"&lt;script&gt;x\[\d+\]", shown)) >= 12
        assert "18 more rows" in shown
        assert len(shown) < 8000
    assert fit.verdict.word in fit._repr_html_()
    assert fit.posteriors[0].verdict.word in fit.posteriors[0]._repr_html_()
    table = pplvi.compare({"<b>": pplvi.Posterior(model, guide, (Y,), num_draws=500, seed=0)})
    assert "&lt;b&gt;" in table._repr_html_()


def test_a_fit_without_latents_or_full_data_is_shown_too() -> None:
    def likelihood(y: torch.Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("loc", lambda: torch.zeros(())), 1.0), obs=y)

    fit = pplvi.fit(likelihood, lambda y: None, args=(Y,), num_steps=3, seed=0, progress=False)
    assert "maximum likelihood" in fit._repr_html_()
    assert fit.summary().frame is None
    fit = pplvi.fit(model, AutoNormal, data=[Y], num_steps=3, seed=0, progress=False)
    assert "no full data" in fit._repr_html_()


def test_bars_are_those_of_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto

    made: list[dict[str, object]] = []

    class Bar(tqdm.auto.tqdm):
        """One that is looked at."""

        def __init__(self, **options: object) -> None:
            made.append(options)
            super().__init__(**options, disable=True)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    pplvi.fit(model, AutoNormal, args=(Y,), num_steps=3, seed=0)
    assert [bar["total"] for bar in made] == [3]
