"""Compiled steps equal eager ones, draw fresh noise, resume, and refuse what cannot be recorded."""

import gc
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import SCHOOLS, eight_schools
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from scipy.stats import ks_2samp
from torch import Tensor, nn

import pplvi.compile.backends
import pplvi.compile.svi
from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Untraceable
from pplvi.energies import RestrictedBoltzmannMachine
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.guides import AutoFlow
from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ChiELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO, own_loss
from pplvi.losses.nested import NestedELBO
from pplvi.losses.wake_sleep import ReweightedWakeSleep, WakeSleep
from pplvi.objectives.nested import FilteringBound
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.training.schedules import Cosine

SGD = partial(torch.optim.SGD, lr=0.01)
GROUPS = torch.tensor([[0.3, 1.9, 1.1], [2.2, 1.4, 0.8]])


@dataclass(frozen=True)
class Case:
    """A model shape: how its programs are made, and what they are called with."""

    make: Callable[[], tuple[Any, Any]]
    args: tuple[Any, ...] = ()
    loss: Callable[[], Any] = ELBO
    steps: int = 2


def with_guide(model: Any, guide: Any = AutoNormal, **options: Any) -> Callable[[], tuple[Any, Any]]:
    return lambda: (model, guide(model, **options))


def nested(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        m = pyro.sample("m", dist.Normal(mu, 0.8))
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("y", dist.Normal(m, 1.5), obs=y)


def subsampled(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


@config_enumerate
def mixture(y: Tensor) -> None:
    weights = pyro.param("weights", lambda: torch.tensor([0.4, 0.6]), constraint=dist.constraints.simplex)
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[..., k], 1.0), obs=y)


def visible_loc(model: Any) -> AutoNormal:
    return AutoNormal(poutine.block(model, expose=["loc"]))


