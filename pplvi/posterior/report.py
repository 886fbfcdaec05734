"""What a practitioner wants to know of a posterior approximation, in words: how good it is and what to try next."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from pplvi.posterior.draws import Draws
from pplvi.posterior.gathering import verdict_of
from pplvi.posterior.verdict import TRAIN, Verdict
from pplvi.posterior.weighted import WeightedDraws
from pplvi.programs.sites import Plate
from pplvi.weights.pareto import pareto_k_threshold

_WIDTH = 100
_LABEL = 18


def report(
    posterior: WeightedDraws,
    *,
    facts: Mapping[str, Any] | None = None,
    convergence: str | None = None,
    verdict: Verdict | None = None,
) -> str:
    r"""A report on a posterior: numbers, what they mean, and what to try next.

    .. math:: \text{ELBO} = E_q[\log p(x, z)] + H(q), \qquad \log Z - \text{ELBO} = \text{KL}(q \| p)

    Every number comes with its Monte Carlo error (one standard error) and is in nats.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25(72); Yao,
    Vehtari, Simpson and Gelman 2018, Yes, but did it work? Evaluating variational inference.

    :param posterior: draws of a guide, or of MCMC.
    :param facts: what else to print at the top, such as ``{"objective": "ELBO(num_particles=1)", "steps": 3000}``.
    :param convergence: a sentence on how the training ended.
    :param verdict: on the posterior, if it is known; that of a :class:`pplvi.Posterior` itself, or else one on the
        weights alone.
    :returns: several lines of text, to be printed.
    :raises ValueError: if importance weights are NaN or infinite.

    >>> import torch
    >>> from pplvi.posterior.draws import Draws
    >>> z = torch.linspace(-1, 1, 100)
    >>> exact = WeightedDraws(Draws({"z": z}, {}, {}, {}, -z, -z - 2, (), {"z": ()}, frozenset()))
    >>> print(report(exact, facts={"guide": "exact"}))
    guide             exact
    draws             100 of 1 latent site: z
    ELBO              2.000 +- 0.000 nats = E[log p] 0.000 +- 0.058 + entropy 2.000 +- 0.058
    log evidence      2.000 +- 0.000 nats
    log Z - ELBO      0.000 +- 0.000 nats, estimates KL(guide || posterior)
    ESS               100 of 100 draws (100 %)
    Pareto k-hat      0.00 (threshold 0.50)
    <BLANKLINE>
    Verdict: usable for means, not for tails.
    - 100 effective draws, too few for tails
    - k-hat 0.00 +- 0.22 of 100 draws
    - 100 of them effective (100%)
    <BLANKLINE>
    What to try next:
    - more draws (num_draws=), which is cheap
    - a richer guide: AutoNormal, then AutoMultivariateNormal, then pplvi.AutoFlow
    - posterior predictive checks (az.plot_ppc...): all of the above judges the guide, not the model
    """
    if verdict is None:
        verdict = getattr(posterior, "verdict", None) or verdict_of(posterior)
    lines = [_row(name, value) for name, value in (facts or {}).items()]
    lines += [_row("training", convergence)] if convergence else []
    lines += [_row(name, value) for name, value in _numbers(posterior)]
    lines += ["", f"Verdict: {verdict.word}.", *(line for reason in verdict.reasons for line in _bullet(reason))]
    return "\n".join([*lines, "", "What to try next:", *(line for item in verdict.next for line in _bullet(item))])


def report_likelihood(
    log_likelihood: float, *, facts: Mapping[str, Any] | None = None, convergence: str, converged: bool | None = None
) -> str:
    """A report on a model without latent sites, whose parameters were fitted by maximum likelihood.

    :param log_likelihood: of the data at the parameters found, in nats.
    :param facts: what else to print at the top.
    :param convergence: a sentence on how the training ended.
    :param converged: whether it had converged; ``None`` if that cannot be judged.
    :returns: several lines of text, to be printed.

    >>> print(report_likelihood(-3.7, convergence="took all 50 steps", converged=False))
    training          took all 50 steps
    log likelihood    -3.700 nats
    <BLANKLINE>
    The model has no latent sites: its parameters are a maximum likelihood estimate, of whose uncertainty
    the fit says nothing.
    <BLANKLINE>
    What to try next:
    - train on: the training had not converged; more steps (num_steps=) or another learning rate
    - priors on the parameters (pyro.sample instead of pyro.param), for a posterior
    """
    rows = [*(facts or {}).items(), ("training", convergence), ("log likelihood", f"{log_likelihood:.3f} nats")]
    lines = ["", *textwrap.wrap(_LIKELIHOOD, _WIDTH), "", "What to try next:"]
    advice = (_PRIORS,) if converged is not False else (TRAIN, _PRIORS)
    return "\n".join([*(_row(*row) for row in rows), *lines, *(line for item in advice for line in _bullet(item))])


_LIKELIHOOD = (
    "The model has no latent sites: its parameters are a maximum likelihood estimate, of whose uncertainty the fit "
    "says nothing."
)
_PRIORS = "priors on the parameters (pyro.sample instead of pyro.param), for a posterior"


def _numbers(posterior: WeightedDraws) -> Iterator[tuple[str, str]]:
    yield "draws", _describe_draws(posterior)
    if posterior.is_mcmc or posterior.is_dirac:
        yield "E[log p]", f"{posterior.expected_log_prob} nats"
        if posterior.evidence is not None:
            low, high = posterior.evidence.min().item(), posterior.evidence.max().item()
            yield "log evidence", f"{posterior.total_log_evidence} nats; by islands {low:.3f} to {high:.3f}"
            yield "ESS", _describe_ess(posterior)
        return
    terms = f"E[log p] {posterior.expected_log_prob} + entropy {posterior.entropy}"
    yield "ELBO", f"{posterior.elbo} nats = {terms}"
    if posterior.has_weights:
        yield "log evidence", f"{posterior.total_log_evidence} nats"
        yield "log Z - ELBO", f"{posterior.gap} nats, estimates KL(guide || posterior)"
        yield "ESS", _describe_ess(posterior)
        yield "Pareto k-hat", _describe_pareto_k(posterior)


def _describe_draws(posterior: WeightedDraws) -> str:
    sites = list(posterior.draws.latents)
    chains = f" in {posterior.num_chains} chains" if posterior.num_chains > 1 else ""
    batch = " and ".join(_describe_plate(plate) for plate in posterior.draws.batch)
    weights = f"; weights for each of {batch}" if batch and posterior.has_weights else ""
    names = textwrap.shorten(", ".join(sites), 50, placeholder=" ...")
    return f"{posterior.num_draws:,}{chains} of {len(sites)} latent site{'s' * (len(sites) > 1)}: {names}{weights}"


def _describe_plate(plate: Plate) -> str:
    minibatch = f" (a minibatch of {plate.full_size}, to which totals are scaled up)" if plate.scale != 1 else ""
    return f"{plate.size} of plate {plate.name!r}{minibatch}"


def _describe_ess(posterior: WeightedDraws) -> str:
    ess, total = posterior.ess, posterior.num_draws
    median = f"{ess.median().item():.0f} of {total:,} draws ({ess.median().item() / total:.0%})".replace("%", " %")
    return median if ess.numel() == 1 else f"median {median}, smallest {ess.min().item():.0f}"


def _describe_pareto_k(posterior: WeightedDraws) -> str:
    pareto_k: Tensor = posterior.pareto_k
    if posterior.num_draws < 2 or pareto_k.isinf().all():
        return "unknown: too few draws in the tail of the weights"
    threshold = pareto_k_threshold(posterior.num_draws)
    words = f"{pareto_k.max().item():.2f} (threshold {threshold:.2f})"
    if pareto_k.numel() == 1:
        return words
    above = int((pareto_k > threshold).sum())
    return f"median {pareto_k.median().item():.2f}; {above} of {pareto_k.numel()} above the threshold; largest {words}"


def describe_parameters(count: int, draws: Draws, amortized: bool = False) -> str:
    """How many parameters a guide has, and whether more data would give it more.

    :param count: number of the guide's parameters.
    :param draws: its draws, which say what latents are inside the plates of the data.
    :param amortized: whether a network stands for the latents inside those plates.

    >>> import torch
    >>> z, plate = torch.zeros(4, 8), Plate("school", -1, 8, 8)
    >>> one = Draws({"z": z}, {}, {"y": z[0]}, {}, z, z, (), {"z": (plate,), "y": (plate,)}, frozenset())
    >>> describe_parameters(16, one)
    "16; they grow with the data: 8 of 8 latent coordinates are in plate 'school'"
    """
    data = {plate.name: plate for name in draws.observed for plate in draws.plates.get(name, ())}
    inside = {
        name: [plate for plate in draws.plates[name] if plate.name in data]
        for name in draws.latents
        if any(plate.name in data for plate in draws.plates[name])
    }
    if amortized or not inside:
        return f"{count:,}; they do not grow with the data"
    sizes = {name: math.prod(value.shape[1:]) for name, value in draws.latents.items()}
    names = sorted({plate.name for plates in inside.values() for plate in plates})
    local = sum(sizes[name] for name in inside)
    where = f"plate{'s' * (len(names) > 1)} {' and '.join(map(repr, names))}"
    return f"{count:,}; they grow with the data: {local:,} of {sum(sizes.values()):,} latent coordinates are in {where}"


def _row(label: str, value: object) -> str:
    head = f"{label:<{_LABEL}}" if len(label) < _LABEL else f"{label} "
    return textwrap.fill(f"{head}{value}", _WIDTH, subsequent_indent=" " * _LABEL, break_long_words=False)


def _bullet(item: str) -> list[str]:
    return textwrap.wrap(f"- {item}", _WIDTH, subsequent_indent="  ")
