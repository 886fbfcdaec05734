"""Distributions are drawn from inside vmap: draws of each particle's own, of the right moments and gradients."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import Permute

from pplvi.programs import randomness
from pplvi.programs.randomness import OutOfPlace, carried, carries_gradient, for_all_particles
from pplvi.programs.together import is_batched

COUNT = 3_000


def vector(*values):
    return torch.tensor(values)


STANDARD = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))

FAMILIES = {
    "AffineBeta": lambda t: dist.AffineBeta(2.0 * t, 3.0, 0.0, 2.0),
    "AsymmetricLaplace": lambda t: dist.AsymmetricLaplace(0.0, t, 2.0),
    "Bernoulli": lambda t: dist.Bernoulli(0.4 * t),
    "Beta": lambda t: dist.Beta(2.0 * t, 3.0),
    "BetaBinomial": lambda t: dist.BetaBinomial(2.0 * t, 3.0, 10),
    "Binomial": lambda t: dist.Binomial(10, 0.4 * t),
    "Categorical": lambda t: dist.Categorical(vector(0.2, 0.3, 0.5) * t),
    "Cauchy": lambda t: dist.Cauchy(0.0, t),
    "Chi2": lambda t: dist.Chi2(3.0 * t),
    "ContinuousBernoulli": lambda t: dist.ContinuousBernoulli(0.3 * t),
    "Dirichlet": lambda t: dist.Dirichlet(vector(1.0, 2.0, 3.0) * t),
    "DiscreteHMM": lambda t: dist.DiscreteHMM(
        torch.zeros(2), torch.eye(2) * t, dist.Normal(vector(-1.0, 1.0) * t, 1.0), duration=3
    ),
    "Empirical": lambda t: dist.Empirical(vector(0.0, 1.0, 2.0) * t, torch.zeros(3)),
    "ExpandedDistribution": lambda t: dist.Gamma(2.0 * t, 1.0).expand([2]),
    "Exponential": lambda t: dist.Exponential(2.0 * t),
    "ExtendedBetaBinomial": lambda t: dist.ExtendedBetaBinomial(2.0 * t, 3.0, 10),
    "ExtendedBinomial": lambda t: dist.ExtendedBinomial(10, 0.4 * t),
    "FisherSnedecor": lambda t: dist.FisherSnedecor(3.0 * t, 5.0),
    "FoldedDistribution": lambda t: dist.FoldedDistribution(dist.Normal(0.0, t)),
    "Gamma": lambda t: dist.Gamma(2.0 * t, 3.0),
    "GammaPoisson": lambda t: dist.GammaPoisson(2.0 * t, 3.0),
    "GaussianHMM": lambda t: dist.GaussianHMM(
        STANDARD, 0.5 * torch.eye(2) * t, STANDARD, torch.eye(2), STANDARD, duration=3
    ),
    "GeneralizedPareto": lambda t: dist.GeneralizedPareto(torch.tensor(0.0), t, torch.tensor(0.2)),
    "Geometric": lambda t: dist.Geometric(0.3 * t),
    "Gumbel": lambda t: dist.Gumbel(0.0, t),
    "HalfCauchy": lambda t: dist.HalfCauchy(t),
    "HalfNormal": lambda t: dist.HalfNormal(t),
    "Independent": lambda t: dist.Independent(dist.Normal(vector(0.0, 1.0) * t, 1.0), 1),
    "IndependentHMM": lambda t: dist.IndependentHMM(
        dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(2, 1), torch.eye(1)),
            0.5 * torch.ones(2, 1, 1, 1) * t,
            dist.MultivariateNormal(torch.zeros(2, 1, 1), torch.eye(1)),
            torch.ones(2, 1, 1, 1),
            dist.MultivariateNormal(torch.zeros(2, 1, 1), torch.eye(1)),
            duration=3,
        )
    ),
    "InverseGamma": lambda t: dist.InverseGamma(3.0 * t, 2.0),
    "Kumaraswamy": lambda t: dist.Kumaraswamy(2.0 * t, 3.0),
    "LKJ": lambda t: dist.LKJ(3, 2.0 * t),
    "LKJCholesky": lambda t: dist.LKJCholesky(3, 2.0 * t),
    "Laplace": lambda t: dist.Laplace(0.0, t),
    "LinearHMM": lambda t: dist.LinearHMM(
        STANDARD, 0.5 * torch.eye(2) * t, STANDARD, torch.eye(2), STANDARD, duration=3
    ),
    "LogNormal": lambda t: dist.LogNormal(0.0, t),
    "Logistic": lambda t: dist.Logistic(0.0, t),
    "LogisticNormal": lambda t: dist.LogisticNormal(vector(0.0, 1.0) * t, vector(1.0, 1.0)),
    "LowRankMultivariateNormal": lambda t: dist.LowRankMultivariateNormal(
        vector(0.0, 1.0) * t, torch.ones(2, 1), torch.ones(2)
    ),
    "MaskedDistribution": lambda t: dist.Normal(0.0, t).mask(torch.tensor(True)),
    "MaskedMixture": lambda t: dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, t), dist.Normal(1.0, 1.0)),
    "MixtureSameFamily": lambda t: dist.MixtureSameFamily(
        dist.Categorical(vector(0.4, 0.6)), dist.Normal(vector(0.0, 1.0) * t, 1.0)
    ),
    "Multinomial": lambda t: dist.Multinomial(10, vector(0.2, 0.3, 0.5) * t),
    "MultivariateNormal": lambda t: dist.MultivariateNormal(vector(0.0, 1.0) * t, torch.eye(2)),
    "MultivariateStudentT": lambda t: dist.MultivariateStudentT(3.0 * t, vector(0.0, 1.0), torch.eye(2)),
    "NanMaskedMultivariateNormal": lambda t: dist.NanMaskedMultivariateNormal(vector(0.0, 1.0) * t, torch.eye(2)),
    "NanMaskedNormal": lambda t: dist.NanMaskedNormal(0.0, t),
    "NegativeBinomial": lambda t: dist.NegativeBinomial(5, 0.4 * t),
    "Normal": lambda t: dist.Normal(0.0, t),
    "OneHotCategorical": lambda t: dist.OneHotCategorical(vector(0.2, 0.3, 0.5) * t),
    "OneHotCategoricalStraightThrough": lambda t: dist.OneHotCategoricalStraightThrough(vector(0.2, 0.3, 0.5) * t),
    "OneOneMatching": lambda t: dist.OneOneMatching(torch.eye(3) * t),
    "OneTwoMatching": lambda t: dist.OneTwoMatching(torch.eye(4, 2) * t),
    "OrderedLogistic": lambda t: dist.OrderedLogistic(0.0 * t, vector(-1.0, 1.0)),
    "Pareto": lambda t: dist.Pareto(t, 3.0),
    "Poisson": lambda t: dist.Poisson(3.0 * t),
    "RelaxedBernoulli": lambda t: dist.RelaxedBernoulli(torch.tensor(0.5), 0.4 * t),
    "RelaxedBernoulliStraightThrough": lambda t: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), 0.4 * t),
    "RelaxedOneHotCategoricalStraightThrough": lambda t: dist.RelaxedOneHotCategoricalStraightThrough(
        torch.tensor(0.5), vector(0.2, 0.3, 0.5) * t
    ),
    "RelaxedOneHotCategorical": lambda t: dist.RelaxedOneHotCategorical(torch.tensor(0.5), vector(0.2, 0.3, 0.5) * t),
    "SkewLogistic": lambda t: dist.SkewLogistic(0.0, t, 2.0),
    "SoftAsymmetricLaplace": lambda t: dist.SoftAsymmetricLaplace(torch.tensor(0.0), t, torch.tensor(2.0)),
    "SoftLaplace": lambda t: dist.SoftLaplace(0.0, t),
    "StudentT": lambda t: dist.StudentT(4.0 * t),
    "TransformedDistribution": lambda t: dist.TransformedDistribution(
        dist.Normal(vector(0.0, 1.0) * t, 1.0).to_event(1), [Permute(torch.tensor([1, 0]))]
    ),
    "TruncatedPolyaGamma": lambda t: dist.TruncatedPolyaGamma(t),
    "Uniform": lambda t: dist.Uniform(0.0, t),
    "VonMises": lambda t: dist.VonMises(0.0, 2.0 * t),
    "Weibull": lambda t: dist.Weibull(t, 2.0),
    "ZeroInflatedDistribution": lambda t: dist.ZeroInflatedDistribution(dist.Poisson(3.0 * t), gate=torch.tensor(0.3)),
    "ZeroInflatedNegativeBinomial": lambda t: dist.ZeroInflatedNegativeBinomial(
        5.0 * t, probs=torch.tensor(0.4), gate=torch.tensor(0.3)
    ),
    "ZeroInflatedPoisson": lambda t: dist.ZeroInflatedPoisson(3.0 * t, gate=torch.tensor(0.3)),
}
LOOPED = {  # they branch on their draws, or have gradients of their own that vmap cannot carry
    "AVFMultivariateNormal": lambda t: dist.AVFMultivariateNormal(
        vector(0.0, 1.0) * t, torch.eye(2), 0.1 * torch.ones(2, 1, 2)
    ),
    "CoalescentTimes": lambda t: dist.CoalescentTimes(vector(0.0, 0.0, 0.5) * t),
    "DirichletMultinomial": lambda t: dist.DirichletMultinomial(vector(1.0, 2.0, 3.0) * t, 10),
    "GaussianScaleMixture": lambda t: dist.GaussianScaleMixture(torch.ones(2), torch.zeros(3) * t, torch.ones(3)),
    "MixtureOfDiagNormalsSharedCovariance": lambda t: dist.MixtureOfDiagNormalsSharedCovariance(
        torch.zeros(2, 3) * t, torch.ones(3), torch.zeros(2)
    ),
    "MixtureOfDiagNormals": lambda t: dist.MixtureOfDiagNormals(
        torch.zeros(2, 3) * t, torch.ones(2, 3), torch.zeros(2)
    ),
    "OMTMultivariateNormal": lambda t: dist.OMTMultivariateNormal(vector(0.0, 1.0) * t, torch.eye(2)),
    "ProjectedNormal": lambda t: dist.ProjectedNormal(vector(1.0, 1.0) * t),
    "SineBivariateVonMises": lambda t: dist.SineBivariateVonMises(
        0.0 * t, torch.tensor(0.0), 2.0 * t, torch.tensor(2.0), weighted_correlation=torch.tensor(0.3)
    ),
    "SineSkewed": lambda t: dist.SineSkewed(dist.VonMises(0.0, 2.0 * t).expand([1]).to_event(1), vector(0.3) * t),
    "SpanningTree": lambda t: dist.SpanningTree(torch.zeros(3) * t),
    "Stable": lambda t: dist.Stable(1.5 * t, 0.3),
    "StableWithLogProb": lambda t: dist.StableWithLogProb(1.5 * t, 0.3),
    "Wishart": lambda t: dist.Wishart(9.0 * t, torch.eye(2)),
}
WITHOUT_DRAWS = {  # values, abstract classes, and densities that Pyro cannot draw from
    *("CoalescentTimesWithRate", "Delta", "ExponentialFamily", "GammaGaussianHMM", "GaussianMRF"),
    *(
        "GroupedNormalNormal",
        "ImproperUniform",
        "LKJCorrCholesky",
        "LogNormalNegativeBinomial",
        "Rejector",
        "TorchDistribution",
    ),
    *("Unit", "VonMises3D"),
}


def test_every_distribution_of_pyro_is_known():
    """Each is carried by vmap, left to the loop (see :mod:`pplvi.programs.randomness`), or never drawn from."""
    classes = {name for name in dist.__all__ if isinstance(getattr(dist, name, None), type)}
    known = {name for name in classes if issubclass(getattr(dist, name), torch.distributions.Distribution)}
    assert known == FAMILIES.keys() | LOOPED.keys() | WITHOUT_DRAWS
    assert not FAMILIES.keys() & LOOPED.keys()
    assert all(name in randomness.__doc__ for name in LOOPED)


def draws(make, like, written=False):
    mode = OutOfPlace()

    def one(token):
        mode.token = token if written else None
        return make(like(token)).sample().float()

    with carried(mode):
        return torch.func.vmap(one, randomness="different")(torch.ones(COUNT)).reshape(COUNT, -1)


def drawn_alone(fn):
    if type(fn).__name__ == "TruncatedPolyaGamma":  # its own many draws at once fail
        return torch.stack([fn.sample() for _ in range(COUNT)])
    try:
        return fn.expand([COUNT]).sample()
    except (NotImplementedError, RuntimeError):  # cannot be expanded further
        return fn.sample(torch.Size([COUNT]))


def bounded(values):
    return values.clamp(-10.0, 10.0)  # heavy tails have no moments


@pytest.mark.parametrize("like", [lambda t: t, lambda t: torch.tensor(1.0)], ids=["own", "shared"])
@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_each_particles_own(name, like):
    torch.manual_seed(0)
    make = FAMILIES[name]
    found = draws(make, like, written=name in ("Multinomial", "OrderedLogistic"))
    alone = drawn_alone(make(torch.tensor(1.0))).float().reshape(COUNT, -1)
    distinct, expected = (len(torch.unique(x, dim=0)) for x in (found, alone))
    assert distinct > 0.5 * expected > 0.5
    spread = bounded(alone).std(0) + 1e-6
    for moment in (lambda x: x, lambda x: x.square()):
        ours, theirs = moment(bounded(found)), moment(bounded(alone))
        error = theirs.std(0) * math.sqrt(2 / COUNT) + 1e-6
        assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all(), spread


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("name", LOOPED)
def test_families_that_are_left_to_the_loop(name):
    assert LOOPED[name](torch.tensor(1.0)).sample().isfinite().all()
    for written in (False, True):
        with pytest.raises(RuntimeError):
            draws(LOOPED[name], lambda t: t, written=written)


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize(
    "name",
    sorted(
        set(LOOPED)
        - {"CoalescentTimes", "SineBivariateVonMises", "SineSkewed", "Stable", "StableWithLogProb", "Wishart"}
    ),
)
def test_densities_of_most_of_them_are_carried(name):
    """So that a model is run for all draws of a guide at once, and only its predictions are looped."""
    t = torch.tensor([0.9, 1.0, 1.1])
    value = LOOPED[name](t[1]).sample()
    with carried(OutOfPlace()):
        found = torch.func.vmap(lambda s: LOOPED[name](s).log_prob(value))(t)
    assert torch.allclose(found, torch.stack([LOOPED[name](s).log_prob(value) for s in t]), atol=1e-5)


@pytest.mark.parametrize("name", ["Beta", "Dirichlet", "Gamma", "HalfCauchy", "Normal", "StudentT"])
@pytest.mark.table(2)
def test_gradients_of_draws_are_those_of_the_loop(name):
    """The mean derivative of a function of the draws, with respect to a parameter that all share."""

    def slope(run):
        torch.manual_seed(0)
        t = torch.ones(COUNT, requires_grad=True)
        (gradient,) = torch.autograd.grad(run(t).sum(), t)
        return gradient

    def function(x):
        return torch.tanh(x * torch.arange(1.0, x.numel() + 1).reshape(x.shape)).sum()

    def vmapped(t):
        with carried(OutOfPlace()):
            return torch.func.vmap(lambda s: function(FAMILIES[name](s).rsample()), randomness="different")(t)

    ours = slope(vmapped)
    theirs = slope(lambda t: torch.stack([function(FAMILIES[name](s).rsample()) for s in t]))
    error = (ours.var() + theirs.var()).sqrt() / math.sqrt(COUNT)
    assert ours.abs().sum() > 0
    assert (ours.mean() - theirs.mean()).abs() < 4.5 * error


def test_random_numbers_written_in_place_and_read_again():
    """They would be lost; tensors that are each particle's own keep them, and a check sees it where they are not."""

    def program(token):
        x = torch.empty(3)
        x.normal_()
        return x + token

    def run(mode, written):
        def one(token):
            mode.token = token if written else None
            return program(token)

        with carried(mode):
            return torch.func.vmap(one, randomness="different")(torch.zeros(4))

    assert run(OutOfPlace(spoil=True), False).isnan().all()
    assert len(torch.unique(run(OutOfPlace(), True))) == 12


def test_what_is_drawn_for_all_particles_is_one_draw():
    seen = []

    def one(token):
        with for_all_particles():
            seen.append(torch.randperm(5))
        seen.append(torch.randperm(5))
        return token

    torch.func.vmap(one, randomness="different")(torch.zeros(2))
    assert [is_batched(x) for x in seen] == [False, True]
    with for_all_particles():
        assert torch.randperm(5).shape == (5,)


def test_gradients_are_seen_through_vmap():
    found = []
    torch.func.vmap(lambda x: found.append(carries_gradient(x)) or x)(torch.ones(2, requires_grad=True))
    torch.func.vmap(lambda x: found.append(carries_gradient(x)) or x)(torch.ones(2))
    assert found == [True, False]


def test_checks_of_arguments_are_off_inside_only():
    with carried(OutOfPlace()):
        dist.Normal(0.0, -torch.ones(()))
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -torch.ones(()))
    assert constraints.positive.check(torch.ones(()))
