"""Training of undirected models: gradients against enumeration, and what happens to the chains."""

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

import pplvi
from pplvi.energies import (
    BernoulliUnits,
    BoltzmannMachine,
    Chains,
    ContrastiveDivergence,
    EnergyModel,
    EveryState,
    FastPersistentChains,
    MeanFieldContrastiveDivergence,
    PersistentChains,
    RestrictedBoltzmannMachine,
    TemperedChains,
)
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.learning.sparsity import SparsityPenalty

pytestmark = pytest.mark.usefixtures("float64")

V = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)


def machine(centered: bool = False, **options: Any) -> RestrictedBoltzmannMachine:
    torch.manual_seed(1)
    rbm = RestrictedBoltzmannMachine(4, 3, init_scale=0.8, centered=centered, **options)
    for bias in rbm.biases().values():
        bias.data.normal_()
    return rbm


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def exact_gradients(rbm: RestrictedBoltzmannMachine, v: Tensor) -> dict[str, Tensor]:
    """Gradient of the negative mean log likelihood, by differentiating the enumerated one."""
    return gradients(rbm, -rbm.distribution().log_prob(v).mean())


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def traced(rbm: BoltzmannMachine) -> Any:
    """The machine's program behind a function, so that its run has to be traced."""
    return lambda v, **kwargs: rbm.model(v, **kwargs)


OPTIONS: dict[str, dict[str, Any]] = {
    "bernoulli": {},
    "gaussian": {"visible": "gaussian"},
    "categorical": {"visible": "categorical", "num_categories": 2},
}


