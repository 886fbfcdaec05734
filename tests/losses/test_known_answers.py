"""Objectives x guides on problems with known answers, and proof that a wrong sign or weight would be seen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import known
import pyro
import pytest
import torch
from known import BERNOULLI, BETA, BIMODAL, CONTINUOUS, DISCRETE, GAUSSIAN, NESTED, Estimates, Problem
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.optim import Adam
from torch.distributions import Beta, Binomial, Normal

from pplvi.guides import AutoFlow
from pplvi.losses.base import WeightedELBO
from pplvi.losses.elbo import ELBO, ChiELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO
from pplvi.objectives.step import Objective, Routing, Step, Terms

pytestmark = pytest.mark.usefixtures("float64")

MULTI = {"dreg": CONTINUOUS, None: (*CONTINUOUS, *DISCRETE), "vimco": DISCRETE}
DETACHED = (ForwardKL, ThermodynamicELBO)  # they differentiate no draw, hence need no score function
SCORED = (GAUSSIAN, *DISCRETE)  # elsewhere the noise of a plain score function is beyond 5 %


def _rows() -> list[tuple[Problem, WeightedELBO]]:
    rows = [(p, ELBO(3)) for p in (*CONTINUOUS, *DISCRETE)]
    rows += [(p, ELBO(3, "exact")) for p in (GAUSSIAN, NESTED, BETA, *DISCRETE)]
    rows += [(p, ELBO(3, estimator=e)) for p in CONTINUOUS for e in ("reparam", "stl")]
    rows += [(p, ELBO(3, estimator="vimco")) for p in (GAUSSIAN, NESTED, *DISCRETE)]
    for estimator, problems in MULTI.items():
        rows += [(p, ImportanceWeightedELBO(3, estimator=estimator)) for p in problems]
        rows += [(p, RenyiELBO(0.5, 3, estimator=estimator)) for p in problems]
        rows += [(p, ChiELBO(3, estimator=estimator)) for p in problems]
    rows += [(p, ForwardKL(3)) for p in (*CONTINUOUS, *DISCRETE)]
    rows += [(p, ThermodynamicELBO(3, betas)) for p in (*CONTINUOUS, *DISCRETE) for betas in ((0.0,), (0.0, 0.2, 0.5))]
    for problem in SCORED:
        rows += [(problem, ELBO(2, estimator="score")), (problem, ImportanceWeightedELBO(2, estimator="score"))]
        rows += [(problem, RenyiELBO(0.5, 2, estimator="score")), (problem, ChiELBO(2, estimator="score"))]
    return rows


ROWS = _rows()


@cache
def expected_bound(name: str, num_particles: int, alpha: float) -> Estimates:
    problem = known.PROBLEMS[name]
    if alpha == 1.0 and name in known.ELBOS:
        p = problem.plain_params(1)
        return known.differentiated(known.ELBOS[name](p), p)
    if alpha == 1.0 and problem.points:
        return known.thermodynamic(problem, (0.0,))
    return known.expectation(problem, num_particles, known.renyi(alpha), size=30_000)


@cache
def expected_wake(name: str, num_particles: int) -> Estimates:
    return known.wake_phi(known.PROBLEMS[name], num_particles, size=30_000)


@cache
def expected_integral(name: str, num_particles: int, betas: tuple[float, ...]) -> Estimates:
    return known.thermodynamic_bound(known.PROBLEMS[name], num_particles, betas, size=30_000)


def reference(problem: Problem, loss: WeightedELBO) -> tuple[Estimates, float]:
    """The right answer to a row, and the sign with which it enters the loss."""
    torch.manual_seed(1)
    if isinstance(loss, ForwardKL):
        return expected_wake(problem.name, loss.num_particles), 1.0
    if isinstance(loss, ThermodynamicELBO):
        return expected_integral(problem.name, loss.num_particles, loss.objective.betas), -1.0
    alpha = loss.objective.alpha
    count = 1 if alpha == 1.0 else loss.num_particles
    return expected_bound(problem.name, count, alpha), 1.0 if alpha < 0 else -1.0


REPLICAS = (6_000, 25_000, 100_000)


@dataclass(frozen=True)
class Corrupted(Objective):
    """An objective that sees one wrong sign or one wrong weight."""

    right: Objective
    fault: str

    @property
    def routing(self) -> Routing:
        return self.right.routing

    def __call__(self, step: Step) -> Terms:
        if self.fault == "sign of the gradient":
            value, surrogate = self.right(step)
            return Terms(value, -surrogate)
        return self.right(FAULTS[self.fault](step))


def _flip_guide(step: Step) -> Step:
    return replace(step, log_forward=-step.log_forward, log_weight=step.log_target.detach() + step.log_forward.detach())


def _flip_score(step: Step) -> Step:
    return replace(step, log_score=-step.log_score, score=None if step.score is None else -step.score)


def _heavier(step: Step) -> Step:
    extra = torch.zeros_like(step.log_weight)
    extra[0] = 5.0
    return replace(step, log_target=step.log_target + extra, log_weight=step.log_weight + extra)


def _steeper(step: Step) -> Step:
    """One particle counts twice in the gradient, but not in the value."""
    extra = torch.zeros_like(step.log_weight)
    extra[0] = 1.0
    twice = {
        name: value + extra * (value - value.detach())
        for name in ("log_target", "log_target_fixed", "log_forward", "log_score")
        if (value := getattr(step, name)) is not None
    }
    return replace(step, **twice)


FAULTS = {
    "sign of log q": _flip_guide,
    "sign of the score": _flip_score,
    "weight of one particle": _heavier,
    "gradient of one particle": _steeper,
    "sign of the gradient": None,
}


def name_of(value: object) -> str:
    return value.name if isinstance(value, Problem) else repr(value).replace("num_particles=", "")


RIGHT = "right"


def _tried() -> Iterator[tuple[int, str]]:
    """Every row as it is, then with every third of the faults that the rows can have, which still meets every row."""
    count = 0
    for i, (problem, loss) in enumerate(ROWS):
        yield i, RIGHT
        estimator = getattr(loss.objective, "estimator", None)
        scores = estimator in ("score", "vimco") or (problem in DISCRETE and not isinstance(loss, DETACHED))
        for fault in FAULTS:
            if scores or fault != "sign of the score":
                if count % 3 == 0:
                    yield i, fault
                count += 1


def precise(found: Estimates, expected: Estimates) -> bool:
    """Whether every error bar is as small as :func:`known.check` wants it."""
    exact = dict(expected.rows())
    return all(
        known.error_bar(estimates) <= known.WORST_ERROR_BAR * abs(float(exact[name].mean()))
        for name, estimates in found.rows()
    )


@lru_cache(maxsize=1)  # the tests of a row follow each other, and share its draws
def drawn(row: int) -> tuple[known.Drawn, Estimates, float]:
    problem, loss = ROWS[row]
    expected, sign = reference(problem, loss)
    for replicas in REPLICAS:  # as many as the noise of the row asks for
        pyro.set_rng_seed(2)
        draws = known.Drawn.of(loss, problem, replicas)
        if precise(draws.estimates(loss.objective), expected):
            break
    return draws, expected, sign


def name_of_trial(value: object) -> str:
    return "-".join(map(name_of, ROWS[value])) if isinstance(value, int) else value


@pytest.mark.table(5)
@pytest.mark.parametrize(("row", "fault"), list(_tried()), ids=name_of_trial)
def test_value_and_gradient_are_right_and_a_wrong_sign_or_weight_is_seen(row: int, fault: str) -> None:
    draws, expected, sign = drawn(row)
    objective = ROWS[row][1].objective
    if fault == RIGHT:
        known.check(draws.estimates(objective), expected, sign)
        return
    with pytest.raises(AssertionError):
        known.check(draws.estimates(Corrupted(objective, fault)), expected, sign)


def test_sticking_the_landing_is_biased_on_a_nonlinear_bound() -> None:
    """Documented: it is DReG that mends it. The table sees the bias."""
    loss = ImportanceWeightedELBO(3, estimator="stl")
    expected, sign = reference(GAUSSIAN, loss)
    with pytest.raises(AssertionError):
        known.check(known.estimate(loss, GAUSSIAN), expected, sign)


@pytest.mark.parametrize("name", known.ELBOS)
def test_closed_forms_of_the_elbo_agree_with_plain_sampling(name: str) -> None:
    problem = known.PROBLEMS[name]
    known.check(known.expectation(problem, 1, known.renyi(1.0), size=200_000), expected_bound(name, 1, 1.0))


# Self-normalised objectives: biased by O(1/K), right in the limit.


@pytest.mark.parametrize("problem", [GAUSSIAN, BERNOULLI], ids=name_of)
@pytest.mark.parametrize("betas", [(0.0,), (0.0, 0.5), (0.0, 0.1, 0.3)])
def test_thermodynamic_value_and_gradient_are_right_with_many_particles(
    problem: Problem, betas: tuple[float, ...]
) -> None:
    found = known.estimate(ThermodynamicELBO(4096, betas), problem, 60)
    known.check(found, known.thermodynamic(problem, betas), -1.0)


@pytest.mark.parametrize("fault", ["sign of log q", "sign of the gradient"])
def test_a_wrong_thermodynamic_sign_is_seen(fault: str) -> None:
    loss = ThermodynamicELBO(4096, (0.0, 0.3))
    corrupted = WeightedELBO(Corrupted(loss.objective, fault), num_particles=4096)
    with pytest.raises(AssertionError):
        known.check(known.estimate(corrupted, GAUSSIAN, 60), known.thermodynamic(GAUSSIAN, (0.0, 0.3)), -1.0)


def test_thermodynamic_bias_falls_as_one_over_k() -> None:
    exact = float(known.thermodynamic(GAUSSIAN, (0.0, 0.5)).gradients["loc"])
    scaled = []
    for count in (8, 16, 32):
        estimates = -known.estimate(ThermodynamicELBO(count, (0.0, 0.5)), GAUSSIAN, 60_000).gradients["loc"]
        assert known.error_bar(estimates) * count < 0.1
        scaled.append(count * (float(estimates.mean()) - exact))
    assert max(scaled) / min(scaled) == pytest.approx(1.0, abs=0.2)


WIDE_BIMODAL = replace(BIMODAL, params={"shift": 0.9, "loc": 1.1, "log_scale": 1.0})


@pytest.mark.parametrize("problem", [GAUSSIAN, WIDE_BIMODAL, BETA, BERNOULLI], ids=name_of)
def test_forward_kl_is_right_with_many_particles(problem: Problem) -> None:
    found = known.estimate(ForwardKL(4096), problem, 120)
    exact = known.forward_kl(problem)
    for name in known.forward_kl(problem).gradients:
        if exact.gradients[name].any():
            known.check_one(name, found.gradients[name], exact.gradients[name])
    known.check_one("value", found.value, exact.value)


WAKE = replace(GAUSSIAN, params={"prior": 0.0, "loc": 0.0, "log_scale": 0.0})


def test_forward_kl_bias_falls_as_one_over_k() -> None:
    """The guide is the prior, the posterior N(1.25, 1/2): the exact gradient in the guide's mean is -1.25."""
    assert float(known.forward_kl(WAKE).gradients["loc"]) == pytest.approx(-1.25, abs=1e-6)
    biases = {}
    for count, reported in ((4, -0.836), (16, -1.154), (64, -1.227)):
        estimates = known.estimate(ForwardKL(count), WAKE, 40_000).gradients["loc"]
        mean, bar = float(estimates.mean()), known.error_bar(estimates)
        assert bar < 0.05 * abs(mean)
        assert abs(mean - reported) < 5e-4 + known.SIGMAS * bar
        biases[count] = (count * (mean + 1.25), count * bar)
    difference = abs(biases[64][0] - biases[16][0])  # K times the bias has settled
    assert difference < 0.1 * biases[16][0] + known.SIGMAS * biases[64][1]
    assert biases[64][1] < 0.1 * biases[64][0]


