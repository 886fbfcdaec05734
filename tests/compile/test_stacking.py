"""Programs with many sites: alike operations on stacks give the step that they give one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from step_cases import CASES, SGD, assert_same, trajectory
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pplvi.compile import alike, backends, operations, stacking, svi
from pplvi.compile.stacking import Stacks, stacked_alike
from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Traced, lift_constants, record
from pplvi.losses.elbo import ELBO

X = torch.linspace(-1.0, 1.0, 80, dtype=torch.float64).reshape(5, 16).sin()
Y = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def coefficients() -> None:
    mean: Any = 0.0
    for i in range(12):
        mean = mean + pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0)) * X[:, i]
    pyro.sample("y", dist.Normal(mean, pyro.sample("s", dist.HalfNormal(1.0))).to_event(1), obs=Y)


def families() -> None:
    """Scalars and vectors, draws whose distribution depends on parameters."""
    total: Any = 0.0
    for i in range(8):
        total = total + pyro.sample(f"a_{i}", dist.Gamma(2.0, 1.0))
        total = total + pyro.sample(f"b_{i}", dist.Dirichlet(torch.ones(3)))[..., 1]
        total = total + (pyro.sample(f"c_{i}", dist.Normal(torch.zeros(2), 1.0).to_event(1)) * X[0, :2]).sum(-1)
    pyro.sample("y", dist.Normal(total, 1.0), obs=Y[0])


def family_guide() -> None:
    shape = pyro.param("shape", torch.tensor([2.0, 1.0, 3.0]), constraint=dist.constraints.positive)
    for i in range(8):
        pyro.sample(f"a_{i}", dist.Gamma(shape[0] + i, shape[1]))
        pyro.sample(f"b_{i}", dist.Dirichlet(shape))
        pyro.sample(f"c_{i}", dist.Normal(shape[:2], 0.5).to_event(1))


def groups() -> None:
    """Groups of two sizes, each with data of its own."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    for i in range(10):
        a = pyro.sample(f"a_{i}", dist.Normal(mu, tau))
        with pyro.plate(f"rows_{i}", 3 + i % 2):
            pyro.sample(f"y_{i}", dist.StudentT(4.0, a, 0.5), obs=X[i % 5, : 3 + i % 2])


def ragged(sizes: range = range(4, 14)) -> None:
    """Groups that are all of other sizes, with effects and data for each datum, and sums over each group."""
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    for i, n in enumerate(sizes):
        level = pyro.sample(f"level_{i}", dist.Normal(0.0, tau))
        with pyro.plate(f"rows_{i}", n):
            effect = pyro.sample(f"effect_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.StudentT(4.0, level + effect * X[0, :n].exp(), tau), obs=X[1, :n])
        pyro.sample(f"total_{i}", dist.Normal((effect[..., :n] ** 2).log1p().sum(-1), 1.0), obs=Y[1])


def walk() -> None:
    """Every site given the one before."""
    z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
    for t in range(1, 12):
        z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.3))
        pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=X[0, t])


