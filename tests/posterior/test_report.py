"""The report: every number against the conjugate model, and words that change with k-hat."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Pareto

from pplvi.posterior.draws import Draws
from pplvi.posterior.gathering import verdict_of
from pplvi.posterior.report import report
from pplvi.posterior.verdict import Verdict
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.sites import Plate

pytestmark = pytest.mark.usefixtures("float64")

Y = 0.5
LOG_Z = -1.3280121


def conjugate(loc: float = 0.0, scale: float = 1.0, num_draws: int = 40_000, batch: int = 0) -> WeightedDraws:
    torch.manual_seed(0)
    plates = (Plate("data", -1, batch, batch),) if batch else ()
    guide = Normal(torch.tensor(loc), scale)
    z = guide.sample((num_draws, *([batch] if batch else [])))
    log_p = Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(torch.tensor(Y))
    return WeightedDraws(Draws({"z": z}, {}, {}, {}, log_p, guide.log_prob(z), plates, {"z": plates}, frozenset()))


def weighted(log_weight: Tensor, **kwargs: Any) -> WeightedDraws:
    draws = Draws({"z": log_weight}, {}, {}, {}, log_weight, 0 * log_weight, (), {"z": ()}, frozenset())
    return WeightedDraws(draws, **kwargs)


def pareto(k: float, num_draws: int = 5000) -> WeightedDraws:
    """Weights at the quantiles of a Pareto distribution whose k is known."""
    uniform = (torch.arange(num_draws) + 0.5) / num_draws
    return weighted(Pareto(torch.tensor(1.0), 1 / k).icdf(uniform).log())


def numbers(text: str, label: str) -> list[tuple[float, float]]:
    """All ``value +- error`` pairs of the line that begins with a label."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [(float(value), float(error)) for value, error in re.findall(r"(-?[\d.]+) \+- ([\d.]+)", line)]


def test_every_number_agrees_with_the_exact_one_within_its_error() -> None:
    text = report(conjugate())
    log_p = -math.log(2 * math.pi) - 0.5 - (Y**2 + 1) / 2
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    exact = {
        "ELBO": [log_p + entropy, log_p, entropy],
        "log evidence": [LOG_Z],
        "log Z - ELBO": [LOG_Z - log_p - entropy],
    }
    for label, values in exact.items():
        for (value, error), expected in zip(numbers(text, label), values, strict=True):
            assert abs(value - expected) < 3 * error + 5e-4, label
            assert 0 < error < 0.02


def test_numbers_are_those_of_the_posterior() -> None:
    posterior = conjugate(num_draws=500)
    text = report(posterior)
    assert f"{posterior.elbo} nats = E[log p] {posterior.expected_log_prob} + entropy {posterior.entropy}" in text
    assert f"log evidence      {posterior.total_log_evidence} nats" in text
    assert f"{posterior.gap} nats, estimates KL(guide || posterior)" in text
    ess = posterior.ess.item()
    assert f"ESS               {ess:.0f} of 500 draws ({ess / 500:.0%})".replace("%", " %") in text
    assert f"Pareto k-hat      {posterior.pareto_k.item():.2f} (threshold" in text
    assert "500 of 1 latent site: z" in text


def test_batches_are_summed_up_and_summarised() -> None:
    posterior = conjugate(num_draws=2000, batch=5)
    text = report(posterior)
    ((value, error),) = numbers(text, "log evidence")
    assert abs(value - 5 * LOG_Z) < 3 * error + 5e-4
    assert "weights for each of 5 of plate 'data'" in text
    assert f"median {posterior.ess.median().item():.0f} of 2,000 draws" in text
    assert f"smallest {posterior.ess.min().item():.0f}" in text
    assert "0 of 5 above the threshold; largest" in text