@pytest.mark.parametrize("through", [lambda rbm: rbm.model, traced], ids=["its own program", "a traced program"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_with_every_state_the_gradient_is_exact(kind: str, through: Any) -> None:
    rbm = machine(**OPTIONS[kind])
    v = rbm.layers["v"].encode(V.long() if kind == "categorical" else V)
    loss = BoltzmannELBO(negative="exact").differentiable_loss(through(rbm), rbm.guide, v)
    same(gradients(rbm, loss), exact_gradients(rbm, v))


def test_gradient_on_chains_is_exact_on_average() -> None:
    rbm = machine()
    loss = BoltzmannELBO(num_chains=1000, sweeps=1)
    rbm.gibbs(rbm.draw((1,)), 1)
    for _ in range(30):
        loss.differentiable_loss(rbm.model, rbm.guide, V)
    found = []
    for _ in range(60):  # sweeps between the measurements make them nearly independent
        for _ in range(8):
            value = loss.differentiable_loss(rbm.model, rbm.guide, V)
        found.append(torch.cat([g.reshape(-1) for g in gradients(rbm, value).values()]))
    draws = torch.stack(found)
    expected = torch.cat([g.reshape(-1) for g in exact_gradients(rbm, V).values()])
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / len(draws) ** 0.5)
    assert (error < 4).all(), error


def test_gradient_with_a_sampled_guide_is_exact_on_average() -> None:
    rbm = machine()
    loss = BoltzmannELBO(negative="exact", num_particles=2000)
    found = gradients(rbm, loss.differentiable_loss(rbm.model, lambda v: rbm.guide(v), V))
    for name, expected in exact_gradients(rbm, V).items():
        torch.testing.assert_close(found[name], expected, atol=4 * (0.25 / 2000 / 3) ** 0.5, rtol=0.0)


@pytest.mark.parametrize("chains", [EveryState(), PersistentChains(20, 2), ContrastiveDivergence(sweeps=2)], ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_the_short_way_is_the_traced_one(chains: Chains, centered: bool) -> None:
    found = []
    for through in (lambda rbm: rbm.model, traced):
        pyro.clear_param_store()
        rbm = machine(centered)
        loss = BoltzmannELBO(negative=chains, per_datum=False)
        pyro.set_rng_seed(3)
        for _ in range(3):
            value = loss.differentiable_loss(through(rbm), rbm.guide, V)
        found.append((value, gradients(rbm, value), dict(rbm.named_buffers())))
    torch.testing.assert_close(found[0][0], found[1][0])
    same(found[0][1], found[1][1])
    same(found[0][2], found[1][2])


class FixedOffsets(BoltzmannELBO):
    """The offsets stay where they are."""

    def _follow(self, *args: Any) -> None:
        """Do nothing."""


@pytest.mark.parametrize("centered", [False, True])
def test_gradients_in_place_are_added_to_those_that_are_there(centered: bool) -> None:
    rbm = machine(centered)
    loss = FixedOffsets(negative="exact")
    expected = gradients(rbm, loss.differentiable_loss(rbm.model, rbm.guide, V))
    for _ in range(2):
        loss.loss_and_grads(rbm.model, rbm.guide, V)
    same({name: p.grad for name, p in rbm.named_parameters()}, {name: 2 * g for name, g in expected.items()})


@pytest.mark.parametrize("lateral", [False, True])
def test_centered_gradient_is_that_of_the_centered_parameters(lateral: bool) -> None:
    """``J J^T g``, with ``J`` from centered to plain parameters, worked out by differentiation."""
    torch.manual_seed(2)
    edges = [("v", "h"), ("v", "v")] if lateral else [("v", "h")]
    bm = BoltzmannMachine({"v": BernoulliUnits(4), "h": BernoulliUnits(3)}, edges, init_scale=0.8)
    c, d = torch.rand(4), torch.rand(3)
    bm.offset("v").copy_(c)
    bm.offset("h").copy_(d)
    weights, biases = bm.edges(), bm.biases()

    def plain(*centered: Tensor) -> tuple[Tensor, ...]:
        w = dict(zip(weights, centered[: len(edges)], strict=True))
        a, b = centered[len(edges) :]
        a = a - w["v", "h"] @ d
        if lateral:
            upper = w["v", "v"].triu(1)
            a = a - (upper + upper.T) @ c
        return (*w.values(), a, b - w["v", "h"].T @ c)

    loss = FixedOffsets(negative="exact")
    bm.centered = False
    parameters = (*weights.values(), *biases.values())
    g = torch.autograd.grad(loss.differentiable_loss(bm.model, _guide(bm), V), parameters)
    _, back = torch.autograd.functional.vjp(plain, parameters, g)
    _, expected = torch.autograd.functional.jvp(plain, parameters, back)
    bm.centered = True
    for model in (bm.model, traced(bm)):
        found = torch.autograd.grad(loss.differentiable_loss(model, _guide(bm), V), parameters)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def _guide(bm: BoltzmannMachine) -> Any:
    from pplvi.energies import ConditionalGuide

    return ConditionalGuide(bm)


def test_flipping_the_data_flips_centered_training() -> None:
    """Centered learning is invariant to exchanging 0 and 1 of the visible units; plain learning is not."""

    def trained(data: Tensor, centered: bool, flip: bool) -> float:
        pyro.clear_param_store()
        torch.manual_seed(0)
        rbm = RestrictedBoltzmannMachine(4, 3, init_scale=0.5, centered=centered)
        if flip:
            with torch.no_grad():
                w = rbm.weight("v", "h")
                rbm.bias("h").add_(w.sum(0))
                w.neg_()
        svi = SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.3}), BoltzmannELBO(negative="exact"))
        for _ in range(100):
            svi.step(data)
        return rbm.distribution().log_prob(data).mean().item()

    assert trained(V, True, False) == pytest.approx(trained(1 - V, True, True), abs=1e-9)
    assert trained(V, False, False) != pytest.approx(trained(1 - V, False, True), abs=1e-3)


def test_only_training_steps_move_the_chains() -> None:
    rbm = machine()
    loss = BoltzmannELBO(num_chains=20, sweeps=1)
    svi = SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.1}), loss)
    svi.step(V)

    def buffers() -> dict[str, Tensor]:
        return {name: b.clone() for name, b in rbm.named_buffers()}

    before = buffers()
    svi.evaluate_loss(V)
    loss.loss(rbm.model, rbm.guide, V)
    same(buffers(), before)
    svi.step(V)
    assert not torch.equal(buffers()["chain_v"], before["chain_v"])


