"""What the core refuses: each error says what came, what was expected and what to do, and leaves parameters alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam

import pplvi
from pplvi.objectives.bounds import RenyiBound
from pplvi.objectives.forward_kl import ForwardKLDivergence
from pplvi.programs.joint import execute
from pplvi.samplers.ancestral import Ancestral

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)


def model(y, size=None):
    pyro.param("noise", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y) if size is None else size):
        pyro.sample("y", dist.Normal(mu, pyro.param("noise")), obs=y)


def guide(y, size=None):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.9))


def guide_with(name, fn, **more):
    """A guide of one site `name`."""

    def own(*args):
        pyro.sample(name, fn(pyro.param("loc", torch.tensor(0.1))), **more)

    return own


def model_with(fn, observed=None):
    """A model of one site z and perhaps one observation."""

    def own(*args):
        pyro.param("noise", torch.tensor(1.0))
        z = pyro.sample("z", fn())
        if observed is not None:
            pyro.sample("y", dist.Normal(z, 1.0), obs=observed)

    return own


def plated(fn, size=4, dim=-1):
    """A guide or model of one site z in a plate."""

    def own(*args):
        with pyro.plate("data", size, dim=dim):
            pyro.sample("z", fn())

    return own


@dataclass
class Case:
    """Two programs that do not fit, and the three parts of the message."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    came: str
    expected: str
    hint: str
    args: tuple = (Y,)


def normal():
    return dist.Normal(0.0, 1.0)


def with_infer(**infer):
    def own(*args):
        pyro.sample("z", dist.Bernoulli(0.5), infer=infer)

    return own


def undeclared(y):
    pyro.sample("z", normal())
    pyro.sample("y", dist.Normal(torch.zeros(4), 1.0), obs=y)


def counts(y):
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Gamma(1.0, 1.0))
        pyro.sample("y", dist.Poisson(z), obs=y)


def positive_guide(y):
    with pyro.plate("data", 4):
        pyro.sample("z", dist.LogNormal(0.0, 1.0))


NAN = torch.tensor([0.3, float("nan"), 0.8, 2.1], dtype=torch.float64)

CASES = {
    "missing in the guide": Case(
        model, lambda y: None, r"missing in the guide: \['mu'\]; the guide has \[\]", "", "Sample them in the guide"
    ),
    "not in the model": Case(
        model_with(normal),
        guide_with("w", lambda loc: dist.Normal(loc, 1.0)),
        r"\['z'\]; the guide has \['w'\]",
        "",
        "",
    ),
    "extra in the guide": Case(
        lambda y: None,
        guide_with("w", lambda loc: dist.Normal(loc, 1.0)),
        r"sites of the guide are not latent sites of the model: \['w'\]",
        r"the model has \[\]",
        "Rename them, or mark helper draws with",
    ),
    "observed in the model, latent in the guide": Case(
        poutine.condition(model, data={"mu": torch.tensor(0.0)}),
        guide,
        r"not latent sites of the model: \['mu'\]",
        r"the model has \[\]",
        "is_auxiliary",
    ),
    "event shape": Case(
        model_with(lambda: normal().expand([3]).to_event(1)),
        guide_with("z", lambda loc: dist.Normal(loc, 1.0).expand([2]).to_event(1)),
        r"'z' has shape \(\) \| \(2,\) .* in the guide",
        r"expected the model's \(\) \| \(3,\)",
        r"Check plates, .expand\(\) and .to_event\(\)",
    ),
    "event instead of plate": Case(
        plated(normal),
        guide_with("z", lambda loc: dist.Normal(loc, 1.0).expand([4]).to_event(1)),
        r"'z' has shape \(\) \| \(4,\)",
        r"expected the model's \(4,\) \| \(\)",
        "Check plates",
    ),
    "plate size": Case(
        plated(normal),
        plated(normal, 5),
        "plate 'data' has size 5 at dimension -1 in the guide",
        "expected the model's 4 at -1",
        "Give it the same size and dim= on both sides",
    ),
    "support": Case(
        model_with(lambda: dist.LogNormal(0.0, 1.0)),
        guide_with("z", lambda loc: dist.Normal(loc, 1.0)),
        r"'z': the guide's Normal draws values outside",
        r"the model's support GreaterThan\(lower_bound=0.0\)",
        "Use a guide distribution with the same support",
    ),
    "support of a point": Case(
        model_with(lambda: dist.Beta(1.0, 1.0)),
        guide_with("z", lambda loc: dist.Delta(loc + 2.0)),
        "'z': the guide's Delta draws values outside",
        r"Interval\(lower_bound=0.0, upper_bound=1.0\)",
        "same support",
    ),
    "NaN": Case(model, guide, "data at site 'y' contain NaN", "expected finite values", "Mask missing entries", (NAN,)),
    "too many data": Case(
        model,
        guide,
        r"'y' has a value of shape \(4,\)",
        r"expected \(3,\) \| \(\) \(batch \| event\)",
        "Check the data against the plates",
        (Y, 3),
    ),
    "data of two dimensions": Case(
        model,
        guide,
        r"'y' has batch shape \(4, 4\)",
        "expected a plate of size 4 at dimension -2",
        "pyro.plate",
        (Y[:, None],),
    ),
    "undeclared batch": Case(
        undeclared,
        guide_with("z", lambda loc: dist.Normal(loc, 1.0)),
        r"'y' has batch shape \(4,\), but plates \{\}",
        "expected a plate of size 4 at dimension -1",
        r"pyro.plate, or make the dimension part of one event with .to_event\(\)",
    ),
    "undeclared batch in the guide": Case(
        model_with(lambda: dist.Normal(torch.zeros(2), 1.0)),
        guide_with("z", lambda loc: dist.Normal(loc.expand(2), 1.0)),
        r"'z' has batch shape \(2,\), but plates \{\}",
        "expected a plate of size 2 at dimension -1",
        "to_event",
    ),
    "empty plate": Case(
        model, guide, "plate of size 0", "expected at least one element", "Drop empty batches", (Y[:0],)
    ),
    "out of support data": Case(
        counts,
        positive_guide,
        "log density at site 'y' cannot be computed",
        "Expected a value inside the support",
        "check the data",
    ),
    "sequential enumeration": Case(
        model_with(lambda: dist.Bernoulli(0.5)),
        with_infer(enumerate="sequential"),
        "'z' asks for sequential enumeration",
        "expected infer={'enumerate': 'parallel'}",
        "config_enumerate",
    ),
    "local samples": Case(
        model_with(lambda: dist.Bernoulli(0.5)),
        with_infer(enumerate="parallel", num_samples=3),
        r"'z' asks for local multiple sampling \(num_samples",
        "no weights per particle",
        "use num_particles of the objective",
    ),
    "no latent site for an autoguide": Case(
        poutine.condition(model, data={"mu": torch.tensor(0.0)}),
        lambda y: AutoDiagonalNormal(poutine.condition(model, data={"mu": torch.tensor(0.0)}))(y),
        "AutoDiagonalNormal found no latent variables",
        "needs at least one latent site",
        "maximum likelihood pass a guide without sites",
    ),
}