# What the divergences mean.


def test_log_evidence_is_elbo_plus_divergence_when_conjugate() -> None:
    p = GAUSSIAN.plain_params(1)
    prior = p["prior"].detach()
    posterior = Normal((prior + known.OBSERVED) / 2, 0.5**0.5)
    guide = Normal(p["loc"].detach(), p["log_scale"].exp().detach())
    divergence = torch.distributions.kl_divergence(guide, posterior)
    exact = Normal(prior, 2.0**0.5).log_prob(torch.tensor(known.OBSERVED)) + known.GAUSSIAN_CONSTANT
    assert known.log_evidence(GAUSSIAN, p).item() == pytest.approx(exact.item(), abs=1e-8)
    found = -known.estimate(ELBO(3), GAUSSIAN, 100_000).value
    known.check_one("log evidence", found + divergence, exact)


def enumerated_guide_elbo(replicas: int = 1) -> float:
    model, guide = BERNOULLI.programs(replicas)
    return -ELBO().loss(model, config_enumerate(guide)) / replicas


@pytest.mark.parametrize("replicas", [1, 3])
def test_log_evidence_is_elbo_plus_divergence_when_enumerable(replicas: int) -> None:
    p = BERNOULLI.plain_params(1)
    _, log_guide, posterior = known.tempered(BERNOULLI, p, 1.0)
    divergence = (log_guide.exp() * (log_guide - posterior.log())).sum().item()
    exact = known.log_evidence(BERNOULLI, p).item()
    assert enumerated_guide_elbo(replicas) + divergence == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("loss", [ELBO(), ImportanceWeightedELBO(3), RenyiELBO(0.5, 2), ELBO(2)], ids=name_of)
