"""Problems with known answers, and reference values computed without pplvi.

Every problem is a Pyro model and guide inside one plate of independent replicas, so that one vectorised call gives
thousands of independent estimates: parameters have an element for each replica, hence values and gradients have error
bars. Beside the programs stands the same problem in plain torch: log densities, draws, and the states of its discrete
latents, from which :func:`expectation` computes the expected K-sample bound and its gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import comb, log

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Beta, Binomial, Normal

from pplvi.losses.base import WeightedELBO
from pplvi.objectives.step import Objective, Step

Values = dict[str, Tensor]
Getter = Callable[[str], Tensor]
REPLICAS = 20_000
SIGMAS = 4.5
WORST_ERROR_BAR = 0.05


@dataclass(frozen=True)
class Problem:
    """A model and a guide at fixed parameters, as programs and as plain torch densities."""

    name: str
    params: dict[str, float]
    model: Callable[[Getter], None]
    guide: Callable[[Getter], None]
    log_joint: Callable[[Values, Values], Tensor]
    log_guide: Callable[[Values, Values], Tensor]
    draw: Callable[[Values, tuple[int, int], Values], Values]  # reparameterised, given the discrete latents' state
    log_state: Callable[[Values, Values], Tensor] = lambda p, z: torch.zeros(())
    states: tuple[dict[str, float], ...] = ({},)
    points: Callable[[], tuple[Values, float]] | None = None  # a grid over the latent and the log volume of a cell
    depth: int = 0  # plates inside the plate of replicas
    draws_noise: bool = True  # False: all latents are discrete, and an expectation over their states is exact

    def programs(self, replicas: int) -> tuple[Callable[[], None], Callable[[], None]]:
        shape = (replicas,) + (1,) * self.depth

        def parameter(name: str) -> Tensor:
            return pyro.param(name, lambda: torch.full(shape, self.params[name]))

        def model() -> None:
            with pyro.plate("replicas", replicas, dim=-1 - self.depth):
                self.model(parameter)

        def guide() -> None:
            with pyro.plate("replicas", replicas, dim=-1 - self.depth):
                self.guide(parameter)

        return model, guide

    def plain_params(self, size: int) -> Values:
        return {name: torch.full((size,), value, requires_grad=True) for name, value in self.params.items()}


@dataclass(frozen=True)
class Estimates:
    """Independent estimates of a value and of its gradient in each parameter, each ``(replicas,)``."""

    value: Tensor
    gradients: Values

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        yield "value", self.value
        yield from self.gradients.items()


@dataclass(frozen=True)
class Drawn:
    """One weighted step of all replicas, on which any objective with the same routing can be tried."""

    step: Step
    leaves: Values

    @classmethod
    def of(cls, loss: WeightedELBO, problem: Problem, replicas: int = REPLICAS, programs: object = None) -> "Drawn":
        pyro.clear_param_store()
        (step,) = loss.steps(*(programs or problem.programs(replicas)))
        store = pyro.get_param_store()
        return cls(step, {name: pyro.param(name).unconstrained() for name in problem.params if name in store})

    def estimates(self, objective: Objective) -> Estimates:
        """Value and gradient of an objective in every replica."""
        for leaf in self.leaves.values():
            leaf.grad = None
        terms = objective(self.step)
        (self.step.scale * terms.surrogate.sum()).backward(retain_graph=True)
        gradients = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in self.leaves.items()}
        return Estimates(self.step.scale * terms.value, {n: g.flatten() for n, g in gradients.items()})


def estimate(loss: WeightedELBO, problem: Problem, replicas: int = REPLICAS, programs: object = None) -> Estimates:
    """Value and gradient of a loss in every replica, from one vectorised call."""
    return Drawn.of(loss, problem, replicas, programs).estimates(loss.objective)


def expectation(
    problem: Problem, num_particles: int, functional: Callable[[Tensor], Tensor], size: int = REPLICAS
) -> Estimates:
    """Expected functional of K log weights and its gradient: exact over discrete states, pathwise over the rest."""
    p = problem.plain_params(size if problem.draws_noise else 1)
    branches = [_branch(problem, p, num_particles, state) for state in problem.states]
    total = torch.zeros(())
    for picked in product(branches, repeat=num_particles):
        log_weight = torch.stack([branch[0][k] for k, branch in enumerate(picked)])
        log_probability = sum(branch[1][k] for k, branch in enumerate(picked))
        total = total + log_probability.exp() * functional(log_weight)
    return differentiated(total, p)


def _branch(problem: Problem, p: Values, num_particles: int, state: dict[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    shape = (num_particles, len(next(iter(p.values()))))
    z = problem.draw(p, shape, {name: torch.full(shape, value) for name, value in state.items()})
    fixed = {name: value.detach() for name, value in z.items()}
    log_weight = problem.log_joint(p, z) - problem.log_guide(p, z)
    return log_weight, problem.log_state(p, z).expand(shape), problem.log_guide(p, fixed)


def wake_phi(problem: Problem, num_particles: int, size: int = REPLICAS) -> Estimates:
    """Expected self-normalised forward KL loss of K particles, and the expected wake-phi gradient."""
    p = problem.plain_params(size if problem.draws_noise else 1)
    branches = [_branch(problem, p, num_particles, state) for state in problem.states]
    total = torch.zeros(())
    for picked in product(branches, repeat=num_particles):
        log_weight, log_state, log_guide = (
            torch.stack([branch[i][k] for k, branch in enumerate(picked)]) for i in range(3)
        )
        weight = torch.softmax(log_weight.detach(), 0)
        total = total - log_state.detach().sum(0).exp() * (weight * log_guide).sum(0)
    return differentiated(total, p)


def thermodynamic_bound(
    problem: Problem, num_particles: int, betas: tuple[float, ...], size: int = REPLICAS
) -> Estimates:
    """Expected thermodynamic objective of K particles, and the expected gradient of its self-normalised integrands.

    Each integrand is differentiated as it stands: draws and the density that they come from are held, the tempered
    density and the log weight move with the parameters.
    """
    p = problem.plain_params(size if problem.draws_noise else 1)
    branches = [_fixed_branch(problem, p, num_particles, state) for state in problem.states]
    total = torch.zeros(())
    for picked in product(branches, repeat=num_particles):
        log_joint, log_guide, log_state = (torch.stack([b[i][k] for k, b in enumerate(picked)]) for i in range(3))
        probability = log_state.sum(0).exp()
        for beta, upper in zip(betas, (*betas[1:], 1.0), strict=True):
            log_path = beta * log_joint + (1 - beta) * log_guide
            weight = (log_path - log_guide.detach()).exp()
            integrand = (weight * (log_joint - log_guide)).sum(0) / weight.sum(0)
            total = total + probability * (upper - beta) * integrand
    return differentiated(total, p)


def _fixed_branch(
    problem: Problem, p: Values, num_particles: int, state: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (num_particles, len(next(iter(p.values()))))
    z = problem.draw(p, shape, {name: torch.full(shape, value) for name, value in state.items()})
    z = {name: value.detach() for name, value in z.items()}
    log_joint, log_guide = (density(p, z).expand(shape) for density in (problem.log_joint, problem.log_guide))
    return log_joint, log_guide, problem.log_state(p, z).detach().expand(shape)


def differentiated(total: Tensor, p: Values) -> Estimates:
    gradients = torch.autograd.grad(total.sum(), list(p.values()), allow_unused=True)
    return Estimates(total.detach(), {n: torch.zeros(1) if g is None else g for n, g in zip(p, gradients, strict=True)})


def renyi(alpha: float) -> Callable[[Tensor], Tensor]:
    """The Renyi bound of log weights, in plain torch; ``alpha=1`` is the ELBO."""

    def bound(log_weight: Tensor) -> Tensor:
        if alpha == 1.0:
            return log_weight.mean(0)
        return (torch.logsumexp((1 - alpha) * log_weight, 0) - log(len(log_weight))) / (1 - alpha)

    return bound


def tempered(problem: Problem, p: Values, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log weight and log guide on the problem's grid, and the tempered density ``q w^beta``, normalised on it."""
    z, log_volume = problem.points()
    log_guide = problem.log_guide(p, z) + log_volume
    log_weight = problem.log_joint(p, z) + log_volume - log_guide
    return log_weight, log_guide - log_volume, torch.softmax(log_guide + beta * log_weight, 0)