def parameters():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def assert_untouched(before):
    after = parameters()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "loss", [pplvi.ELBO(), pplvi.ELBO(3), pplvi.ImportanceWeightedELBO(3), pplvi.ForwardKL(3)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_programs_that_do_not_fit(name, loss):
    case = CASES[name]
    for first in ("loc", "noise"):
        pyro.param(first, torch.tensor(0.5))
    before = parameters()
    svi = SVI(case.model, case.guide, Adam({"lr": 0.1}), loss)
    with pytest.raises(ValueError) as info:  # noqa: PT011
        svi.step(*case.args)
    for part in (case.came, case.expected, case.hint):
        assert re.search(part, str(info.value)), (part, str(info.value))
    assert_untouched(before)
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in pyro.get_param_store()._params.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((NAN,), "log density at site 'y' .*found invalid values.*Expected a value inside the support.*for NaN"),
        ((Y[:0],), "plate of size 0.*expected at least one element.*Drop empty batches"),
        ((Y, 3), r"'y' has a value of shape \(4,\), expected \(3,\)"),
        ((Y[:, None],), r"'y' has batch shape \(4, 4\).*expected a plate of size 4 at dimension -2"),
    ],
    ids=["NaN", "empty", "size", "dimensions"],
)
@pytest.mark.parametrize("num_particles", [1, 4])
def test_arguments_that_do_not_fit_after_good_ones(args, message, num_particles):
    svi = SVI(model, guide, Adam({"lr": 0.1}), pplvi.ImportanceWeightedELBO(num_particles))
    svi.step(Y)
    svi.step(Y[:2])  # other sizes are fine
    before = parameters()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        svi.step(*args)
    assert_untouched(before)
    svi.step(Y)
    assert not all(torch.equal(before[name], value) for name, value in parameters().items())