def test_summing_out_in_the_model_gives_the_log_evidence_and_its_gradient(loss: WeightedELBO, replicas: int) -> None:
    model, _ = BERNOULLI.programs(replicas)
    pyro.clear_param_store()
    found = loss.differentiable_loss(config_enumerate(model), lambda: None)
    found.backward()
    p = BERNOULLI.plain_params(1)
    exact = known.log_evidence(BERNOULLI, p)
    exact.sum().backward()
    assert found.item() == pytest.approx(-replicas * exact.item(), abs=1e-12)
    for name in ("prior", "high", "low"):
        torch.testing.assert_close(pyro.param(name).grad, -p[name].grad.expand(replicas), rtol=0, atol=1e-12)


def test_enumerated_guide_has_the_exact_gradient() -> None:
    model, guide = BERNOULLI.programs(2)
    ELBO().differentiable_loss(model, config_enumerate(guide)).backward()
    exact = expected_bound("bernoulli_mixture", 1, 1.0)
    for name, gradient in exact.gradients.items():
        torch.testing.assert_close(pyro.param(name).grad, -gradient.expand(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", [known.MIXTURE, known.SWITCH], ids=name_of)
@pytest.mark.parametrize("count", [1, 3])
def test_guides_may_enumerate_some_sites_and_draw_the_others(problem: Problem, count: int) -> None:
    expected, sign = reference(problem, ELBO(count))
    model, guide = problem.programs(30_000)
    found = known.estimate(ELBO(count), problem, 30_000, (model, config_enumerate(guide)))
    known.check(found, expected, sign)


SCALED = [ELBO(3), ELBO(3, "exact"), ELBO(3, estimator="vimco"), ELBO(3, estimator="score")]


@pytest.mark.parametrize("loss", SCALED, ids=name_of)
def test_scaled_programs_scale_value_and_gradient(loss: WeightedELBO) -> None:
    """``poutine.scale`` around both is a part of the density; score functions are of the draws, so unscaled."""
    problem = known.SWITCH
    expected, _ = reference(problem, ELBO(3))
    programs = tuple(poutine.scale(program, 0.3) for program in problem.programs(100_000))
    known.check(known.estimate(loss, problem, 100_000, programs), expected, -0.3)


def fitted(loss: WeightedELBO, start: float, steps: int) -> tuple[float, float]:
    pyro.clear_param_store()
    problem = replace(BIMODAL, params={"shift": 0.0, "loc": start, "log_scale": 0.0})
    model, guide = problem.programs(1)
    shift = pyro.param("shift", torch.zeros(1))
    optim = Adam(lambda name: {"lr": 0.0 if name == "shift" else 0.03})
    svi = SVI(model, guide, optim, loss)
    for _ in range(steps):
        svi.step()
    assert not shift.any()
    return pyro.param("loc").item(), pyro.param("log_scale").exp().item()


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_reverse_kl_picks_a_mode(side: float) -> None:
    loc, scale = fitted(ELBO(64), side, 200)
    assert loc == pytest.approx(2 * side, abs=0.1)
    assert scale == pytest.approx(0.5, abs=0.1)


def test_forward_kl_matches_the_moments() -> None:
    mean = 2 * known.HEAVY - 2 * (1 - known.HEAVY)
    sd = (0.25 + 4 - mean**2) ** 0.5
    loc, scale = fitted(ForwardKL(2000), 1.5, 300)
    assert loc == pytest.approx(mean, abs=0.1)
    assert scale == pytest.approx(sd, abs=0.1)


# Automatic guides on the same problems.


def normal_guide(problem: Problem, replicas: int, params: dict[str, float]) -> AutoNormal:
    model, _ = problem.programs(replicas)
    guide = AutoNormal(model)
    guide()
    guide.locs.z = torch.full((replicas,), params["loc"])
    guide.scales.z = torch.full((replicas,), params["log_scale"]).exp()
    return guide


def automatic_estimate(loss: WeightedELBO, problem: Problem, guide: AutoNormal, replicas: int) -> Estimates:
    """The gradients of a softplus scale, turned into those of its logarithm."""
    model, _ = problem.programs(replicas)
    found = known.estimate(loss, replace(problem, params={}), replicas, (model, guide))
    raw = guide.scales.z_unconstrained
    slope = guide.scales.z.detach() / torch.sigmoid(raw.detach())
    return Estimates(found.value, {"loc": guide.locs.z.grad, "log_scale": raw.grad * slope})


MULTI_LOSSES = [
    ELBO(3),
    ELBO(3, estimator="stl"),
    ELBO(3, "exact"),
    ImportanceWeightedELBO(3),
    ImportanceWeightedELBO(3, estimator="dreg"),
    RenyiELBO(0.5, 3, estimator="dreg"),
    ChiELBO(3, estimator="vimco"),
    ForwardKL(3),
]


@pytest.mark.parametrize("loss", MULTI_LOSSES, ids=name_of)
def test_auto_normal_on_the_conjugate_gaussian(loss: WeightedELBO) -> None:
    expected, sign = reference(GAUSSIAN, loss)
    guide = normal_guide(GAUSSIAN, known.REPLICAS, GAUSSIAN.params)
    pyro.set_rng_seed(3)
    known.check(automatic_estimate(loss, GAUSSIAN, guide, known.REPLICAS), expected, sign)


def _logit_joint(p: known.Values, z: known.Values) -> torch.Tensor:
    u = torch.sigmoid(z["z"])
    data = Binomial(known.TRIALS, u).log_prob(torch.tensor(float(known.SUCCESSES)))
    return Beta(torch.tensor(2.0), p["log_b"].exp()).log_prob(u) + data + (u * (1 - u)).log()


LOGIT = Problem(
    "beta_binomial_logit",
    {"log_b": 1.1, "loc": 1.0, "log_scale": 0.3},
    BETA.model,
    BETA.guide,
    _logit_joint,
    known.normal_log_guide,
    known.normal_draw,
    points=known.grid(-15.0, 15.0),
)


@pytest.mark.parametrize("loss", MULTI_LOSSES, ids=name_of)
def test_auto_normal_on_the_beta_binomial_counts_the_jacobian_once(loss: WeightedELBO) -> None:
    """The guide is normal on the logit; the reference is written on the logit too, its Jacobian in the joint."""
    torch.manual_seed(1)
    count, forward = loss.num_particles, isinstance(loss, ForwardKL)
    if forward:
        expected, sign = known.wake_phi(LOGIT, count, size=100_000), 1.0
        # the guide's density is of the constrained value: its expected Jacobian is taken off the reference's value
        expected = replace(expected, value=torch.full((1,), float("nan")))
    else:
        alpha = loss.objective.alpha
        expected = known.expectation(LOGIT, 1 if alpha == 1.0 else count, known.renyi(alpha), size=100_000)
        sign = 1.0 if alpha < 0 else -1.0
    guide = normal_guide(LOGIT, known.REPLICAS, LOGIT.params)
    found = automatic_estimate(loss, LOGIT, guide, known.REPLICAS)
    for name, estimates in found.rows():
        if not (forward and name == "value"):
            known.check_one(name, estimates, sign * expected.gradients.get(name, expected.value))


# Guides with one density over all latents, drawn anew in a plate of replicas around the guide.

JOINT = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoFlow": partial(AutoFlow, flow="nice", hidden_features=(4,)),  # starts as AutoDiagonalNormal, to the bit
}
JOINT_LOSSES = [ELBO(3), ImportanceWeightedELBO(3), ImportanceWeightedELBO(3, estimator="dreg")]
JOINT_ROWS = [(p, kind, loss) for p in (GAUSSIAN, BIMODAL) for kind in JOINT for loss in JOINT_LOSSES]


@lru_cache(maxsize=1)  # the two tests of a row follow each other, and share its draws
def joint_draws(row: int, calls: int = 12, size: int = 2500) -> tuple[list[Step], torch.Tensor, Estimates, float]:
    """Steps of many replicas each and the parameter ``loc`` of the guide, with the right answer to the row."""
    problem, kind, loss = JOINT_ROWS[row]
    expected, sign = reference(problem, loss)

    def model() -> None:
        problem.model(lambda name: pyro.param(name, torch.tensor(problem.params[name])))

    def replicated(program: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with pyro.plate("replicas", size, dim=-1):
                program()

        return run

    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    init = init_to_value(values={"z": torch.tensor(problem.params["loc"])})
    guide = JOINT[kind](model, init_loc_fn=init, init_scale=float(torch.tensor(problem.params["log_scale"]).exp()))
    guide()
    (leaf,) = (leaf for name, leaf in guide.named_parameters() if name in ("loc", "loc_unconstrained"))
    steps = [step for _ in range(calls) for step in loss.steps(replicated(model), replicated(guide))]
    return steps, leaf, expected, sign


def joint_estimate(objective: Objective, steps: list[Step], leaf: torch.Tensor) -> Estimates:
    """The value and its gradient in ``loc``, averaged over the replicas of each call."""
    values, gradients = [], []
    for step in steps:
        value, surrogate = objective(step)
        (gradient,) = torch.autograd.grad(step.scale * surrogate.mean(), leaf, retain_graph=True)
        values.append(step.scale * value.detach().mean())
        gradients.append(gradient.squeeze())
    return Estimates(torch.stack(values), {"loc": torch.stack(gradients)})


JOINT_FAULTS = ("sign of log q", "weight of one particle", "gradient of one particle", "sign of the gradient")
JOINT_TRIALS = [(i, fault) for i in range(len(JOINT_ROWS)) for fault in (RIGHT, JOINT_FAULTS[i % 4])]


@pytest.mark.table(5)
@pytest.mark.parametrize(
    ("row", "fault"), JOINT_TRIALS, ids=lambda x: x if isinstance(x, str) else "-".join(map(name_of, JOINT_ROWS[x]))
)
def test_joint_guides_are_right_and_a_wrong_sign_or_weight_is_seen(row: int, fault: str) -> None:
    steps, leaf, expected, sign = joint_draws(row)
    objective = JOINT_ROWS[row][2].objective
    if fault == RIGHT:
        known.check(joint_estimate(objective, steps, leaf), expected, sign)
        return
    with pytest.raises(AssertionError):
        known.check(joint_estimate(Corrupted(objective, fault), steps, leaf), expected, sign)


@pytest.mark.parametrize("loss", [ELBO(200), ELBO(200, "exact"), ELBO(200, estimator="stl")], ids=name_of)
def test_auto_multivariate_normal_on_the_conjugate_gaussian(loss: WeightedELBO) -> None:
    replicas = 50
    model, _ = GAUSSIAN.programs(replicas)
    guide = AutoMultivariateNormal(model, init_scale=float(torch.tensor(GAUSSIAN.params["log_scale"]).exp()))
    guide()
    guide.loc = torch.nn.Parameter(torch.full((replicas,), GAUSSIAN.params["loc"]))
    loss.differentiable_loss(model, guide).backward()
    expected, sign = reference(GAUSSIAN, loss)
    known.check_one("loc", guide.loc.grad, sign * expected.gradients["loc"])
    raw = guide.scale_unconstrained
    slope = guide.scale.detach() / torch.sigmoid(raw.detach())
    known.check_one("log_scale", raw.grad * slope, sign * expected.gradients["log_scale"])


@pytest.mark.parametrize("replicas", [1, 4])
def test_model_evidence_estimate_is_exact_at_the_posterior(replicas: int) -> None:
    """With the exact posterior as the guide, every bound of the log evidence is the log evidence."""
    exact = replace(
        GAUSSIAN,
        params={"prior": 0.8, "loc": (0.8 + known.OBSERVED) / 2, "log_scale": -0.5 * torch.tensor(2.0).log().item()},
    )
    log_evidence = known.log_evidence(exact, exact.plain_params(1)).item() * replicas
    for loss in (ELBO(2), ImportanceWeightedELBO(3), RenyiELBO(0.3, 3), ThermodynamicELBO(4, (0.0, 0.4))):
        assert -loss.loss(*exact.programs(replicas)) == pytest.approx(log_evidence, abs=1e-8)
    assert ChiELBO(3).loss(*exact.programs(replicas)) == pytest.approx(log_evidence, abs=1e-8)