def thermodynamic(problem: Problem, betas: tuple[float, ...]) -> Estimates:
    """The exact thermodynamic objective and its exact gradient."""
    p = problem.plain_params(1)
    total = torch.zeros(1)
    for beta, upper in zip(betas, (*betas[1:], 1.0), strict=True):
        log_weight, _, density = tempered(problem, p, beta)
        total = total + (upper - beta) * (density * log_weight).sum()
    return differentiated(total, p)


def forward_kl(problem: Problem) -> Estimates:
    """The exact ``-E_p[log q]`` under the posterior and its exact gradient in the guide's parameters."""
    p = problem.plain_params(1)
    _, log_guide, density = tempered(problem, p, 1.0)
    return differentiated(-(density.detach() * log_guide).sum().reshape(1), p)


def log_evidence(problem: Problem, p: Values) -> Tensor:
    """The exact log evidence, by quadrature or enumeration."""
    z, log_volume = problem.points()
    return torch.logsumexp(problem.log_joint(p, z) + log_volume, 0)


def error_bar(estimates: Tensor) -> float:
    return 0.0 if estimates.numel() == 1 else float(estimates.std() / estimates.numel() ** 0.5)


def check(found: Estimates, expected: Estimates, sign: float = 1.0) -> None:
    """Every value and gradient agrees within its error bar, and every error bar is at most 5 % of its quantity."""
    reference = dict(expected.rows())
    assert len(found.gradients) > 0
    for name, estimates in found.rows():
        check_one(name, estimates, sign * reference[name])