def test_a_subsampled_plate_scales_both_phases() -> None:
    """A plate of the user's own, with three of thirty data, is the machine's own program with ``size=30``."""
    rbm = machine()
    data = V.repeat(10, 1)

    def model() -> None:
        rbm.announce()
        with pyro.plate("data", 30, subsample=torch.arange(3)) as rows:
            rbm.energy_site("energy", rbm.sites(3, {"v": data[rows]}))

    def guide() -> None:
        with pyro.plate("data", 30, subsample=torch.arange(3)) as rows:
            pyro.sample("h", rbm.conditional("h", {"v": data[rows]}))

    guide.factorised = lambda: rbm.guide.factorised(V)  # type: ignore[attr-defined]
    loss = BoltzmannELBO(negative="exact", per_datum=False)
    found = gradients(rbm, loss.differentiable_loss(model, guide))
    same(found, gradients(rbm, loss.differentiable_loss(rbm.model, rbm.guide, V, size=30)))
    same(found, {name: 30 * g for name, g in exact_gradients(rbm, V).items()})


def test_scale_multiplies_both_phases() -> None:
    rbm = machine()
    loss = BoltzmannELBO(negative="exact", per_datum=False)
    for model in (rbm.model, traced(rbm)):
        part = gradients(rbm, loss.differentiable_loss(model, rbm.guide, V))
        whole = gradients(rbm, loss.differentiable_loss(model, rbm.guide, V, size=30))
        same(whole, {name: 10 * g for name, g in part.items()})
        one = gradients(rbm, BoltzmannELBO(negative="exact").differentiable_loss(model, rbm.guide, V, size=30))
        same(whole, {name: 30 * g for name, g in one.items()})


def test_an_energy_inside_a_larger_program() -> None:
    """A machine as the prior of a decoder: both are trained, and each copy of the prior has a normaliser."""
    rbm = machine()
    y = torch.randn(5)

    def model() -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        rbm.announce()
        with pyro.plate("data", 5):
            values = rbm.sites(5, {})
            rbm.energy_site("energy", values)
            pyro.sample("y", pyro.distributions.Normal(slope * values["v"].sum(-1), 1.0), obs=y)

    def guide() -> None:
        with pyro.plate("data", 5):
            h = pyro.sample("h", pyro.distributions.Bernoulli(0.5).expand([5, 3]).to_event(1))
            pyro.sample("v", rbm.conditional("v", {"h": h}))

    loss = BoltzmannELBO(negative="exact", num_particles=50, per_datum=False)
    value = loss.differentiable_loss(model, guide)
    assert torch.isfinite(torch.autograd.grad(value, pyro.param("slope").unconstrained(), retain_graph=True)[0]).all()
    torch.manual_seed(0)
    positive = pplvi.ELBO(50)
    torch.manual_seed(0)
    with_z = gradients(
        rbm, BoltzmannELBO(negative="exact", num_particles=50, per_datum=False).differentiable_loss(model, guide)
    )
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="log Z"):
        without = gradients(rbm, positive.differentiable_loss(model, guide))
    same(
        {n: with_z[n] - without[n] for n in with_z}, {n: 5 * g for n, g in gradients(rbm, rbm.log_partition()).items()}
    )


@pytest.mark.parametrize("chains", [PersistentChains(4000, 2), TemperedChains(4000, 2, num_temperatures=4)], ids=str)
def test_chains_leave_the_machine_invariant(chains: Chains) -> None:
    rbm = machine()
    states = torch.cat([s["v"] for s in rbm.states(["v"], rbm.like())])
    betas = chains.betas(rbm.like()) if isinstance(chains, TemperedChains) else torch.ones(1)
    start = []
    for beta in betas:
        p = rbm.log_marginal({"v": states}, beta).softmax(0)
        v = states[torch.multinomial(p, 4000, replacement=True)]
        start.append({"v": v, "h": rbm.redrawn("h", {"v": v}, beta)})
    for layer in ("v", "h"):
        value = torch.stack([s[layer] for s in start])
        rbm.register_buffer(f"chain_{layer}", value if len(betas) > 1 else value[0])
    chains(rbm, {}, advance=True)
    last = rbm.chain_v[-1] if len(betas) > 1 else rbm.chain_v
    p = rbm.log_marginal({"v": states}).softmax(0)
    mean = p @ states
    assert ((last.mean(0) - mean).abs() < 4.5 * (mean * (1 - mean) / 4000).sqrt()).all()