def elements() -> None:
    """Elements of one vector, one by one and in pairs, and side by side again."""
    w = pyro.sample("w", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    for i, x in enumerate(X[:, :12].T):
        pyro.sample(f"x_{i}", dist.Normal(w[..., i, None], 1.0).to_event(1), obs=x)
    for i in range(10):
        pyro.sample(
            f"d_{i}", dist.Normal(w[..., i : i + 2] - w[..., i + 1 : i + 3].flip(-1), 1.0).to_event(1), obs=X[0, :2]
        )
    turned = torch.stack([w[..., 11 - i].exp() for i in range(12)], -1)
    pyro.sample("y", dist.Normal(turned @ X[:, :12].T, 1.0).to_event(1), obs=Y)


PROGRAMS: dict[str, tuple[Callable[[], None], Any]] = {
    "coefficients": (coefficients, AutoNormal),
    "coefficients, one vector": (coefficients, AutoDiagonalNormal),
    "families": (families, lambda model: family_guide),
    "groups": (groups, AutoNormal),
    "ragged": (ragged, AutoNormal),
    "ragged, one vector": (ragged, AutoDiagonalNormal),
    "walk": (walk, AutoNormal),
    "elements": (elements, AutoNormal),
}


def recorded(name: str, particles: int, noise: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Traced, Traced, Any]:
    """A step as it is recorded, the same on stacks, and what it is called with."""
    seen: list[Any] = []
    monkeypatch.setattr(svi, "stacked_alike", lambda *step, noise: seen.append(step) or step[0])
    model, guide = PROGRAMS[name]
    pyro.set_rng_seed(0)
    CompiledSVI(model, guide(model), SGD, ELBO(particles), mode="trace").run(0)
    trained = CompiledSVI(model, guide(model), SGD, ELBO(particles), mode="trace")
    trained.run(1)
    traced, inputs, carried = seen[-1]
    monkeypatch.setattr(stacking, "MANY", 0)
    return traced, stacked_alike(traced, inputs, carried, noise), inputs


@pytest.mark.parametrize(("name", "particles"), [(name, 1 + 2 * (i % 2)) for i, name in enumerate(PROGRAMS)])
def test_stacks_give_the_same_step_of_the_same_noise(name, particles, monkeypatch):
    plain, stacked, inputs = recorded(name, particles, False, monkeypatch)
    assert len(stacked.graph.graph.nodes) < len(plain.graph.graph.nodes) / 2
    with torch.no_grad():
        pyro.set_rng_seed(1)
        wanted = plain.graph(*inputs, *plain.constants)
        pyro.set_rng_seed(1)
        found = stacked.graph(*inputs, *stacked.constants)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_number_of_operations_does_not_grow_with_that_of_sites():
    def step(n: int) -> Traced:
        def model() -> None:
            for i in range(n):
                pyro.sample(f"y_{i}", dist.Normal(pyro.sample(f"w_{i}", dist.Normal(0.0, 1.0)), 1.0), obs=Y[1])

        pyro.clear_param_store()
        compiled = CompiledSVI(model, AutoNormal(model), SGD, ELBO(), mode=True)
        compiled.prepare((), {})
        return compiled.recorded(svi.Arguments.of((), {}))

    assert len(step(26).graph.graph.nodes) == len(step(22).graph.graph.nodes) < 150


def test_the_number_of_operations_does_not_grow_with_that_of_sizes():
    def step(*data: Tensor) -> int:
        def model(*data: Tensor) -> None:
            for i, y in enumerate(data):
                theta = pyro.sample(f"theta_{i}", dist.Normal(0.0, 1.0))
                with pyro.plate(f"rows_{i}", len(y)):
                    pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=y)

        pyro.clear_param_store()
        compiled = CompiledSVI(model, AutoNormal(model), SGD, ELBO(), mode=True)
        compiled.prepare(data, {})
        graph = compiled.recorded(svi.Arguments.of(data, {})).graph.graph
        return sum(node.op == "call_function" for node in graph.nodes)

    assert step(*(torch.ones(8 + i // 3) for i in range(24))) <= step(*(torch.ones(8 + i % 4) for i in range(24))) < 180


def test_padding_is_in_no_sum_whatever_stands_there():
    """Logarithms of what is left of zero are in the padding of the exponentials' logarithms."""
    parts = [torch.linspace(0.5, 2.0, n) for n in (4, 5, 6, 7)]

    def step(x: Tensor) -> tuple[Tensor, ...]:
        logs = [(part * x[i] - x[i] * part.min() / 2).log() for i, part in enumerate(parts)]
        sums = [log.sum() for log in logs] + [log.sin().sum(0, keepdim=True).exp()[0] for log in logs]
        return x, sum(sums, torch.zeros(())), torch.cat(logs), torch.stack([log[:4] for log in logs])

    inputs = [torch.linspace(1.0, 2.0, 4)]
    traced = record(step, inputs, {}, 1)
    stacked = Stacks(traced, inputs, 1, False)
    assert any(unit.size == (7,) and unit.kind == "call" for unit in stacked._units)
    torch.testing.assert_close(stacked(*inputs), traced.graph(*inputs, *traced.constants))


def test_draws_that_are_taken_together_are_independent_standard_ones():
    def step(x: Tensor) -> tuple[Tensor, ...]:
        draws = [torch.randn(3) for _ in range(400)]
        rest = [torch.rand(()) for _ in range(400)]
        shaped = [torch._standard_gamma(x[:1] + 1.0) for _ in range(400)]
        return x, torch.stack([d * 1.0 for d in draws]), torch.stack(rest), torch.cat(shaped)

    inputs = [torch.ones(2)]
    stacked = stacked_alike(record(step, inputs, {}, 1), inputs, 1, noise=True)
    assert len(stacked.graph.graph.nodes) < 60
    pyro.set_rng_seed(0)
    _, normal, uniform, gamma = stacked.graph(*inputs, *stacked.constants)
    for draws, law in (
        (normal, dist.Normal(0.0, 1.0)),
        (uniform, dist.Uniform(0.0, 1.0)),
        (gamma, dist.Gamma(2.0, 1.0)),
    ):
        ranks = law.cdf(draws).flatten().sort().values
        distance = (ranks - torch.arange(len(ranks)) / len(ranks)).abs().max()
        assert distance < 1.63 / len(ranks) ** 0.5  # Kolmogorov's test at 1 %
        assert len(ranks.unique()) == len(ranks)
    assert abs(torch.corrcoef(normal[:, :2].T)[0, 1]) < 0.2  # four standard errors


def test_what_is_written_to_is_another_value_from_there_on():
    """Buffers, and draws that are kept from zero in place."""
    running = torch.zeros(2)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        parts = [x * i for i in range(200)]
        before = [part.exp() for part in parts]
        after = [part.clamp_(min=1.0).sin() for part in parts]
        running.add_(parts[3])
        return x, sum(before, torch.zeros(())), sum(after, torch.zeros(())), running * 1.0

    traced = record(step, [torch.ones(2)], {}, 1)
    inputs = [torch.tensor([0.25, -0.5]), torch.ones(2)]
    stacked = stacked_alike(traced, inputs, 2, noise=False)
    assert len(stacked.graph.graph.nodes) < 250  # of a thousand; factors differ, so that products stay single
    found, wanted = (t.graph(*inputs, *t.constants) for t in (stacked, traced))
    torch.testing.assert_close(found, wanted)


def test_a_graph_that_writes_to_part_of_a_value_is_left_as_it_is():
    def step(x: Tensor) -> tuple[Tensor, ...]:
        whole = x * 2.0
        whole[0].add_(1.0)
        return x, sum(((whole + i).exp().sum() for i in range(500)), torch.zeros(()))

    traced = record(step, [torch.ones(2)], {}, 1)
    assert stacked_alike(traced, [torch.ones(2)], 1, noise=False) is traced


@pytest.mark.parametrize("put", [False, True])
def test_parts_under_masks_of_their_own_are_taken_one_by_one(put):
    """How much a mask takes is the shape of what comes out, which a stack of masks has not."""
    masks = [torch.arange(4) % 3 != i % 3 for i in range(30)]
    masks = [mask for mask in masks if int(mask.sum()) == 3]

    def step(x: Tensor) -> tuple[Tensor, ...]:
        parts = [(x * (i + 1.0)).sin().exp() for i in range(len(masks))]
        taken = [torch.ops.aten.index.Tensor(part, [mask]) for part, mask in zip(parts, masks, strict=True)]
        if put:
            taken = [part.index_put((mask,), part[:3]) for part, mask in zip(parts, masks, strict=True)]
        ends = [(part.cos() * 2.0).tanh().exp().log1p().sin().exp().tanh().cos() for part in taken]
        return x, sum((end.sum() for end in ends), torch.zeros(()))

    traced = record(step, [torch.ones(4)], {}, 1)
    inputs = [torch.linspace(-1.0, 1.0, 4)]
    stacked = Stacks(traced, inputs, 1, False)
    assert len(stacked) < len(traced.graph.graph.nodes) / 2
    torch.testing.assert_close(stacked(*inputs), traced.graph(*inputs, *traced.constants))


def test_stacks_of_numbers_on_the_cpu_are_where_the_parameters_are():
    """A single number of the CPU goes with a tensor of any device, here one without memory; a stack does not."""
    numbers = [torch.tensor(i + 1.0) for i in range(200)]

    def step(x: Tensor) -> tuple[Tensor, ...]:
        noise = [torch.randn(3, device=x.device) for _ in range(200)]
        parts = [x * c.log() + e for c, e in zip(numbers, noise, strict=True)]
        return x, sum(((part * c).exp().sin() for part, c in zip(parts, numbers, strict=True)), torch.zeros(()))

    here, there = [torch.ones(3)], [torch.ones(3, device="meta")]
    graph = make_fx(step)(*there)
    traced = Traced(graph, lift_constants(graph, 1))
    found = stacked_alike(traced, there, 1, noise=True)
    kept = stacked_alike(record(step, here, {}, 1), here, 1, noise=True)
    assert len(found.graph.graph.nodes) < 260 > len(kept.graph.graph.nodes)  # the numbers, and a few
    assert found.graph(*there, *found.constants)[1].is_meta


def test_a_short_graph_is_left_as_it_is():
    traced = record(lambda x: (x, sum(x[i].exp() for i in range(2))), [torch.ones(2)], {}, 1)
    assert stacked_alike(traced, [torch.ones(2)], 1, noise=True) is traced


@pytest.mark.table(5)
@pytest.mark.parametrize("name", CASES)
def test_steps_of_every_shape_on_stacks_equal_eager_ones(name, monkeypatch):
    """Stacks wherever two operations are alike, also where they do not pay."""
    monkeypatch.setattr(stacking, "MANY", 0)
    monkeypatch.setattr(stacking, "WORTH", 100.0)
    monkeypatch.setattr(alike, "LEAST", 2)
    monkeypatch.setattr(stacking, "LEAST", 2)
    monkeypatch.setattr(operations, "LEAST", 2)
    assert_same(trajectory(CASES[name], "trace"), trajectory(CASES[name], "SVI"))


def test_a_compiled_step_of_many_sites_learns_what_one_of_stacks_would():
    pyro.set_rng_seed(0)
    compiled = CompiledSVI(coefficients, AutoNormal(coefficients), partial(torch.optim.Adam, lr=0.02), ELBO(8))
    losses = compiled.run(300)
    assert losses[-50:].mean() < losses[:10].mean()
    eager = torch.stack([torch.tensor(ELBO(100).loss(coefficients, compiled.guide)) for _ in range(5)])
    assert abs(eager.mean() - losses[-50:].mean()) < 4 * (losses[-50:].std() / 50**0.5 + eager.std() / 5**0.5)


def test_a_compiled_step_takes_data_side_by_side_and_as_they_are_at_the_time(monkeypatch):
    seen: list[int] = []
    shared = backends._shared
    monkeypatch.setattr(backends, "_shared", lambda *x: seen.append(len(x[-1])) or shared(*x))
    data = [torch.linspace(-1.0, 1.0, 3 + i % 5) for i in range(40)]

    def model(data: list[Tensor]) -> None:
        for i, y in enumerate(data):
            theta = pyro.param(f"theta_{i}", torch.zeros(()))
            pyro.sample(f"y_{i}", dist.Normal(theta, 1.0).expand(y.shape).to_event(1), obs=y)

    def guide(data: list[Tensor]) -> None: ...

    pyro.clear_param_store()
    compiled = CompiledSVI(model, guide, SGD, ELBO())
    for _ in range(2):
        wanted = ELBO().loss(model, guide, data)
        torch.testing.assert_close(compiled.run(1, data), torch.tensor([wanted]))
        data[3].add_(1.0)
    assert seen[0] < 20
