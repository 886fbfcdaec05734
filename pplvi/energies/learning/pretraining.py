"""Greedy training of deep machines, one layer after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.learning.stacking import Stage, stages
from pplvi.energies.machines.dbm import DeepBoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefNetwork
from pplvi.fitting.entry import fit
from pplvi.fitting.result import Fit
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Seed
from pplvi.losses.base import Loss
from pplvi.programs.state import preserved_rng


@checked
def pretrain(
    network: DeepBoltzmannMachine | DeepBeliefNetwork,
    data: Tensor,
    *,
    num_steps: Count | Sequence[Count] = 1000,
    batch_size: Count = 100,
    objective: Loss | None = None,
    optim: Any = None,
    seed: Seed | None = None,
    **options: Any,
) -> list[Fit]:
    r"""Train a deep machine greedily: each pair of layers as a restricted machine, on draws of the layers below.

    In a deep Boltzmann machine, whose hidden layers get input from both sides, the restricted machines have two copies
    of a neighbour that will not be the only one,

    .. math:: p(h_1 \mid v) = \sigma(2 v W_1 + b), \quad p(v \mid h_1) = \sigma(W_1 h_1 + a); \qquad
        p(h_{L-1} \mid h_L) = \sigma(2 W_L h_L + a), \quad p(h_L \mid h_{L-1}) = \sigma(h_{L-1} W_L + b),

    both layers of those between, so that weights go over as they are; the two biases of a layer are averaged. A deep
    belief network needs no copies, and its recognition weights start equal to the generative ones. The network is
    changed in place; labels of a machine are left as they were. Pyro's parameter store is as before.

    :param network: the machine.
    :param data: values of the visible layer, ``(num_data, width)``.
    :param num_steps: updates for each stage, or one number for every stage.
    :param batch_size: size of the minibatches.
    :param objective: for every stage; persistent contrastive divergence with ``batch_size`` chains unless given.
    :param optim: as for :func:`pplvi.fit`; SGD with learning rate 0.1 and momentum 0.5 unless given.
    :param seed: makes the result reproducible.
    :param options: other arguments of :func:`pplvi.fit`, such as ``callbacks``.
    :returns: the fits of the stages, bottom to top.
    :raises ValueError: for data outside the support, or another number of ``num_steps`` than of stages.

    Source: Hinton, Osindero & Teh (2006), "A fast learning algorithm for deep belief nets"; Salakhutdinov & Hinton
    (2009), "Deep Boltzmann machines", section 3.3.

    >>> dbm = DeepBoltzmannMachine([4, 3, 2])
    >>> v = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).repeat(10, 1)
    >>> fits = pretrain(dbm, v, num_steps=50, batch_size=10, seed=0)
    >>> len(fits), bool(dbm.weight("v", "h1").abs().mean() > 0.05)
    (2, True)
    """
    network.layers["v"].check(data, "v")
    steps = [num_steps] * network.depth if isinstance(num_steps, int) else list(num_steps)
    if len(steps) != network.depth:
        raise ValueError(f"num_steps={steps}: expected one number, or one for each of {network.depth} stages.")
    settings = {
        "objective": BoltzmannELBO(num_chains=batch_size, sweeps=1) if objective is None else objective,
        "optim": partial(torch.optim.SGD, lr=0.1, momentum=0.5) if optim is None else optim,
        "seed": seed,
        "progress": False,
        **options,
    }
    with preserved_rng(active=seed is not None):
        if seed is not None:
            pyro.set_rng_seed(seed)
        return _train(network, data, steps, batch_size, settings)


def _train(
    network: DeepBoltzmannMachine | DeepBeliefNetwork,
    data: Tensor,
    steps: Sequence[int],
    batch_size: int,
    settings: dict[str, Any],
) -> list[Fit]:
    found: list[Fit] = []
    passed: list[Stage] = []
    for stage, count in zip(stages(network), steps, strict=True):
        batches = _Batches(data, tuple(passed), stage, batch_size)
        with pyro.get_param_store().scope():
            machine = stage.machine
            found.append(fit(machine.model, machine.guide, data=batches, num_steps=count, **settings))
        stage.adopt()
        passed.append(stage)
    return found


class _Batches:
    """Minibatches for a stage: data in a new order every time, drawn anew through the stages below."""

    def __init__(self, data: Tensor, passed: Sequence[Stage], stage: Stage, size: int) -> None:
        self.data, self.passed, self.stage, self.size = data, passed, stage, size

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.data))
        for index in order.split(self.size):
            value = self.data[index]
            for stage in self.passed:
                value = stage.sample(value)
            yield self.stage.inputs(value)