def test_fast_weights_drive_the_chains_and_decay() -> None:
    rbm = machine()
    loss = BoltzmannELBO(negative=FastPersistentChains(50, 1, fast_rate=0.1, decay=0.5))
    loss.differentiable_loss(rbm.model, rbm.guide, V)
    first = rbm.fast_v_h.clone()
    assert first.abs().max() > 0
    loss.differentiable_loss(rbm.model, rbm.guide, V)
    assert (rbm.fast_v_h - 0.5 * first).abs().max() > 0
    assert rbm.fast_v_h.abs().max() < 2 * 0.1
    before = rbm.fast_v_h.clone()
    loss.loss(rbm.model, rbm.guide, V)
    assert torch.equal(rbm.fast_v_h, before)


@pytest.mark.parametrize("negative", ["persistent", "contrastive", "fast", "tempered", "mean_field", "exact"])
def test_every_negative_phase_learns(negative: Any) -> None:
    torch.manual_seed(0)
    rbm = RestrictedBoltzmannMachine(4, 4)
    before = rbm.distribution().log_prob(V).mean()
    svi = SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(50, 1, negative=negative))
    for _ in range(150):
        svi.step(V)
    assert rbm.distribution().log_prob(V).mean() > before + 0.5


def fitted(steps: int, **options: Any) -> Any:
    torch.manual_seed(0)
    rbm = RestrictedBoltzmannMachine(4, 3)
    return pplvi.fit(
        rbm.model,
        rbm.guide,
        args=(V,),
        objective=BoltzmannELBO(num_chains=10, sweeps=1),
        optim=pyro.optim.SGD({"lr": 0.1}),
        num_steps=steps,
        schedule=None,
        progress=False,
        seed=0,
        **options,
    )


@pytest.mark.parametrize("compile", [False, "trace"])
def test_fit_resumes_bit_by_bit_with_its_chains(tmp_path: Path, compile: Any) -> None:
    path = tmp_path / "run.pt"
    whole = fitted(40, compile=compile)
    pyro.clear_param_store()
    fitted(20, checkpoint=path, compile=compile)
    pyro.clear_param_store()
    resumed = fitted(40, resume=path, compile=compile)
    assert whole.runs[0].losses == resumed.runs[0].losses
    same(whole.runs[0].params, resumed.runs[0].params)
    same(whole.runs[0].buffers(), resumed.runs[0].buffers())
    assert any(name.endswith("chain_v") for name in resumed.runs[0].buffers())


def test_recorded_steps_of_fit_are_those_of_svi() -> None:
    plain, recorded = fitted(30, compile=False).runs[0], fitted(30, compile="trace").runs[0]
    assert [float(x) for x in recorded.losses] == pytest.approx([float(x) for x in plain.losses])
    same(recorded.params, plain.params)
    same(recorded.buffers(), plain.buffers())


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_weights_that_are_no_numbers_are_taken_back_with_the_chains() -> None:
    torch.manual_seed(0)
    rbm = RestrictedBoltzmannMachine(4, 3)
    poisoned: list[int] = []

    def poison(run: Any) -> None:
        if run.step == 60 and not poisoned:
            poisoned.append(run.step)
            rbm.weight("v", "h").data[0, 0] = torch.nan

    with pytest.warns(UserWarning, match=r"Went back to step 50"):
        fit = pplvi.fit(
            rbm.model, rbm.guide, args=(V,), objective=BoltzmannELBO(10, 1), optim=pyro.optim.SGD({"lr": 0.1}),
            num_steps=120, schedule=None, progress=False, seed=0, compile=False, callbacks=[poison],
        )  # fmt: skip
    assert fit.runs[0].rollbacks == 1
    assert all(p.isfinite().all() for p in rbm.parameters())
    assert rbm.chain_v.isfinite().all()