def given_indices(y: Tensor, index: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20, subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def masked(y: Tensor, seen: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=seen), poutine.scale(scale=2.0):
        pyro.sample("y", dist.StudentT(4.0, mu, 1.0), obs=y)


def factors(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.factor("penalty", -(z**4).sum(-1))
    pyro.deterministic("double", 2 * z)
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def constrained(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    scale = pyro.param("scale", lambda: torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(rate * p + shares[..., 0], scale), obs=y)


def events(y: Tensor) -> None:
    covariance = pyro.sample("L", dist.LKJCholesky(2, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2)))
        pyro.sample("y", dist.MultivariateNormal(z, scale_tril=covariance), obs=y)


class Regression(PyroModule):
    """A Bayesian layer over a deterministic one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.out(self.features(x)).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def regression() -> tuple[Any, Any]:
    torch.manual_seed(3)
    model = Regression()
    return model, AutoNormal(model)


class Autoencoder:
    """Networks that reach Pyro by ``pyro.module``."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def autoencoder() -> tuple[Any, Any]:
    programs = Autoencoder()
    return programs.model, programs.guide


def only_parameters(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(()))
    scale = pyro.param("scale", lambda: torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def no_guide(*args: Any) -> None:
    """Nothing is latent."""


def chain(y: Tensor) -> None:
    """A hidden Markov model."""
    move = pyro.sample("move", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    k: Any = 0
    for t in pyro.markov(range(len(y))):
        k = pyro.sample(f"k{t}", dist.Categorical(move[..., k, :]), infer={"enumerate": "parallel"})
        pyro.sample(f"y{t}", dist.Normal(loc[..., k], 1.0), obs=y[t])


def discrete(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(2 * k, 1.0), obs=y)


def discrete_guide(y: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", lambda: torch.zeros(()))))


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        m = pyro.sample("m", dist.Normal(mu, 0.8))
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("y", dist.Normal(m, scale), obs=y)


def hierarchy_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3))
    spread = pyro.param("spread", lambda: torch.full((2, 1), 0.5), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, 0.7))
    pyro.sample("scale", dist.LogNormal(0.1, spread.mean()))  # no closed form against the gamma prior
    with pyro.plate("groups", 2, dim=-2):
        pyro.sample("m", dist.Normal(loc, spread))


DATA = torch.linspace(-1.0, 2.0, 20)
CASES = {
    "nested plates": Case(with_guide(nested), (GROUPS,)),
    "subsampling": Case(with_guide(subsampled), (DATA,)),
    "given indices": Case(with_guide(given_indices), (DATA, torch.tensor([3, 4, 11]))),
    "enumeration": Case(with_guide(mixture, visible_loc), (DATA,)),
    "hidden Markov": Case(
        with_guide(chain, lambda m: AutoNormal(poutine.block(m, expose=["move", "loc"]))), (DATA[:4],)
    ),
    "masks": Case(with_guide(masked), (DATA, DATA > 0)),
    "factors": Case(with_guide(factors), (torch.tensor(0.7),), partial(ELBO, 4)),
    "constrained supports": Case(with_guide(constrained), (DATA,), partial(ELBO, 3)),
    "batched events": Case(with_guide(events), (DATA.reshape(10, 2),)),
    "PyroModule": Case(regression, (DATA.reshape(10, 2), DATA[:10])),
    "pyro.module": Case(autoencoder, ((DATA.reshape(5, 4) > 0) * 1.0,), partial(ImportanceWeightedELBO, 5)),
    "flow": Case(with_guide(factors, AutoFlow, transforms=2, hidden_features=(8,)), (torch.tensor(0.7),)),
    "full covariance": Case(with_guide(factors, AutoMultivariateNormal), (torch.tensor(0.7),), partial(ELBO, 3)),
    "only parameters": Case(lambda: (only_parameters, no_guide), (DATA,)),
    "discrete draws": Case(lambda: (discrete, discrete_guide), (torch.tensor(1.5),), partial(ELBO, 6)),
    "point": Case(with_guide(nested, AutoDelta), (GROUPS,)),
    "sticking the landing": Case(with_guide(factors), (torch.tensor(0.7),), partial(ELBO, 4, estimator="stl")),
    "doubly reparameterised": Case(
        with_guide(factors), (torch.tensor(0.7),), partial(ImportanceWeightedELBO, 4, estimator="dreg")
    ),
    "exact entropy": Case(with_guide(nested), (GROUPS,), partial(ELBO, entropy="exact")),
    "analytic divergences": Case(with_guide(nested), (GROUPS,), partial(ELBO, entropy="kl")),
    "mean field": Case(lambda: (hierarchy, hierarchy_guide), (GROUPS,), partial(ELBO, 2, entropy="kl")),
    "Renyi": Case(with_guide(factors), (torch.tensor(0.7),), partial(RenyiELBO, 0.5, 4)),
    "chi": Case(with_guide(factors), (torch.tensor(0.7),), partial(ChiELBO, 4)),
    "thermodynamic": Case(with_guide(factors), (torch.tensor(0.7),), partial(ThermodynamicELBO, 4)),
    "forward KL": Case(with_guide(factors), (torch.tensor(0.7),), partial(ForwardKL, 4)),
    "particles one by one": Case(with_guide(nested), (GROUPS,), partial(ELBO, 2, vectorize_particles=False)),
    "sum of losses": Case(with_guide(factors), (torch.tensor(0.7),), lambda: ELBO(2) + 0.5 * ForwardKL(4)),
}


def ring(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(z.square().sum(-1), scale), obs=y)


def around() -> Any:
    def base(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    return base


def local(y: Tensor, loc: float = 0.0) -> None:
    with pyro.plate("data", 20, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        if loc == 0.0:
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def annealed(model: Any, base: Any, kernel: Any, **options: Any) -> Callable[[], tuple[Any, Any]]:
    return lambda: (model, AnnealedGuide(model, base, 2, kernel, **options))


def own_path() -> tuple[Any, Any]:
    def target(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("middle", lambda: torch.zeros(())), 1.5))
        pyro.factor("mass", torch.tensor(0.5))

    def start(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 2.0))

    def kernel(name: str) -> Any:
        def moved(previous: dict[str, Tensor], y: Tensor) -> None:
            factor = pyro.param(name, lambda: torch.tensor(0.8))
            pyro.sample("z", dist.Normal(factor * previous["z"], 0.9))

        return moved

    def final(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    return final, NestedGuide(start, [(target, kernel("a"), kernel("b")), (final, kernel("c"), kernel("d"))])


def dreamer(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(pyro.param("prior", lambda: torch.tensor(0.3)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def recogniser(y: Tensor) -> None:
    slope, width = pyro.param("slope", lambda: torch.tensor(0.3)), pyro.param("width", lambda: torch.tensor(-0.2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(slope * y, width.exp()))


RESIDUAL, POINT = ResidualKernel(hidden=4, covariance=0.3), (torch.tensor(1.5),)
LEARNED = annealed(ring, around(), RESIDUAL, learn_path=True)
CASES |= {
    "nested, reverse KL": Case(LEARNED, POINT, partial(NestedELBO, "reverse_kl", 6)),
    "nested, resampled": Case(LEARNED, POINT, partial(NestedELBO, "reverse_kl", 6, resample=True)),
    "nested, adaptively resampled": Case(
        LEARNED, POINT, partial(NestedELBO, "reverse_kl", 6, resample=0.7, scheme="stratified")
    ),
    "nested, forward KL": Case(LEARNED, POINT, partial(NestedELBO, ("forward_kl", "reverse_kl"), 6)),
    "nested, variational": Case(LEARNED, POINT, partial(NestedELBO, "avo", 6)),
    "nested, local latents": Case(
        annealed(local, partial(local, loc=1.0), RESIDUAL), (DATA,), partial(NestedELBO, "reverse_kl", 4, resample=True)
    ),
    "nested, own programs": Case(own_path, POINT, partial(NestedELBO, "reverse_kl", 6)),
    "nested, Langevin": Case(
        annealed(ring, around(), LangevinKernel(step_size=0.05)), POINT, partial(NestedELBO, "reverse_kl", 6)
    ),
    "nested, invariant moves": Case(
        annealed(ring, around(), HamiltonianKernel(0.1, 3), learn_path=True),
        POINT,
        partial(NestedELBO, "reverse_kl", 6),
        steps=1,  # the move after the last level is not part of the loss, and a recorded step does not draw it
    ),
    "filtering": Case(
        LEARNED, POINT, lambda: WeightedELBO(FilteringBound(), Annealed(Resampling(True)), num_particles=6)
    ),
    "wake-sleep": Case(lambda: (dreamer, recogniser), (DATA,), WakeSleep),
    "reweighted wake-sleep": Case(lambda: (dreamer, recogniser), (DATA,), partial(ReweightedWakeSleep, 4)),
    "extended space": Case(LEARNED, POINT, partial(ELBO, 4)),
}


def in_dtype(args: tuple[Any, ...]) -> tuple[Any, ...]:
    kind = torch.get_default_dtype()
    return tuple(x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def stepper(case: Case, mode: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """Fresh programs with fresh parameters, always the same ones."""
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    (model, guide), args = case.make(), in_dtype(case.args)
    case.loss().loss(model, guide, *args)  # parameters exist
    pyro.set_rng_seed(11)
    if mode == "SVI":
        return SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), case.loss()), args
    return CompiledSVI(model, guide, SGD, case.loss(), mode=mode, **options), args


def trajectory(case: Case, mode: Any) -> tuple[list[float], dict[str, Tensor]]:
    svi, args = stepper(case, mode)
    losses = [svi.step(*args) for _ in range(case.steps)]
    return losses, {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


def assert_same(ours: Any, theirs: Any) -> None:
    tolerance = 1e-6 if torch.get_default_dtype() == torch.float32 else 1e-12
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_traced_steps_equal_eager_ones(name, dtype):
    """Same parameters and same noise: the same losses and, with SGD, the same gradients, for two steps."""
    torch.set_default_dtype(dtype)
    try:
        assert_same(trajectory(CASES[name], "trace"), trajectory(CASES[name], "SVI"))
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------- inductor


@pytest.fixture
def inductor_noise():
    """Let inductor draw torch's own random numbers, so that its steps can be compared with eager ones."""
    with torch._inductor.config.patch(fallback_random=True):
        yield


SHAPES = {
    "nested plates",
    "subsampling",
    "enumeration",
    "masks",
    "factors",
    "constrained supports",
    "batched events",
    "PyroModule",
    "flow",
    "only parameters",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in sorted(SHAPES) for dtype in (torch.float32, torch.float64)),
        ("nested, own programs", torch.float64),
        ("mean field", torch.float64),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_compiled_steps_equal_eager_ones(name, dtype, inductor_noise):
    """The ten shapes of models in both dtypes, level by level, and with analytic divergences, through inductor."""
    torch.set_default_dtype(dtype)
    try:
        assert_same(trajectory(CASES[name], True), trajectory(CASES[name], "SVI"))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_looped_steps_equal_eager_ones(inductor_noise):
    """A loop of compiled steps on one call and on minibatches, with a schedule and a clip."""
    case = Case(with_guide(masked), (DATA, DATA > 0))
    batches = [(DATA + i, DATA > 0) for i in range(5)]

    def train(mode: Any) -> tuple[Tensor, Tensor]:
        svi, args = stepper(case, mode, schedule=Cosine(12), clip="adaptive", chunk=3)
        losses = torch.cat([svi.run(5, *args), svi.epoch(batches)])
        return losses, svi.parameters.flat.clone()

    torch.testing.assert_close(train("max"), train(False), rtol=1e-5, atol=1e-6)


def schools(mode: Any, lr: float = 1e-3, seed: int = 3, **options: Any) -> CompiledSVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = AutoNormal(eight_schools)
    guide(*SCHOOLS)
    svi = CompiledSVI(eight_schools, guide, partial(torch.optim.SGD, lr=lr), ELBO(), mode=mode, **options)
    svi.run(0, *SCHOOLS)
    pyro.set_rng_seed(seed)
    return svi


MODES = ["trace", pytest.param(True, marks=pytest.mark.slow), pytest.param("max", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES)
def test_noise_is_fresh_and_follows_the_seed(mode):
    """The losses of all steps differ; one seed gives one run; another seed another."""
    losses = schools(mode).run(250, *SCHOOLS)
    assert losses.unique().numel() == 250
    torch.testing.assert_close(schools(mode).run(250, *SCHOOLS), losses, rtol=0, atol=0)
    assert not torch.isclose(schools(mode, seed=4).run(250, *SCHOOLS), losses).any()


def at_fixed_parameters(mode: Any, first: int, count: int, scale: float = 1.0) -> Tensor:
    """Losses and gradients of single steps, a seed each, all from the same parameters: ``(count, 1 + parameters)``."""
    svi = schools(mode)
    with torch.no_grad():
        svi.parameters.flat += 0.05 * torch.linspace(-1.0, 1.0, svi.parameters.flat.numel())
        svi.parameters.flat[-1] += math.log(scale)
    start, found = svi.parameters.flat.clone(), []
    for seed in range(first, first + count):
        svi.parameters.flat.copy_(start)
        pyro.set_rng_seed(seed)
        loss = svi.step(*SCHOOLS)
        found.append(torch.cat([torch.tensor([loss]), (start - svi.parameters.flat) / 1e-3]))
    return torch.stack(found)


def least_p_value(ours: Tensor, theirs: Tensor) -> float:
    """Of the two-sample tests of Kolmogorov and Smirnov, one for the loss and one for each entry of the gradient,
    corrected for their number."""
    pairs = zip(ours.T.tolist(), theirs.T.tolist(), strict=True)
    return len(ours.T) * min(float(ks_2samp(a, b).pvalue) for a, b in pairs)


@pytest.mark.parametrize("mode", ["trace", pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_distributed_as_eager_ones(mode):
    """Over 600 seeds each; guides that are 40% too wide at one site would be noticed."""
    eager = at_fixed_parameters(False, 1000, 600)
    assert least_p_value(at_fixed_parameters(mode, 5000, 600), eager) > 0.01
    assert least_p_value(at_fixed_parameters(mode, 5000, 600, scale=1.4), eager) < 1e-6


@pytest.mark.slow
def test_losses_of_a_loop_are_distributed_as_eager_ones():
    """A small step size: all steps of a call are taken at the same parameters, nearly."""

    def losses(mode: Any, seed: int) -> list[float]:
        return schools(mode, lr=1e-9, seed=seed).run(1000, *SCHOOLS).tolist()

    assert ks_2samp(losses("max", 7), losses("trace", 8)).pvalue > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(mode):
    def start() -> CompiledSVI:
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        optim = partial(torch.optim.SGD, lr=1e-3)
        options = {"mode": mode, "schedule": Cosine(60)}
        return CompiledSVI(eight_schools, AutoNormal(eight_schools), optim, ELBO(), **options)

    whole = start()
    losses = whole.run(60, *SCHOOLS)
    first = start()
    early = first.run(20, *SCHOOLS)
    state = first.state_dict()
    pyro.set_rng_seed(99)
    second = start()
    second.load_state_dict(state)
    late = second.run(40, *SCHOOLS)
    torch.testing.assert_close(torch.cat([early, late]), losses, rtol=0, atol=0)
    torch.testing.assert_close(second.parameters.flat, whole.parameters.flat, rtol=0, atol=0)


def test_a_state_of_another_model_is_refused():
    state = schools("trace").state_dict()
    svi, args = stepper(CASES["nested plates"], "trace")
    svi.load_state_dict(state)
    with pytest.raises(ValueError, match="the state has the parameters"):
        svi.step(*args)
    with pytest.raises(ValueError, match="before the first step"):
        stepper(CASES["nested plates"], "trace")[0].state_dict()


@pytest.mark.slow
def test_restarts_share_one_compiled_program():
    """The second restart records its own graph and finds the program that was compiled for the first."""
    schools(True).step(*SCHOOLS)
    known = len(pplvi.compile.backends._PROGRAMS)
    first = schools(True, seed=3).run(3, *SCHOOLS)
    second = schools(True, seed=4).run(3, *SCHOOLS)
    assert len(pplvi.compile.backends._PROGRAMS) == known
    assert not torch.isclose(first, second).any()


SPREAD = dist.Normal(torch.zeros(3), 2.0)  # its scale is one number, expanded


def expanded_model() -> None:
    pyro.factor("target", SPREAD.log_prob(pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)).sum(-1))


def test_constants_that_are_expanded_keep_their_layout():
    guide = AutoNormal(expanded_model)
    svi = CompiledSVI(expanded_model, guide, SGD, ELBO(num_particles=2000), mode=True)
    assert svi.step() == pytest.approx(svi.evaluate_loss(), abs=0.3)


@pytest.mark.parametrize("mode", [True, "max"])
def test_other_processes_find_the_program_on_the_disk(mode, monkeypatch):
    """What a process does that has compiled nothing yet: it records the graph, and needs no compilation."""
    before = schools(mode).run(3, *SCHOOLS)
    monkeypatch.setattr(pplvi.compile.backends, "_PROGRAMS", OrderedDict())
    monkeypatch.setattr(torch._inductor, "compile", None)
    assert torch.equal(schools(mode).run(3, *SCHOOLS), before)
    assert len(pplvi.compile.backends._PROGRAMS) == 1


def test_programs_are_told_apart_by_graph_and_settings(monkeypatch):
    names = [pplvi.compile.backends._key("step", "x + 1"), pplvi.compile.backends._key("step", "x + 2")]
    with torch._inductor.config.patch(fallback_random=True):
        names.append(pplvi.compile.backends._key("step", "x + 1"))
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    names.append(pplvi.compile.backends._key("step", "x + 1"))
    assert len(set(names)) == 4


def test_tracing_and_compiling_leave_the_garbage_collector_as_it_was():
    with pplvi.compile.backends.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


# ---------------------------------------------------------------------- what Pyro sees


def test_parameters_are_in_the_store_for_everyone():
    svi = schools("trace", lr=0.01)
    guide = svi.guide
    svi.run(200, *SCHOOLS)
    unconstrained = dict(pyro.get_param_store().named_parameters())
    assert unconstrained["AutoNormal.locs.mu"].data_ptr() == svi.parameters.named["AutoNormal.locs.mu"].data_ptr()
    assert guide.median(*SCHOOLS)["mu"] == unconstrained["AutoNormal.locs.mu"]
    assert guide.median(*SCHOOLS)["mu"] > 0.5
    draws = Predictive(eight_schools, guide=guide, num_samples=200)(torch.zeros(8), SCHOOLS[1])
    torch.testing.assert_close(draws["mu"].mean(), guide.median(*SCHOOLS)["mu"].detach(), rtol=0.2, atol=0.2)
    saved = pyro.get_param_store().get_state()
    assert torch.equal(saved["params"]["AutoNormal.locs.mu"], svi.parameters.named["AutoNormal.locs.mu"])


def test_svi_and_compiled_steps_mix():
    svi = schools("trace", lr=0.01)
    svi.run(3, *SCHOOLS)
    before = svi.parameters.flat.clone()
    SVI(eight_schools, svi.guide, pyro.optim.Adam({"lr": 0.1}), ELBO()).step(*SCHOOLS)
    assert ((svi.parameters.flat - before).abs() > 0.05).all()
    with torch.no_grad():
        svi.parameters.named["AutoNormal.locs.mu"].data = torch.tensor(100.0)
    assert svi.step(*SCHOOLS) > 500


def test_networks_of_pyro_module_are_trained_in_place():
    svi, args = stepper(CASES["pyro.module"], "trace")
    encoder = svi.guide.__self__.encoder
    before = encoder.weight.detach().clone()
    svi.run(2, *args)
    assert (encoder.weight != before).any()
    assert encoder.weight.data_ptr() == svi.parameters.named["encoder$$$weight"].data_ptr()


class Normalised(nn.Module):
    """A model with buffers that each step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> None:
        pyro.module("norm", self.norm)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.norm(x), 1.0).to_event(1), obs=x)


class Persistent(nn.Module):
    """A loss' own state: draws that every step moves on, in place and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chains", torch.zeros(3, 2))

    def model(self, x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.ones(()), constraint=dist.constraints.positive)
        with torch.no_grad():
            self.chains[:2].copy_(0.5 * self.chains[:2] + scale * torch.randn(2, 2))
            self.chains[2] += 1.0
        pyro.factor("energy", -(scale * self.chains.cos()).sum() - scale**2)


def machine() -> tuple[Any, Any]:
    rbm = RestrictedBoltzmannMachine(2, 3)
    return rbm.model, rbm.guide


STATEFUL = {
    "batch normalisation": Case(lambda: (Normalised(), no_guide), (DATA.reshape(10, 2),)),
    "chains": Case(lambda: (Persistent().model, no_guide), (DATA.reshape(10, 2),)),
    "Boltzmann machine": Case(
        machine, ((DATA.reshape(10, 2) > 0) * 1.0,), partial(BoltzmannELBO, num_chains=5, sweeps=1)
    ),
}


def stateful(name: str, mode: Any, steps: int = 3) -> tuple[CompiledSVI, Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    case = STATEFUL[name]
    svi = CompiledSVI(*case.make(), SGD, case.loss(), mode=mode, chunk=4)
    return svi, svi.run(steps, *case.args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATEFUL)
def test_buffers_change_once_a_step(name, mode, inductor_noise):
    """Recording and inspecting leave them alone, each step moves them on, also inside the loop."""
    (ours, losses), (theirs, expected) = (stateful(name, m, 6) for m in (mode, False))
    fresh = stateful(name, False, 0)[0].buffers().values()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert ours.buffers().keys() == theirs.buffers().keys()
    for key, buffer in ours.buffers().items():
        torch.testing.assert_close(buffer, theirs.buffers()[key])
    assert any((buffer != old).any() for buffer, old in zip(ours.buffers().values(), fresh, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATEFUL)
def test_buffers_are_saved_and_resumed(name, mode):
    whole, losses = stateful(name, mode, 8)
    first, early = stateful(name, mode, 4)
    state = first.state_dict()
    second, _ = stateful(name, mode, 2)
    second.load_state_dict(state)
    late = second.run(4, *STATEFUL[name].args)
    assert torch.equal(torch.cat([early, late]), losses)
    for key, buffer in second.buffers().items():
        assert torch.equal(buffer, whole.buffers()[key])


def test_buffers_of_programs_that_are_no_modules():
    """A class with networks, and a function that closes over one."""
    norm = nn.BatchNorm1d(4)

    class Programs(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.BatchNorm1d(4), self.encoder)

    def closing(x: Tensor) -> None:
        pyro.module("norm", norm)
        pyro.factor("f", -(norm(x) ** 2).sum() * 0.1)

    x = CASES["pyro.module"].args[0]
    for model, guide in ((Programs().model, Programs().guide), (closing, no_guide)):
        pyro.clear_param_store()
        svi = CompiledSVI(model, guide, SGD, ELBO(), mode="trace")
        svi.run(3, x)
        counts = [b for name, b in svi.state_dict()["buffers"].items() if name.endswith("num_batches_tracked")]
        assert max(counts) == 3


class Replacing(Persistent):
    """Its step puts a new tensor in the place of a buffer."""

    def model(self, x: Tensor) -> None:
        self.chains = self.chains + 1.0
        pyro.factor("energy", -(pyro.param("p", lambda: torch.ones(())) * self.chains).sum())


def test_buffers_that_are_replaced_are_refused():
    svi = CompiledSVI(Replacing().model, no_guide, SGD, ELBO(), mode="trace")
    with pytest.raises(Untraceable, match=r"the buffers \['model.chains'\].*buffer.copy_"):
        svi.run(3, DATA)


# ---------------------------------------------------------------------- batches


def count_traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    record = pplvi.compile.svi.record
    monkeypatch.setattr(pplvi.compile.svi, "record", lambda *a: made.append(1) or record(*a))
    return made


def data_model(y: Tensor, scale: float = 1.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 20, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


@pytest.mark.parametrize(("policy", "losses", "graphs"), [("compile", 3, 2), ("drop", 2, 1), ("pad", 3, 1)])
def test_a_short_last_batch(policy, losses, graphs, monkeypatch):
    made = count_traces(monkeypatch)
    svi = CompiledSVI(data_model, AutoNormal(data_model), SGD, ELBO(), mode="trace", last_batch=policy)
    for _ in range(2):
        assert len(svi.epoch(DATA.split(8))) == losses
    assert len(made) == graphs


def test_recorded_anew_only_for_new_shapes_and_values(monkeypatch):
    made = count_traces(monkeypatch)
    svi = CompiledSVI(data_model, AutoNormal(data_model), SGD, ELBO(), mode="trace")
    for y in (DATA, DATA + 1, DATA * 2):
        svi.step(y)
    assert len(made) == 1
    svi.step(DATA[:5])
    svi.step(DATA, 2.0)
    svi.step(DATA, scale=2.0)
    svi.step(DATA, 2.0)
    assert len(made) == 4
    svi.step(DATA.repeat_interleave(2)[::2])
    assert len(made) == 5, "compiled programs read memory at fixed strides"
    with pytest.warns(UserWarning, match="programs were made"):
        svi.epoch(DATA[:n] for n in range(6, 12))


def numpy_model(y: np.ndarray) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((mu - float(y.mean())) ** 2))


def test_arrays_are_told_apart_by_their_values():
    svi = CompiledSVI(numpy_model, AutoNormal(numpy_model), partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    y = np.zeros(5000)
    near = svi.step(y)
    y[2500] = 5e6
    assert svi.step(y) > near + 1e4


def test_data_change_what_a_recorded_step_sees():
    svi = CompiledSVI(data_model, AutoNormal(data_model), partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    assert svi.step(DATA + 100) > svi.step(DATA) + 1000


def test_subsampled_indices_are_drawn_at_every_step():
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", 20, subsample_size=1) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    svi = CompiledSVI(model, no_guide, partial(torch.optim.SGD, lr=0.0), ELBO(), mode="trace")
    assert svi.run(200, torch.arange(20.0)).unique().numel() == 20


# ---------------------------------------------------------------------- what cannot be recorded


def branch_on_draw(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=y)


def branch_on_parameter(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.tensor(1.0))
    z = pyro.sample("z", dist.Normal(p if p > 0 else -p, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def branch_on_data(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0 if float(y.max()) > 1 else 2.0), obs=y.sum())


def list_of_draws(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(sum(z.tolist()), 1.0), obs=y.sum())


def array_of_parameter(y: Tensor) -> None:
    p = pyro.param("p", lambda: torch.tensor(1.0))
    z = pyro.sample("z", dist.Normal(float(p.detach().numpy()), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y.sum())


def boolean_index(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    seen = y[y > 0]
    with pyro.plate("data", len(seen)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=seen)


def python_random(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z + np.random.normal(), 1.0), obs=y.sum())


def unsupported(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    values = torch.sparse_coo_tensor([[0]], z.reshape(1), (1,))
    pyro.sample("y", dist.Normal(values.to_dense().sum(), 1.0), obs=y.sum())


REFUSED = {
    "draw": (branch_on_draw, "site 'z'", "a Python value taken from a tensor"),
    "parameter": (branch_on_parameter, "site 'z'", "a Python value taken from a tensor"),
    "data": (branch_on_data, "site 'z'", "a Python value taken from a tensor"),
    "list": (list_of_draws, "site 'z'", "a Python value taken from a tensor"),
    "array": (array_of_parameter, "site 'z'", "a Python value taken from a tensor"),
    "shape": (boolean_index, "site 'z'", "a shape that depends on the data"),
    "generator": (python_random, "site 'y'", "numbers from Python's or NumPy's random generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_untraceable_models_are_refused_and_left_alone(name):
    model, site, reason = REFUSED[name]
    guide = AutoNormal(poutine.block(model, expose=["z"]))
    y = torch.tensor(0.5) if name in ("draw", "parameter") else DATA
    svi = CompiledSVI(model, guide, SGD, ELBO(), mode="trace")
    svi.run(0, y)
    before, rng = svi.parameters.flat.clone(), torch.get_rng_state()
    with pytest.raises(Untraceable, match=f"{site} it met {reason}.*use torch.where"):
        svi.step(y)
    assert torch.equal(svi.parameters.flat, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert pyro.infer.util.is_validation_enabled()


@pytest.mark.parametrize("name", ["draw", "shape"])
def test_auto_falls_back_to_handlers_with_one_warning(name):
    model = REFUSED[name][0]
    y = torch.tensor(0.5) if name == "draw" else DATA
    pyro.set_rng_seed(4)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), ELBO(), mode="auto")
    with pytest.warns(UserWarning, match="falls back to Pyro's handlers"):
        first = svi.run(50, y)
    assert svi.mode is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert svi.run(50, y).mean() < first.mean()


def test_constants_may_be_read():
    """Values of closures, and masks that follow from them, do not change from step to step."""
    y = DATA.clone()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(float(y.mean()), 1.0))
        seen = y[y > 0]
        with pyro.plate("data", len(seen)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=seen)

    case = Case(with_guide(model))
    assert_same(trajectory(case, "trace"), trajectory(case, "SVI"))


def test_a_machine_without_a_compiler():
    def broken() -> Any:
        return torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})

    model = nested
    options = {"guide": AutoNormal(model), "optim": SGD, "loss": ELBO(3)}
    import torch._inductor.cpp_builder as builder

    builder.get_cpp_compiler.cache_clear() if hasattr(builder.get_cpp_compiler, "cache_clear") else None
    with broken(), pytest.raises(ValueError, match=r"no working C\+\+ compiler.*compile='trace'"):
        CompiledSVI(model, **options).step(GROUPS)
    svi = CompiledSVI(model, **options, mode="auto")
    with broken(), pytest.warns(UserWarning, match="the graph without a compiler"):
        svi.step(GROUPS)
    assert svi.mode == "trace"


def test_options_are_checked():
    guide = AutoNormal(nested)
    for options, message in (
        ({"mode": "fast"}, "mode='fast'"),
        ({"last_batch": "keep"}, "last_batch='keep'"),
        ({"chunk": 0}, "chunk=0"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            CompiledSVI(nested, guide, SGD, ELBO(), **options)


def test_parameters_that_appear_late_are_refused_without_a_graph():
    steps = []

    def model(y: Tensor) -> None:
        steps.append(1)
        z = pyro.sample("z", dist.Normal(pyro.param(f"p{len(steps) // 9}", lambda: torch.zeros(())), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi = CompiledSVI(model, AutoNormal(model), SGD, ELBO(), mode=False)
    with pytest.raises(ValueError, match="appeared, or were replaced"):
        svi.run(20, torch.tensor(0.0))


# ---------------------------------------------------------------------- Pyro's losses


@pytest.mark.parametrize("name", ["nested plates", "subsampling", "masks", "constrained supports", "pyro.module"])
def test_trace_elbo_is_ours(name):
    case = CASES[name]
    ours = Case(case.make, case.args, Trace_ELBO)
    assert_same(trajectory(ours, "trace"), trajectory(ours, "SVI"))


@pytest.mark.parametrize("name", ["enumeration", "hidden Markov"])
def test_trace_enum_elbo_is_ours(name):
    case = CASES[name]
    ours = Case(case.make, case.args, partial(TraceEnum_ELBO, max_plate_nesting=1))
    assert_same(trajectory(ours, "trace"), trajectory(ours, "SVI"))


def test_particles_of_pyro_losses():
    loss = own_loss(Trace_ELBO(num_particles=7, vectorize_particles=True))
    assert (loss.num_particles, loss.vectorize_particles) == (7, True)


@pytest.mark.parametrize("name", ["mean field", "pyro.module"])
def test_trace_mean_field_elbo_is_ours(name):
    case = CASES[name]
    for count in (1, 3):
        loss = partial(TraceMeanField_ELBO, count, vectorize_particles=True, max_plate_nesting=2)
        ours = Case(case.make, case.args, loss)
        assert_same(trajectory(ours, "trace"), trajectory(ours, "SVI"))


class Mine(Trace_ELBO):
    """A subclass may change anything."""


OTHERS = [
    TraceGraph_ELBO(),
    Mine(),
    pyro.infer.JitTrace_ELBO(),
    pyro.infer.RenyiELBO(),
]


@pytest.mark.parametrize("loss", OTHERS, ids=lambda loss: type(loss).__name__)
def test_other_losses_are_refused(loss):
    with pytest.raises(ValueError, match=f"{type(loss).__name__} branches on values"):
        CompiledSVI(nested, AutoNormal(nested), SGD, loss)


def test_a_bad_site_is_named():
    svi = schools("trace", lr=0.01)
    svi.step(*SCHOOLS)
    assert svi.first_bad_site(*SCHOOLS) is None
    with torch.no_grad():
        svi.parameters.named["AutoNormal.locs.tau"].fill_(torch.nan)
    assert svi.first_bad_site(*SCHOOLS) == "tau_unconstrained"
    assert torch.isnan(svi.run(3, *SCHOOLS)).all()
