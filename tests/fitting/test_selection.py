"""``fit(model, "auto")``: the cheapest guide that can be trusted, what was tried, and the budget."""

import gc
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pplvi
from pplvi import AutoFlow
from pplvi.fitting.attempt import Attempt
from pplvi.fitting.auto import select
from pplvi.fitting.clock import Clock, Timing
from pplvi.fitting.garbage import old_objects_aside
from pplvi.fitting.recipes import flow_recipe
from pplvi.posterior.verdict import RELIABLE, UNRELIABLE, Facts, Verdict
from pplvi.posterior.weighted import Estimate
from pplvi.programs.deadline import is_time_over
from pplvi.programs.state import Environment
from pplvi.training.replicas import Originals

pytestmark = pytest.mark.usefixtures("float64")

fit = partial(pplvi.fit, progress=False)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[..., 0] + w[..., 1] * x, 1.0), obs=y)


def crooked():
    """A funnel: no Gaussian is near it."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("many", 20):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def plain():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def test_pathfinder_is_taken_where_it_is_good_enough():
    x = torch.linspace(-1, 1, 20)
    result = fit(regression, "auto", args=(x, 2 * x), seed=0)
    assert result.guide_name == "AutoPathfinder(num_components=1)"
    assert float(result.posterior(4000).pareto_k) < 0.7
    text = result.summary()
    assert "tried             AutoPathfinder: reliable, k-hat" in text
    assert "taken             AutoPathfinder, as its draws are reliable" in text
    assert "Verdict: reliable." in text
    assert result.to_arviz().posterior.sizes["chain"] == 1


class Fitted:
    """What the ladder reads of a fit."""

    def __init__(self, name, pareto_k, elbo=0.0, log_evidence=0.0, error=0.01, ess=3000.0):
        self.guide_name, self.pareto_k, self.elbo = name, pareto_k, elbo
        self.log_evidence, self.ess = Estimate(log_evidence, error), ess
        self.runs, self.best, self.notes = [SimpleNamespace(reason="found")], 0, {}
        self.guide = self.islands = None

    def posterior(self, num_draws):
        estimates = {"elbo": Estimate(self.elbo, 0.0), "total_log_evidence": self.log_evidence}
        verdict = Verdict(RELIABLE if self.pareto_k < 0.7 else UNRELIABLE, (), ())
        facts = Facts(8000, self.ess, self.pareto_k, 0.01, 0.0)
        judged = {
            "verdict": verdict,
            "facts": facts,
            "facts_without_scouts": facts,
            "has_weights": True,
            "ess": torch.tensor(self.ess),
            "num_draws": 8000,
            "draws": type("D", (), {"batch": ()}),
        }
        return type("P", (), {"pareto_k": torch.tensor(self.pareto_k), **judged, **estimates})


def name_of(guide):
    kind = guide.func if isinstance(guide, partial) else guide
    return kind if isinstance(kind, str) else kind.__name__.replace("AutoFlow", "flow")


def originals(model):
    return Originals(model, (), {}, Environment())


def test_richer_families_are_tried_one_after_another_until_one_is_good(monkeypatch):
    ks = iter([0.9, 0.8, 1.1, 1.2, 1.1, 1.0, 0.4])
    names = []
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)

    def fake(model, guide, callbacks=(), **options):
        for callback in callbacks:
            callback(None), callback(None)
        if options.get("num_steps") == 12:  # to see how long a step takes
            return Fitted(name_of(guide), 1.0)
        names.append((name_of(guide), options.get("num_steps")))
        return Fitted(name_of(guide), next(ks))

    best = select(fake, plain, originals(plain), budget=30.0)
    searches = ["AutoPathfinder", "AutoStudentMixture", "smc", "AutoBatchAndMatch", "AutoDeterministicNormal"]
    assert [name for name, _ in names[:6]] == [*searches, "AutoStudentMixture"]
    assert names[-1] == ("flow", 2000)
    assert best.guide_name == "flow"
    assert best.notes["taken"] == "AutoFlow('quadratic'), as its draws are reliable"
    assert best.notes["tried"].count("k-hat") == 7


@pytest.mark.parametrize(
    ("written", "other", "kept"),
    [
        ((0.9, -1.0), (0.8, -1.5), "as written"),  # what is missed counts, not k-hat
        ((2.0, -9.0), (3.0, -7.0), "non-centered"),
        ((0.6, -1.0), (0.65, -1.0, 0.001), "non-centered"),  # as much evidence from more effective draws
        ((0.65, -1.0, 0.01, 3500.0), (0.6, -1.0, 0.001), "as written"),
        ((0.65, -1.0, 0.02, 3500.0), (0.6, -1.0, 0.001), "non-centered"),
    ],
)
def test_the_form_in_which_the_most_evidence_is_found_is_kept(written, other, kept, monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    tried = []

    def fake(model, guide, **options):
        tried.append((name_of(guide), model is crooked))
        if len(tried) > 3:
            return Fitted(name_of(guide), 0.3, log_evidence=-1.0)
        pareto_k, log_evidence, *error = written if model is crooked else other
        return Fitted(name_of(guide), pareto_k, -1.0, log_evidence, *error)

    best = select(fake, crooked, originals(crooked), budget=30.0)
    assert tried[:3] == [("AutoPathfinder", True)] + [("AutoPathfinder", False)] * 2
    name = "AutoStudentMixture" if other[0] > 0.7 else "AutoPathfinder"
    title = name if kept == "as written" else f"{name}, {kept}"
    assert best.notes["taken"] == f"{title}, as its draws are reliable"
    assert best.notes["parametrisation"].startswith(f"{kept} has k-hat")
    assert best.notes["parametrisation"].count("log evidence") == 3


def test_other_forms_begin_where_the_first_is_matched(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    values = {"v": torch.tensor(2.0), "x": torch.linspace(-1.0, 1.0, 20)}
    gaussians, given = SimpleNamespace(loc=torch.zeros(1, 21)), []

    def fake(model, guide, **options):
        given.append(guide)
        found = Fitted(name_of(guide), 0.6)
        found.guide = SimpleNamespace(is_matched=True, best_values=lambda: values, gaussians=gaussians)
        return found

    select(fake, crooked, originals(crooked), budget=30.0)
    first, *others = (guide.keywords for guide in given)
    assert "num_paths" not in first
    for options, power in zip(others, (1.0, 0.5), strict=True):
        assert (options["num_paths"], options["lbfgs"]) == (1, {"max_iterations": 5})
        found = options["init_loc_fn"]({"name": "x_decentered", "fn": dist.Normal(0.0, 1.0).expand([20])})
        assert torch.allclose(found, values["x"] * (-0.5 * power * values["v"]).exp())
    for change in (
        partial(values.update, v=torch.tensor(-3000.0)),
        partial(setattr, gaussians, "loc", torch.zeros(2, 21)),
    ):
        change()  # values that are not finite there; two modes
        given.clear()
        select(fake, crooked, originals(crooked), budget=30.0)
        assert all("num_paths" not in guide.keywords for guide in given)
        values["v"] = torch.tensor(2.0)


def test_a_fit_of_the_plan_is_made_by_the_plain_family_and_not_by_where_it_began(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    ks = iter([0.9, 0.8, 0.85, 0.3])
    given = []

    def fake(model, guide, **options):
        given.append(guide)
        return Fitted(name_of(guide), next(ks))

    best = select(fake, plain, originals(plain), budget=30.0)
    assert isinstance(given[-1], partial)
    assert best.origin is pplvi.AutoBatchAndMatch


def test_no_other_form_is_tried_where_one_is_easy(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    tried = []

    def fake(model, guide, **options):
        tried.append(model is crooked)
        return Fitted(name_of(guide), 0.9 if model is crooked else 0.6, ess=5000.0)

    best = select(fake, crooked, originals(crooked), budget=30.0)
    assert tried == [True, False]
    assert best.notes["taken"] == "AutoPathfinder, non-centered, as its draws are reliable"


def test_of_equal_verdicts_one_that_misses_nothing_known_is_taken(monkeypatch):
    """Such as a Gaussian beside particles that the clock has stopped on their way."""
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    fits = iter([Fitted("first", 1.5, log_evidence=-5.0), Fitted("second", 0.9, log_evidence=-50.0)])

    def fake(model, guide, **options):
        if (fit := next(fits, None)) is None:
            raise ValueError("too slow: expected less")
        return fit

    assert select(fake, plain, originals(plain), budget=30.0).guide_name == "first"


def test_no_other_form_is_tried_where_the_time_left_is_less_than_one_took(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    tried = []
    for module in ("auto", "clock"):
        monkeypatch.setattr(f"pplvi.fitting.{module}.cpu_seconds", lambda: 20.0 if tried else 0.0)

    def fake(model, guide, callbacks=(), **options):
        if callbacks:
            raise ValueError("too slow: expected less")
        tried.append(model is crooked)
        return Fitted(name_of(guide), 2.0)

    best = select(fake, crooked, originals(crooked), budget=30.0)
    assert False not in tried
    assert best.notes["parametrisation"].endswith("in AutoPathfinder")


@pytest.mark.parametrize("found_later", [True, False])
def test_a_good_k_hat_is_not_believed_against_more_evidence(found_later, monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    fits = iter(
        [
            Fitted("pathfinder", 0.8, elbo=-9.0, log_evidence=-1.0),
            Fitted("narrow", 0.1, elbo=-6.0, log_evidence=-5.0),
            Fitted("other", 0.9, elbo=-6.0, log_evidence=-5.0),
            Fitted("later", 0.05, elbo=-4.0, log_evidence=-0.9 if found_later else -5.0),
            Fitted("last", 0.9, elbo=-6.0, log_evidence=-5.0),
        ]
    )

    def fake(model, guide, callbacks=(), **options):
        if callbacks or guide == "smc":
            raise ValueError("too slow: expected less")
        return next(fits)

    best = select(fake, plain, originals(plain), budget=30.0)
    assert best.guide_name == "later"
    assert ("doubt" in best.notes) is not found_later
    if not found_later:
        expected = "AutoPathfinder finds a log evidence of -1.000 +- 0.010 nats, this guide -5.000 +- 0.010 nats: it"
        assert best.notes["doubt"].startswith(expected.removesuffix(" nats: it"))


def test_one_gaussian_is_not_tried_where_most_draws_are_effective(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    ks = iter([0.9, 0.75, 0.85, 0.3])
    best = select(
        lambda model, guide, **options: Fitted(name_of(guide), next(ks), ess=6000.0),
        plain,
        originals(plain),
        budget=30.0,
    )
    assert best.notes["taken"] == "AutoStudentMixture(num_scouts=512), as its draws are reliable"
    assert "AutoBatchAndMatch: not tried, as 75% of the draws are effective already" in best.notes["tried"]


@pytest.mark.parametrize("pareto_k", [0.8, 1.2])
def test_tails_that_are_too_light_are_answered_from_the_draws_that_are_there(pareto_k, monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    monkeypatch.setattr("pplvi.fitting.auto.is_gaussian", lambda fit: True)
    first, given = Fitted("first", pareto_k), []
    first.guide = "that was found"

    def fake(model, guide, **options):
        given.append(guide)
        return first if len(given) == 1 else Fitted("second", 0.3)

    best = select(fake, plain, originals(plain), budget=30.0)
    near = pareto_k < 1
    assert best.notes["taken"].startswith("AutoStudentMixture(start=...), as" if near else "AutoStudentMixture, as")
    assert not near or given[1].keywords["start"] == "that was found"


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    fits = iter([Fitted("first", 0.9), Fitted("second", 0.8)])

    def fake(model, guide, **options):
        if (fit := next(fits, None)) is None:
            raise KeyboardInterrupt
        return fit

    best = select(fake, plain, originals(plain), budget=30.0)
    assert best.guide_name == "second"
    assert best.notes["taken"] == "AutoStudentMixture, as it was interrupted, and it has the best verdict so far"
    with pytest.raises(KeyboardInterrupt):  # where nothing has been found
        select(fake, plain, originals(plain), budget=30.0)


def test_a_clock_tells_a_second_run_what_it_told_the_first():
    first = Clock(0.02)
    left = first.left()
    while not first.over():
        pass
    again = Clock(first.timing)
    assert again.left() == left
    asked = next(number for number in itertools.count(1) if again.over())
    assert again.timing == first.timing == Timing((left,), asked)


@pytest.mark.parametrize(
    ("pareto_k", "gain", "refuted"), [(0.3, 0.1, False), (0.3, 0.5, True), (0.9, 2.0, False), (0.9, 4.0, True)]
)
def test_less_evidence_refutes_a_guide(pareto_k, gain, refuted):
    one, other = (
        Attempt("guide", "as written", None, k, 0.0, Estimate(value, 0.01), 1.0, [])
        for k, value in ((pareto_k, gain), (0.1, 0.0))
    )
    assert one.refutes(other) is refuted
    assert not other.refutes(one)


def test_a_funnel_is_fitted_in_its_easy_form():
    result = fit(crooked, "auto", seed=0)
    assert result.notes["taken"] == "AutoPathfinder, non-centered, as its draws are reliable"
    assert "parametrisation   non-centered has k-hat" in result.summary()
    assert result.model.sites == {"x"}
    posterior = result.posterior(4000)
    assert abs(posterior.log_evidence[0]) < 0.01
    assert float(posterior.ess) > 3800
    assert result.to_arviz().posterior["x"].dims == ("chain", "draw", "many")
    written = fit(crooked, pplvi.AutoPathfinder, seed=0).posterior(4000)
    assert posterior.gap[0] < 0.01 * written.gap[0]


def test_a_well_informed_hierarchy_stays_as_it_is_written():
    y = torch.linspace(-5.0, 5.0, 20)

    def informed():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("group", 20):
            pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(mu, tau)), 0.01), obs=y)

    result = fit(informed, "auto", seed=0)
    assert result.model is informed
    assert result.notes["parametrisation"].startswith("as written has k-hat")


# --- models with parameters ---


def with_parameter(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        pyro.module("model", self)
        pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(self.loc, 1.0)), 1.0), obs=y)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_the_parameters_of_a_model_are_trained_with_the_guide(kind):
    model = with_parameter if kind == "function" else Module()
    result = fit(model, "auto", args=(torch.tensor(3.0),), seed=0)
    assert result.notes["tried"].startswith("AutoNormal")
    name = "loc" if kind == "function" else "model$$$loc"
    assert pyro.param(name).item() == pytest.approx(3.0, abs=0.2)  # the evidence N(y; loc, 2) is largest there
    assert result.params[0][name].item() == pyro.param(name).item()
    if kind == "module":
        assert model.loc.item() == pyro.param(name).item()
    assert result.posterior().log_evidence[0] == pytest.approx(-0.5 * math.log(4 * math.pi), abs=0.05)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_each_family_starts_from_the_first_parameters_and_those_of_the_taken_one_are_left(taken, monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    module, starts = Module(), []

    def fake(model, guide, callbacks=(), **options):
        timed = options["num_steps"] == 12
        if timed:  # to see how long a step takes
            callbacks[0](None), callbacks[0](None)
        else:
            starts.append(module.loc.item())
        with torch.no_grad():
            module.loc.fill_(-1.0 if timed else 10.0 * len(starts))
        return Fitted(name_of(guide), 0.8 if len(starts) == taken + 1 else 0.9)

    best = select(fake, module, Originals(module, (torch.tensor(1.0),), {}, Environment()), budget=30.0)
    assert best.pareto_k == 0.8
    assert starts == [0.0] * 4
    assert module.loc.item() == 10.0 * (taken + 1)


def test_the_budget_ends_the_search_with_the_best_so_far():
    result = fit(crooked, "auto", budget=0.5, seed=0)
    assert "time" in result.notes["taken"]
    assert "best verdict" in result.notes["taken"]
    assert math.isfinite(result.runs[0].score)


def test_time_is_kept_for_the_judging_of_what_comes_next(monkeypatch):
    """Drawing and judging 8,000 draws takes 16 seconds here: what is cut is judged on 1,000 in 2."""
    now, late = [0.0], []
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)
    for module in ("clock", "auto"):
        monkeypatch.setattr(f"pplvi.fitting.{module}.cpu_seconds", lambda: now[0])

    class Slow(Fitted):
        def posterior(self, num_draws):
            now[0] += 16.0 if self.guide_name == "AutoPathfinder" else 0.0
            return super().posterior(num_draws)

    def fake(model, guide, **options):
        if name_of(guide) == "smc":
            for now[0] in (27.9, 28.1):
                late.append(is_time_over())
        return Slow(name_of(guide), 0.9)

    first = select(fake, plain, originals(plain), budget=30.0)
    assert late == [False, True]
    assert first.timing.measured[0] == 16.0
    now[0] = 1000.0
    again = select(fake, plain, originals(plain), budget=first.timing)
    assert late == [False, True] * 2
    assert again.timing == first.timing


def test_a_family_that_fails_is_passed_over_and_all_failing_is_an_error():
    calls = []

    def fake(model, guide, **options):
        calls.append(guide)
        raise ValueError(f"no {len(calls)}: expected another")

    with pytest.raises(ValueError, match="no 1"):
        select(fake, plain, originals(plain), budget=5.0)
    assert len(calls) >= 3
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        fit(lambda: pyro.sample("k", dist.Poisson(3.0)), "auto", seed=0)


def test_flows_are_passed_over_where_they_are_too_large(monkeypatch):
    monkeypatch.setattr("pplvi.fitting.auto.publish", lambda run: None)

    def fake(model, guide, **options):
        assert name_of(guide) != "flow"
        found = Fitted(name_of(guide), 0.9)
        found.guide = type("G", (), {"latent_dim": 503})
        return found

    best = select(fake, plain, originals(plain), budget=30.0)
    assert "AutoFlow('quadratic'): not tried in 503 dimensions, of at most 200" in best.notes["tried"]
    assert best.notes["taken"].endswith("as every family was tried, and it has the best verdict")


def test_the_recipe_trains_a_flow():
    def banana():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.5 * x**2, 0.5))

    guide = partial(AutoFlow, flow="quadratic")
    start = fit(banana, guide, seed=0, **flow_recipe(1)).posterior(4000)
    end = fit(banana, guide, seed=0, **flow_recipe(400)).posterior(4000)
    assert end.gap[0] < 0.05
    assert end.gap[0] < 0.2 * start.gap[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compile": True}, "guide='auto' has no use for"),
        ({"learning_rate": 0.1}, "guide='auto' has no use for"),
        ({"num_steps": 10}, "guide='auto' has no use for"),
        ({"data": [torch.zeros(3)]}, "guide='auto' has no use for"),
        ({"monitor": pplvi.ELBO()}, "guide='auto' has no use for"),
        ({"callbacks": [print]}, "guide='auto' has no use for"),
    ],
)
def test_what_auto_has_no_use_for_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        fit(crooked, "auto", **options)


@pytest.mark.parametrize("budget", [0.0, True, -3, "long"])
def test_a_budget_is_a_time(budget):
    with pytest.raises(ValueError, match=r"budget=.* positive number of seconds"):
        fit(crooked, "auto", budget=budget)


def test_a_fit_has_no_full_collection_of_what_was_there_before():
    """But the next one has, unless there was one meanwhile: what a fit leaves is not kept for ever."""
    frozen = []
    gc.unfreeze()  # what the suite has set aside itself
    for collect in (True, False, True):
        if collect:
            gc.collect()
        with old_objects_aside():
            frozen.append(gc.get_freeze_count() > 0)
            with old_objects_aside():
                assert (gc.get_freeze_count() > 0) == frozen[-1]
            assert (gc.get_freeze_count() > 0) == frozen[-1]
        assert gc.get_freeze_count() == 0
    gc.freeze()
    assert frozen == [True, False, True]