def test_chains_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fitted(20, checkpoint=path, compile=False)
    pyro.clear_param_store()
    rbm = RestrictedBoltzmannMachine(4, 3)
    with pytest.raises(ValueError, match=r"buffers differ.*chain_h"):
        pplvi.fit(
            rbm.model, rbm.guide, args=(V,), objective=BoltzmannELBO(num_chains=12, sweeps=1), num_steps=40,
            optim=pyro.optim.SGD({"lr": 0.1}), schedule=None, progress=False, seed=0, resume=path, compile=False,
        )  # fmt: skip


def test_each_restart_has_chains_of_its_own() -> None:
    fit = fitted(30, restarts=2, compile=False)
    first, second = (run.buffers() for run in fit.runs)
    chain = next(name for name in first if name.endswith("chain_v"))
    assert first[chain] is not second[chain]
    assert not torch.equal(first[chain], second[chain])


def test_a_surrogate_neither_stops_training_nor_chooses() -> None:
    assert BoltzmannELBO().monitor is None
    assert fitted(300, compile=False).runs[0].reason == "num_steps"
    plain = fitted(60, compile=False, restarts=3)
    scores = [float(torch.tensor(run.losses[-6:]).mean()) for run in plain.runs]
    assert plain.best == 0 != scores.index(min(scores))  # the losses favour another restart, and are not asked
    rbm_free_energy = pplvi.ELBO(num_particles=4)  # a bound up to log Z
    named = fitted(60, compile=False, restarts=3, monitor=rbm_free_energy)
    ends = [run.monitored[-1] for run in named.runs]
    assert named.best == ends.index(min(ends))