@pytest.mark.parametrize("num_particles", [1, 3])
def test_sites_that_come_and_go_are_noticed_at_every_run(num_particles):
    """Sites may depend on arguments or on handlers around the loss."""

    def growing(y, more):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        if more:
            pyro.sample("nu", dist.Normal(0.0, 1.0))

    loss = pplvi.ELBO(num_particles)
    loss.loss(growing, guide, Y, False)
    with pytest.raises(ValueError, match=r"missing in the guide: \['nu'\]"):
        loss.loss(growing, guide, Y, True)
    with poutine.condition(data={"nu": torch.tensor(0.3)}):
        loss.loss(growing, guide, Y, True)
    with pytest.raises(ValueError, match=r"missing in the guide: \['nu'\]"):
        loss.loss(growing, guide, Y, True)


@pytest.mark.parametrize("kind", ["poutine.mask", "dist.mask", "obs_mask"])
def test_masked_nan_is_fine(kind):
    seen = ~NAN.isnan()

    def masked(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            if kind == "obs_mask":
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)
            elif kind == "dist.mask":
                pyro.sample("y", dist.Normal(mu, 1.0, validate_args=False).mask(seen), obs=y)
            else:
                with poutine.mask(mask=seen):
                    pyro.sample("y", dist.Normal(mu, 1.0, validate_args=False), obs=y)

    automatic = AutoNormal(masked)
    svi = SVI(masked, automatic, Adam({"lr": 0.01}), pplvi.ImportanceWeightedELBO(3))
    assert all(torch.isfinite(torch.tensor(svi.step(NAN))) for _ in range(3))
    assert all(torch.isfinite(value).all() for value in parameters().values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pplvi.ELBO(0), "num_particles=0: expected a whole number of at least 1"),
        (lambda: pplvi.ELBO(2.5), "num_particles=2.5: expected a whole number"),
        (lambda: pplvi.ForwardKL(1), "num_particles=1: self-normalised weights need at least 2"),
        (lambda: pplvi.ThermodynamicELBO(1), "num_particles=1: .* needs at least 2"),
        (lambda: pplvi.ELBO(1, estimator="vimco"), "num_particles=1: .* needs at least 2"),
        (lambda: pplvi.RenyiELBO(-1.0), "alpha=-1.0: a negative order .* Use ChiELBO"),
        (lambda: pplvi.RenyiELBO(1.5), r"alpha=1.5: expected an order between 0 .* and 1"),
        (lambda: pplvi.ThermodynamicELBO(2, betas=(0.1,)), "expected increasing values that start at 0"),
        (lambda: pplvi.ELBO(estimator="dreg"), "ELBO has no estimator='dreg': expected one of None, 'reparam'"),
        (lambda: pplvi.ELBO(entropy="some"), "entropy='some': expected 'sampled', 'exact' or 'kl'"),
        (
            lambda: pplvi.WeightedELBO(RenyiBound(1.0), Ancestral(), 3),
            "RenyiBound cannot use draws from the model: expected draws from guide. Choose another sampler",
        ),
    ],
)
def test_objectives_that_cannot_be_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_particle_and_a_site_without_reparameterisation():
    def discrete(*args):
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))

    before = parameters()
    with pytest.raises(ValueError, match=r"num_particles=1.*needs at least 2"):
        pplvi.ELBO(estimator="vimco")
    assert pplvi.ELBO().loss_and_grads(model_with(lambda: dist.Bernoulli(0.5)), discrete) >= 0.0
    with pytest.raises(ValueError, match=r"estimator='reparam' .*expected only sites with has_rsample.*Use estimator"):
        pplvi.ELBO(2, estimator="reparam").loss_and_grads(model_with(lambda: dist.Bernoulli(0.5)), discrete)
    with pytest.raises(ValueError, match=r"'stl' and 'dreg' need a guide whose sites are all reparameterised"):
        pplvi.ELBO(2, estimator="stl").loss_and_grads(model_with(lambda: dist.Bernoulli(0.5)), discrete)
    assert_untouched(before)


def test_point_estimates_have_no_density_for_detached_draws():
    point = guide_with("z", dist.Delta)
    with pytest.raises(ValueError, match=r"'z' is a deterministic function of parameters.*expected a stochastic guide"):
        pplvi.ForwardKL(3).loss_and_grads(model_with(normal), point)


def test_nonlinear_bounds_refuse_global_latents_over_a_subsample():
    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    def own(y):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.9))

    with pytest.raises(
        ValueError, match=r"biased here: the subsampled plates \['data'\].*allow_biased_subsampling=True"
    ):
        pplvi.ImportanceWeightedELBO(3).loss_and_grads(subsampled, own, Y)
    assert pplvi.ELBO(3).loss_and_grads(subsampled, own, Y) > 0
    assert pplvi.ImportanceWeightedELBO(3, allow_biased_subsampling=True).loss_and_grads(subsampled, own, Y) > 0