def check_one(name: str, found: Tensor, expected: Tensor) -> None:
    exact = float(expected.mean())
    bars = [error_bar(found), error_bar(expected)]
    assert max(bars) <= WORST_ERROR_BAR * abs(exact), f"{name}: error bars {bars} of {exact}"
    error = abs(float(found.mean()) - exact)
    allowed = SIGMAS * (bars[0] ** 2 + bars[1] ** 2) ** 0.5 + 1e-10
    assert error <= allowed, f"{name}: {float(found.mean())} instead of {exact}, allowed {allowed}"


# A conjugate Gaussian: posterior N(1.25, 1/2) at prior mean 0.

OBSERVED = 2.5
CONSTANT = 2.5  # brings the evidence near one: the noise of a score function without baseline grows with its logarithm
GAUSSIAN_CONSTANT = 1.2


def _log_density(mean: Tensor, observed: float, constant: float = CONSTANT) -> Tensor:
    return Normal(mean, 1.0).log_prob(torch.tensor(observed)) + constant


def _gaussian_model(p: Getter) -> None:
    z = pyro.sample("z", dist.Normal(p("prior"), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(OBSERVED))
    pyro.factor("constant", torch.tensor(GAUSSIAN_CONSTANT))


def _gaussian_guide(p: Getter) -> None:
    pyro.sample("z", dist.Normal(p("loc"), p("log_scale").exp()))


def normal_log_guide(p: Values, z: Values) -> Tensor:
    return Normal(p["loc"], p["log_scale"].exp()).log_prob(z["z"])


def normal_draw(p: Values, shape: tuple[int, int], state: Values) -> Values:
    return {"z": p["loc"] + p["log_scale"].exp() * torch.randn(shape)}


def grid(low: float, high: float) -> Callable[[], tuple[Values, float]]:
    def points() -> tuple[Values, float]:
        edges = torch.linspace(low, high, 40_001)
        return {"z": (edges[1:] + edges[:-1]) / 2}, log((high - low) / 40_000)

    return points


GAUSSIAN = Problem(
    "gaussian",
    {"prior": 0.8, "loc": 0.2, "log_scale": 0.7},
    _gaussian_model,
    _gaussian_guide,
    lambda p, z: Normal(p["prior"], 1.0).log_prob(z["z"]) + _log_density(z["z"], OBSERVED, GAUSSIAN_CONSTANT),
    normal_log_guide,
    normal_draw,
    points=grid(-15.0, 15.0),
)


def gaussian_elbo(p: Values) -> Tensor:
    """The closed form of the conjugate Gaussian's ELBO."""
    variance = (2 * p["log_scale"]).exp()
    quadratic = (p["loc"] - p["prior"]) ** 2 + (OBSERVED - p["loc"]) ** 2 + 2 * variance
    return (
        GAUSSIAN_CONSTANT
        - torch.tensor(2 * torch.pi).log()
        - quadratic / 2
        + Normal(0.0, p["log_scale"].exp()).entropy()
    )


# Two levels of Gaussians in three nested plates inside the replicas: groups, rows, columns.

TABLE = torch.tensor([[[0.3, 1.9], [1.4, 0.8], [2.2, 1.1]], [[3.6, 2.1], [2.9, 4.0], [3.1, 2.5]]], dtype=torch.float64)
GROUP_SD, NOISE_SD = 0.8, 1.5


def nested_model(p: Getter, rows: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(p("prior"), 1.0))
    with pyro.plate("groups", 2, dim=-3):
        m = pyro.sample("m", dist.Normal(mu, GROUP_SD))
        with pyro.plate("rows", 3, subsample=rows, dim=-2) as index, pyro.plate("columns", 2, dim=-1):
            pyro.sample("y", dist.Normal(m, NOISE_SD), obs=TABLE[:, index])


def nested_guide(p: Getter, rows: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(p("loc"), p("log_scale").exp()))
    with pyro.plate("groups", 2, dim=-3):
        pyro.sample("m", dist.Normal(p("offset") + p("slope") * mu, p("log_local").exp()))


def _nested_joint(p: Values, z: Values) -> Tensor:
    local = Normal(z["mu"].unsqueeze(-1), GROUP_SD).log_prob(z["m"]).sum(-1)
    data = Normal(z["m"][..., None], NOISE_SD).log_prob(TABLE.reshape(2, 6)).sum((-1, -2))
    return Normal(p["prior"], 1.0).log_prob(z["mu"]) + local + data


def _nested_log_guide(p: Values, z: Values) -> Tensor:
    mean = (p["offset"] + p["slope"] * z["mu"]).unsqueeze(-1)
    local = Normal(mean, p["log_local"].exp()[:, None]).log_prob(z["m"]).sum(-1)
    return Normal(p["loc"], p["log_scale"].exp()).log_prob(z["mu"]) + local


def _nested_draw(p: Values, shape: tuple[int, int], state: Values) -> Values:
    mu = p["loc"] + p["log_scale"].exp() * torch.randn(shape)
    noise = p["log_local"].exp()[:, None] * torch.randn(*shape, 2)
    return {"mu": mu, "m": (p["offset"] + p["slope"] * mu).unsqueeze(-1) + noise}


NESTED = Problem(
    "nested",
    {"prior": 0.8, "loc": 1.2, "log_scale": 0.2, "offset": 0.5, "slope": 0.6, "log_local": -0.1},
    nested_model,
    nested_guide,
    _nested_joint,
    _nested_log_guide,
    _nested_draw,
    depth=3,
)


def nested_elbo(p: Values) -> Tensor:
    """The closed form of the nested Gaussians' ELBO: every term is a mean and a variance."""
    scale, local = p["log_scale"].exp(), p["log_local"].exp()
    mean = p["offset"] + p["slope"] * p["loc"]
    variance = local**2 + (p["slope"] * scale) ** 2
    gap = local**2 + ((p["slope"] - 1) * scale) ** 2
    prior = Normal(p["prior"], 1.0).log_prob(p["loc"]) - scale**2 / 2
    groups = 2 * (Normal(p["loc"], GROUP_SD).log_prob(mean) - gap / (2 * GROUP_SD**2))
    data = Normal(mean, NOISE_SD).log_prob(TABLE.reshape(12, 1)).sum(0) - 12 * variance / (2 * NOISE_SD**2)
    return prior + groups + data + Normal(0.0, scale).entropy() + 2 * Normal(0.0, local).entropy()


# One latent with two modes, at -2 and 2, the right one twice as heavy.

HEAVY = 2.0 / 3.0


def _two_modes(z: Tensor, shift: Tensor) -> Tensor:
    right = log(HEAVY) + Normal(2.0 + shift, 0.5).log_prob(z)
    return torch.logaddexp(right, log(1 - HEAVY) + Normal(-2.0, 0.5).log_prob(z))


def _bimodal_model(p: Getter) -> None:
    flat = dist.Normal(0.0, 5.0)
    z = pyro.sample("z", flat.expand(p("shift").shape))
    pyro.factor("likelihood", _two_modes(z, p("shift")) - flat.log_prob(z))


BIMODAL = Problem(
    "bimodal",
    {"shift": 0.9, "loc": 1.1, "log_scale": 0.1},
    _bimodal_model,
    _gaussian_guide,
    lambda p, z: _two_modes(z["z"], p["shift"]),
    normal_log_guide,
    normal_draw,
    points=grid(-20.0, 20.0),
)


# A beta-binomial: 7 of 10, prior Beta(2, e^log_b).

TRIALS, SUCCESSES = 10, 7


def _beta_model(p: Getter) -> None:
    z = pyro.sample("z", dist.Beta(2.0, p("log_b").exp()))
    pyro.sample("y", dist.Binomial(TRIALS, z), obs=torch.tensor(float(SUCCESSES)))


def _beta_joint(p: Values, z: Values) -> Tensor:
    data = Binomial(TRIALS, z["z"]).log_prob(torch.tensor(float(SUCCESSES)))
    return Beta(torch.tensor(2.0), p["log_b"].exp()).log_prob(z["z"]) + data


BETA = Problem(
    "beta_binomial",
    {"log_b": 1.1, "log_left": 1.5, "log_right": 2.4},
    _beta_model,
    lambda p: pyro.sample("z", dist.Beta(p("log_left").exp(), p("log_right").exp())),
    _beta_joint,
    lambda p, z: Beta(p["log_left"].exp(), p["log_right"].exp()).log_prob(z["z"]),
    lambda p, shape, state: {"z": Beta(p["log_left"].exp(), p["log_right"].exp()).rsample(shape[:1])},
    points=grid(0.0, 1.0),
)


def beta_elbo(p: Values) -> Tensor:
    """The closed form of the beta-binomial's ELBO."""
    left, right, b = (p[name].exp() for name in ("log_left", "log_right", "log_b"))
    mean_log, mean_log_rest = (torch.digamma(x) - torch.digamma(left + right) for x in (left, right))
    log_beta = torch.lgamma(torch.tensor(2.0)) + torch.lgamma(b) - torch.lgamma(2 + b)
    expected = (1 + SUCCESSES) * mean_log + (b - 1 + TRIALS - SUCCESSES) * mean_log_rest
    return log(comb(TRIALS, SUCCESSES)) + expected - log_beta + Beta(left, right).entropy()


# A mixture of two product-Bernoulli components: the latent can be enumerated.

BITS = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)


