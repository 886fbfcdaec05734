"""Programs of every shape that a step may have, and how the tests of compiled steps train them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from benchmarks.speed_problems import SCHOOLS, eight_schools
from pplvi.compile.svi import CompiledSVI
from pplvi.guides import AutoFlow
from pplvi.guides.annealed import AnnealedGuide, NestedGuide
from pplvi.kernels.hamiltonian import HamiltonianKernel
from pplvi.kernels.langevin import LangevinKernel
from pplvi.kernels.residual import ResidualKernel
from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ChiELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO
from pplvi.losses.nested import NestedELBO
from pplvi.losses.wake_sleep import ReweightedWakeSleep, WakeSleep
from pplvi.objectives.f_divergences import NestedDivergence
from pplvi.objectives.nested import FilteringBound
from pplvi.samplers.annealed import Annealed, Resampling
from pplvi.weights.rejection import Rejection

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
    "flow": Case(with_guide(factors, AutoFlow, flow="nsf", transforms=2, hidden_features=(8,)), (torch.tensor(0.7),)),
    "small flow": Case(
        with_guide(factors, AutoFlow, flow="nsf", transforms=1, hidden_features=(4,)), (torch.tensor(0.7),)
    ),
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


def chi_square(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() ** 2


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
    "nested, Jensen-Shannon, rejected": Case(
        LEARNED, POINT, partial(NestedELBO, "jensen_shannon", 6, resample=True, rejection=Rejection(2))
    ),
    "nested, by scores": Case(own_path, POINT, partial(NestedELBO, NestedDivergence(chi_square, estimator="score"), 6)),
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

# What stands for all of them where a case takes seconds.
SHAPES = {
    "nested plates",
    "subsampling",
    "enumeration",
    "masks",
    "factors",
    "constrained supports",
    "batched events",
    "PyroModule",
    "small flow",
    "only parameters",
}


def with_gradient(log_density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A log density of rows and its gradient, detached, as a function that can be recorded."""

    def both(z: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = log_density(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return both