@pytest.mark.parametrize("error", [RuntimeError, IndexError])
def test_programs_that_do_not_broadcast_are_carried(error):
    def rigid(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if mu.dim():
            raise error("mat1 and mat2 shapes cannot be multiplied")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])

    with pytest.raises(ValueError, match=r"(?s)vectorize='broadcast'.*cannot be run that way.*mat1.*Drop vectorize"):
        pplvi.ELBO(3, vectorize_particles="broadcast").loss(rigid, guide, Y)
    for vectorize in (True, "vmap", "loop", False):
        loss = pplvi.ELBO(2000 if vectorize in (True, "vmap") else 50, vectorize_particles=vectorize)
        assert loss.loss(rigid, guide, Y) > 0


def test_particles_that_land_in_a_data_dimension_are_noticed():
    """Reducing over the wrong dimension moves particles into the place of data: they are carried instead."""

    def careless(y):
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal())
        pyro.sample("total", dist.Normal(z.sum(-1), 1.0), obs=y[0])  # (particles,) where (particles, 1) is meant

    guide = plated(lambda: normal())
    with pytest.raises(ValueError, match=r"'total' has a log density of shape .*keepdim=True"):
        pplvi.ELBO(3, vectorize_particles="broadcast").loss(careless, guide, Y)
    run = execute(careless, guide, (Y,), {}, num_particles=3)
    z = run.guide.nodes["z"]["value"].reshape(3, 4)
    prior, data = dist.Normal(0.0, 1.0).log_prob(z).sum(-1), dist.Normal(z.sum(-1), 1.0).log_prob(Y[0])
    assert torch.allclose(run.log_target(), prior + data)


def test_a_model_that_draws_indices_by_itself_is_refused():
    def own_minibatches(y):
        index = torch.randperm(40)[:2]
        with pyro.plate("data", 40, subsample=index):
            z = pyro.sample("z", normal())
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def own_guide(y):
        with pyro.plate("data", 40, subsample_size=2):
            pyro.sample("z", normal())

    with pytest.raises(ValueError, match=r"new indices for plate 'data'.*expected indices.*subsample_size="):
        pplvi.ELBO().loss(own_minibatches, own_guide, Y.repeat(10))


def test_dreams_that_cannot_reach_the_guide():
    loss = pplvi.WeightedELBO(ForwardKLDivergence(), Ancestral(), 2)
    hidden = torch.tensor(0.4)
    with pytest.raises(ValueError, match=r"the dreams of \['y'\] cannot reach the guide.*`observations`"):
        loss.loss(model_with(normal, hidden), guide_with("z", lambda loc: dist.Normal(loc, 1.0)))


def test_errors_of_the_programs_themselves_come_through():
    def broken(y):
        raise KeyError("mine")

    def divided(y):
        return 1 / 0

    with pytest.raises(KeyError, match="mine"):
        pplvi.ELBO(3).loss(broken, lambda y: None, Y)
    with pytest.raises(ZeroDivisionError):
        pplvi.ELBO(3).loss(divided, lambda y: None, Y)


def test_an_error_that_comes_once_is_not_tried_away():
    """One particle runs the programs as they are: what they raise is the user's, though it may not come again."""
    unlucky = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if unlucky:
            raise RuntimeError(unlucky.pop())
        pyro.sample("y", dist.Normal(mu, 1.0).expand([4]).to_event(1), obs=y)

    own = AutoNormal(model)
    pplvi.ELBO().loss(model, own, Y)
    unlucky.append("the server is busy")
    with pytest.raises(RuntimeError, match="the server is busy"):
        pplvi.ELBO().loss(model, own, Y)
    pplvi.ELBO().loss(model, own, Y)


def test_a_good_run_leaves_no_chained_exception():
    """The first run of a pair is a look-up that fails; an error in it should not show that."""
    with pytest.raises(ValueError, match="missing in the guide") as info:
        execute(model, lambda y: None, (Y,), {})
    assert info.value.__context__ is None


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("guide", [AutoNormal, pplvi.AutoPathfinder, "nuts"])
def test_supports_without_coordinates_are_named(guide):
    def model():
        pyro.sample("spread", dist.Wishart(torch.tensor(5.0), torch.eye(2)))

    with pytest.raises(ValueError, match=r"site 'spread': Cannot transform.*LKJCholesky"):
        pplvi.fit(model, guide, seed=0, progress=False)


def test_memory_that_is_refused_without_a_word_has_a_reason():
    """An empty ``MemoryError`` is what Python raises where no message fits either."""

    def large():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise MemoryError

    with pytest.raises(MemoryError, match=r"out of memory: the system gave no more\. Expected .*chunk_size="):
        pplvi.fit(large, AutoNormal, num_steps=1, progress=False)