def _bernoulli_model(p: Getter) -> None:
    c = pyro.sample("c", dist.Bernoulli(logits=p("prior")))
    logits = torch.where(c == 1, p("high"), p("low")).unsqueeze(-1).expand(*[-1] * max(c.dim(), 1), 3)
    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=BITS)


def _bernoulli_joint(p: Values, z: Values) -> Tensor:
    logits = torch.where(z["c"] == 1, p["high"], p["low"])
    return Bernoulli(logits=p["prior"]).log_prob(z["c"]) + sum(Bernoulli(logits=logits).log_prob(b) for b in BITS)


def _bernoulli_log_guide(p: Values, z: Values) -> Tensor:
    return Bernoulli(logits=p["logit"]).log_prob(z["c"])


BERNOULLI = Problem(
    "bernoulli_mixture",
    {"prior": 0.9, "high": 1.2, "low": -1.3, "logit": -0.9},
    _bernoulli_model,
    lambda p: pyro.sample("c", dist.Bernoulli(logits=p("logit"))),
    _bernoulli_joint,
    _bernoulli_log_guide,
    lambda p, shape, state: state,
    log_state=_bernoulli_log_guide,
    states=({"c": 0.0}, {"c": 1.0}),
    points=lambda: ({"c": torch.tensor([0.0, 1.0])}, 0.0),
    draws_noise=False,
)


