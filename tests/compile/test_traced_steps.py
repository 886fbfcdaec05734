"""Traced steps equal eager ones, also with Pyro's losses, and what Pyro sees of them."""

from functools import partial

import pyro
import pytest
import torch
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from step_cases import CASES, SGD, SHAPES, Case, assert_same, nested, schools, stepper, trajectory

from benchmarks.speed_problems import SCHOOLS, eight_schools
from pplvi.compile.svi import CompiledSVI
from pplvi.losses.elbo import ELBO, own_loss


@pytest.mark.table(3)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in CASES), *((name, torch.float32) for name in sorted(SHAPES))],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_traced_steps_equal_eager_ones(name, dtype):
    """Same parameters and same noise: the same losses and, with SGD, the same gradients, for two steps."""
    torch.set_default_dtype(dtype)
    try:
        assert_same(trajectory(CASES[name], "trace"), trajectory(CASES[name], "SVI"))
    finally:
        torch.set_default_dtype(torch.float32)


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
