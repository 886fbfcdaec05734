"""Buffers of compiled steps: they change once a step, are saved and resumed."""

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from step_cases import CASES, DATA, MODES, SGD, Autoencoder, Case, no_guide
from torch import Tensor, nn

from pplvi.compile.svi import CompiledSVI
from pplvi.compile.tracing import Untraceable
from pplvi.energies import RestrictedBoltzmannMachine
from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.losses.elbo import ELBO


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
@pytest.mark.table(9)
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
@pytest.mark.table(5)
def test_buffers_are_saved_and_resumed(name, mode, inductor_noise):
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