# A discrete latent above a continuous one, and below one: mixed sites in a hierarchical guide.


def _mixture_model(p: Getter) -> None:
    c = pyro.sample("c", dist.Bernoulli(logits=p("prior")))
    x = pyro.sample("x", dist.Normal(3 * c - 1, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.5))
    pyro.factor("constant", torch.tensor(CONSTANT))


def _mixture_guide(p: Getter) -> None:
    c = pyro.sample("c", dist.Bernoulli(logits=p("logit")))
    pyro.sample("x", dist.Normal(p("base") + p("jump") * c, p("log_scale").exp()))


def _mixture_joint(p: Values, z: Values) -> Tensor:
    prior = Bernoulli(logits=p["prior"]).log_prob(z["c"]) + Normal(3 * z["c"] - 1, 1.0).log_prob(z["x"])
    return prior + _log_density(z["x"], 1.5)


def _mixture_log_guide(p: Values, z: Values) -> Tensor:
    return _bernoulli_log_guide(p, z) + Normal(p["base"] + p["jump"] * z["c"], p["log_scale"].exp()).log_prob(z["x"])


def _mixture_draw(p: Values, shape: tuple[int, int], state: Values) -> Values:
    return {**state, "x": p["base"] + p["jump"] * state["c"] + p["log_scale"].exp() * torch.randn(shape)}