def test_the_report_prints_the_verdict_with_its_reasons_and_the_next_step() -> None:
    verdict = Verdict("not reliable", ("scouts find 30% +- 1% of the evidence around mode 2 of 2",), ("look there",))
    text = report(pareto(0.2), verdict=verdict)
    assert "Verdict: not reliable.\n- scouts find 30% +- 1% of the evidence around mode 2 of 2" in text
    assert text.endswith("What to try next:\n- look there")
    assert "Verdict: reliable." in report(pareto(0.2))


def test_training_facts_and_convergence_are_printed() -> None:
    facts = {"objective": "ELBO(num_particles=1)", "guide": "AutoNormal", "seconds": 3.2}
    text = report(conjugate(num_draws=100), facts=facts, convergence="stopped after 700 of 3,000 steps: no gain")
    lines = text.splitlines()
    assert lines[:3] == [
        "objective         ELBO(num_particles=1)",
        "guide             AutoNormal",
        "seconds           3.2",
    ]
    assert lines[3] == "training          stopped after 700 of 3,000 steps: no gain"


def test_training_that_had_not_converged_comes_first_in_the_advice() -> None:
    posterior = conjugate(num_draws=100)
    advice = report(posterior, verdict=verdict_of(posterior, False)).split("What to try next:\n")[1]
    assert advice.startswith("- train on: the training had not converged")
    for converged in (True, None):
        assert "train on" not in report(posterior, verdict=verdict_of(posterior, converged))


def test_point_guides_get_no_infinities() -> None:
    text = report(weighted(torch.full((50,), -3.0), point_sites=frozenset({"z"})))
    assert "E[log p]          -3.000 +- 0.000 nats" in text
    assert "holds latent sites at a point" in text
    assert "AutoLaplaceApproximation" in text
    for absent in ("ELBO ", "log evidence", "k-hat  ", "inf"):
        assert absent not in text


def test_mcmc_is_sent_to_its_own_diagnostics() -> None:
    draws = Draws({"z": torch.zeros(40)}, {}, {}, {}, torch.zeros(40), None, (), {"z": ()}, frozenset())
    text = report(WeightedDraws(draws, num_chains=4))
    assert "40 in 4 chains of 1 latent site" in text
    assert "R-hat" in text
    assert "log evidence" not in text


def test_subsampled_plates_leave_the_elbo_only() -> None:
    plates = {"z": (), "y": (Plate("data", -1, 2, 10),)}
    draws = Draws({"z": torch.zeros(40)}, {}, {}, {}, torch.ones(40), torch.zeros(40), (), plates, frozenset())
    text = report(WeightedDraws(draws))
    assert numbers(text, "ELBO")[0] == (1, 0)
    assert "log evidence" not in text
    assert "a plate is subsampled" in text


def test_minibatches_say_that_totals_are_scaled() -> None:
    plates = (Plate("data", -1, 2, 10),)
    draws = Draws(
        {"z": torch.zeros(40, 2)}, {}, {}, {}, torch.ones(40, 2), torch.zeros(40, 2), plates, {"z": plates}, frozenset()
    )
    text = report(WeightedDraws(draws))
    assert numbers(text, "ELBO")[0] == numbers(text, "log evidence")[0] == (10, 0)
    assert "2 of plate 'data' (a minibatch of 10, to which totals are scaled up)" in " ".join(text.split())


@pytest.mark.parametrize("num_draws", [1, 10])
def test_too_few_draws_for_a_k_hat_say_so(num_draws: int) -> None:
    text = report(conjugate(num_draws=num_draws))
    assert "unknown: too few draws in the tail" in text
    assert "more draws" in text


def test_lines_are_not_too_long_with_many_sites() -> None:
    names = {f"a_rather_long_site_name_{i}": torch.randn(50) for i in range(30)}
    draws = Draws(names, {}, {}, {}, torch.randn(50), torch.zeros(50), (), dict.fromkeys(names, ()), frozenset())
    text = report(WeightedDraws(draws), facts={"objective": "x " * 200})
    assert max(map(len, text.splitlines())) <= 100
    assert "30 latent sites" in text