def test_compiled_steps_move_chains_and_learn() -> None:
    rbm = RestrictedBoltzmannMachine(4, 3)
    before = rbm.distribution().log_prob(V).mean()
    svi = pplvi.CompiledSVI(
        rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.1}), BoltzmannELBO(20, sweeps=1), mode="trace"
    )
    svi.step(V)
    chains = rbm.chain_v.clone()
    svi.run(200, V)
    assert not torch.equal(chains, rbm.chain_v)
    assert rbm.distribution().log_prob(V).mean() > before + 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoltzmannELBO(negative="gibbs"), "negative='gibbs': expected 'persistent'"),
        (lambda: BoltzmannELBO(num_chains=0), "num_chains=0"),
        (lambda: BoltzmannELBO(sweeps=0), "sweeps=0"),
        (lambda: BoltzmannELBO(offset_rate=0.0), "offset_rate"),
        (lambda: TemperedChains(num_temperatures=1), "num_temperatures=1: expected a whole number of at least 2"),
        (lambda: FastPersistentChains(decay=1.0), "decay"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_other_chains_on_one_machine_are_refused_until_forgotten() -> None:
    rbm = machine()
    BoltzmannELBO(10, 1).differentiable_loss(rbm.model, rbm.guide, V)
    other = BoltzmannELBO(20, 1)
    with pytest.raises(ValueError, match=r"\(10,\).*\(20,\).*forget_chains"):
        other.differentiable_loss(rbm.model, rbm.guide, V)
    rbm.forget_chains()
    other.differentiable_loss(rbm.model, rbm.guide, V)
    assert rbm.chain_v.shape == (20, 4)


@pytest.mark.parametrize("through", [lambda rbm: rbm.model, traced], ids=["its own program", "a traced program"])
def test_grey_data_are_refused_in_training(through: Any) -> None:
    rbm = machine()
    with pytest.raises(ValueError, match=r"threshold.*torch\.bernoulli"):
        BoltzmannELBO().differentiable_loss(through(rbm), rbm.guide, torch.full((2, 4), 0.5))


def test_a_model_without_energy_is_refused() -> None:
    def model() -> None:
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no energy"):
        BoltzmannELBO().differentiable_loss(model, model)


def test_a_sparsity_target_is_approached() -> None:
    torch.manual_seed(0)
    rbm = RestrictedBoltzmannMachine(4, 8, centered=False)
    loss = BoltzmannELBO(50, 1) + 1.0 * SparsityPenalty(0.1)
    svi = SVI(rbm.model, rbm.guide, pyro.optim.SGD({"lr": 0.1}), loss)
    for _ in range(200):
        svi.step(V)
    assert (rbm.guide.factorised(V).means["h"].mean(0) < 0.25).all()
    torch.testing.assert_close(
        torch.autograd.grad(SparsityPenalty(0.1).differentiable_loss(rbm.model, rbm.guide, V), rbm.bias("h"))[0],
        torch.autograd.grad(_cross_entropy(rbm), rbm.bias("h"))[0],
    )
    with pytest.raises(ValueError, match="between 0 and 1"):
        SparsityPenalty(1.0)
    with pytest.raises(ValueError, match="factorised"):
        SparsityPenalty().loss(traced(rbm), rbm.guide, V)


def _cross_entropy(rbm: RestrictedBoltzmannMachine) -> Tensor:
    q = torch.sigmoid(V @ rbm.weight("v", "h") + rbm.bias("h")).mean(0)
    return -(0.1 * q.log() + 0.9 * (1 - q).log()).sum()


def test_weights_are_limited_in_norm() -> None:
    rbm = machine()
    before = rbm.weight("v", "h").detach().clone()
    rbm.limit_norms(1.0)
    after = rbm.weight("v", "h")
    assert (after.norm(dim=0) <= 1.0 + 1e-9).all()
    assert (before.norm(dim=0) > 1.0).any()
    small = before.norm(dim=0) <= 1.0
    assert torch.equal(after[:, small], before[:, small])
    with pytest.raises(ValueError, match="positive"):
        rbm.limit_norms(0.0)


@pytest.mark.parametrize("chains", [EveryState(), MeanFieldContrastiveDivergence(), FastPersistentChains()], ids=str)
def test_chains_that_need_fields_refuse_other_energies(chains: Chains) -> None:
    other = EnergyModel({"v": BernoulliUnits(3)}, centered=False, name="")
    with pytest.raises(ValueError, match=rf"{type(chains).__name__} of EnergyModel.*expected a BoltzmannMachine"):
        chains.move(other, {"v": torch.zeros(2, 3)}, False)


def test_masked_data_have_no_share_in_log_z() -> None:
    """Of a mean over four data of which two are masked, both phases are half as large as of the two alone."""
    v = torch.cat([V, V[:1]])
    mask = torch.tensor([True, False, True, False])
    rbm = machine()

    def masked(v: Tensor) -> Any:
        with pyro.poutine.mask(mask=mask):
            return rbm.model(v)

    loss = BoltzmannELBO(negative="exact")
    found = gradients(rbm, loss.differentiable_loss(masked, rbm.guide, v))
    alone = gradients(rbm, loss.differentiable_loss(rbm.model, rbm.guide, v[mask]))
    same(found, {name: gradient / 2 for name, gradient in alone.items()})


def test_fast_weights_decay_by_their_factor() -> None:
    rbm = machine()
    loss = BoltzmannELBO(negative=FastPersistentChains(5, 1, fast_rate=1e-12, decay=0.3))
    loss.prepare(rbm.model, rbm.guide, V)
    fast = {name: buffer for name, buffer in rbm.named_buffers() if name.startswith("fast_")}
    for buffer in fast.values():
        buffer.normal_()
    before = {name: buffer.clone() for name, buffer in fast.items()}
    loss.loss_and_grads(rbm.model, rbm.guide, V)
    assert len(fast) == 3
    same(fast, {name: 0.3 * buffer for name, buffer in before.items()})