MIXTURE = Problem(
    "discrete_above",
    {"prior": -0.4, "logit": 0.2, "base": 0.4, "jump": 0.8, "log_scale": -0.5},
    _mixture_model,
    _mixture_guide,
    _mixture_joint,
    _mixture_log_guide,
    _mixture_draw,
    log_state=_bernoulli_log_guide,
    states=({"c": 0.0}, {"c": 1.0}),
)


def _switch_model(p: Getter) -> None:
    x = pyro.sample("x", dist.Normal(p("prior"), 1.0))
    c = pyro.sample("c", dist.Bernoulli(logits=2 * x))
    pyro.sample("y", dist.Normal(x + c, 1.0), obs=torch.tensor(2.5))
    pyro.factor("constant", torch.tensor(CONSTANT))


def _switch_guide(p: Getter) -> None:
    x = pyro.sample("x", dist.Normal(p("loc"), p("log_scale").exp()))
    pyro.sample("c", dist.Bernoulli(logits=p("logit") + p("slope") * x))


def _switch_joint(p: Values, z: Values) -> Tensor:
    prior = Normal(p["prior"], 1.0).log_prob(z["x"]) + Bernoulli(logits=2 * z["x"]).log_prob(z["c"])
    return prior + _log_density(z["x"] + z["c"], 2.5)


def _switch_state(p: Values, z: Values) -> Tensor:
    return Bernoulli(logits=p["logit"] + p["slope"] * z["x"]).log_prob(z["c"])


SWITCH = Problem(
    "discrete_below",
    {"prior": 0.0, "loc": 0.2, "log_scale": 0.2, "logit": -1.5, "slope": 0.3},
    _switch_model,
    _switch_guide,
    _switch_joint,
    lambda p, z: Normal(p["loc"], p["log_scale"].exp()).log_prob(z["x"]) + _switch_state(p, z),
    lambda p, shape, state: {**state, "x": p["loc"] + p["log_scale"].exp() * torch.randn(shape)},
    log_state=_switch_state,
    states=({"c": 0.0}, {"c": 1.0}),
)

CONTINUOUS = (GAUSSIAN, NESTED, BIMODAL, BETA)
DISCRETE = (BERNOULLI, MIXTURE, SWITCH)
PROBLEMS = {problem.name: problem for problem in (*CONTINUOUS, *DISCRETE)}
ELBOS = {"gaussian": gaussian_elbo, "nested": nested_elbo, "beta_binomial": beta_elbo}
