"""Does a Boltzmann machine overfit, do its chains mix, what does it make of half an image?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.energy import EnergyModel
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count, Seed
from pplvi.posterior.arviz.quiet import arviz_itself
from pplvi.programs.state import random_state
from pplvi.types import Values

__all__ = ["FreeEnergyGap", "Mixing", "chain_mixing", "free_energy_gap", "inpaint"]


class FreeEnergyGap(NamedTuple):
    """Mean free energy of validation data less that of training data, in nats for each datum.

    :ivar value: the gap; it does not depend on ``log Z``, and grows when a machine overfits.
    :ivar standard_error: of the gap, over data.
    """

    value: float
    standard_error: float


@checked
def free_energy_gap(machine: EnergyModel, training: Tensor | Values, validation: Tensor | Values) -> FreeEnergyGap:
    """How much more likely a machine finds its training data (Hinton 2010, section 6).

    :param training: data that it was trained on, ``(num_data, width)``, or values by name; some are enough.
    :param validation: data that it was not trained on.
    :raises ValueError: if hidden layers cannot be summed out exactly, or for data outside the support.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(4, 2, init_scale=0.0)
    >>> free_energy_gap(rbm, torch.zeros(5, 4), torch.ones(5, 4)).value
    0.0
    """
    with torch.no_grad():
        seen, unseen = (-machine.log_marginal(machine.checked(v)).double() for v in (training, validation))
    error = (seen.var() / len(seen) + unseen.var() / len(unseen)).sqrt()
    return FreeEnergyGap(float(unseen.mean() - seen.mean()), float(error))


class Mixing(NamedTuple):
    """How chains of Gibbs sampling mix, by their free energies.

    :ivar r_hat: of all chains; near 1 when they forget where they came from.
    :ivar ess: effective sample size of all chains and sweeps together.
    :ivar changed: share of the visible units that one sweep changes.
    :ivar free_energy: of every chain at every sweep, ``(num_chains, num_sweeps)``, in nats.
    """

    r_hat: float
    ess: float
    changed: float
    free_energy: Tensor


@checked
def chain_mixing(
    machine: EnergyModel,
    num_chains: Count = 20,
    num_sweeps: Count = 200,
    *,
    start: Mapping[str, Tensor] | None = None,
    seed: Seed | None = None,
) -> Mixing:
    """Run chains and see how well they mix (Vehtari et al. 2021 for R-hat and the effective sample size).

    :param num_chains: chains, from the base measures.
    :param num_sweeps: Gibbs sweeps of each; at least 4.
    :param start: where the chains start instead, ``(num_chains, width)`` by layer: data, or persistent chains; with
        ``"given"`` for a conditional machine.
    :param seed: seed of the chains; the process's random state stays as it was.
    :raises ValueError: for fewer than 2 chains or 4 sweeps.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> mixing = chain_mixing(RestrictedBoltzmannMachine(6, 3), num_chains=4, num_sweeps=50, seed=0)
    >>> mixing.r_hat < 1.1, mixing.free_energy.shape
    (True, torch.Size([4, 50]))
    """
    if num_chains < 2 or num_sweeps < 4:
        raise ValueError(f"num_chains={num_chains}, num_sweeps={num_sweeps}: expected at least 2 chains and 4 sweeps.")
    arviz = arviz_itself()
    energies, changed = [], []
    with random_state(seed), torch.no_grad():
        values = {**machine.draw((num_chains,)), **(start or {})}
        for _ in range(num_sweeps):
            moved = machine.gibbs(values)
            changed.append((moved[machine.visible] != values[machine.visible]).double().mean())
            values = moved
            kept = {layer: values[layer] for layer in machine.classes[0]}
            energies.append(-machine.log_marginal({**kept, **machine.conditions(values)}))
    trace = torch.stack(energies, 1).double()
    chains = trace.cpu().numpy()
    return Mixing(float(arviz.rhat(chains)), float(arviz.ess(chains)), float(torch.stack(changed).mean()), trace)


@checked
def inpaint(
    machine: BoltzmannMachine,
    v: Tensor | Values,
    observed: Tensor,
    *,
    num_sweeps: Count = 500,
    num_draws: Count = 10,
    seed: Seed | None = None,
) -> Tensor:
    """Mean values of missing visible units given the others, ``(num_data, width)``, by clamped Gibbs sampling.

    :param v: data, ``(num_data, width)``, or values by name; missing entries may hold anything.
    :param observed: which units were seen, ``(num_data, width)`` or ``(width,)``, boolean.
    :param num_sweeps: sweeps of a chain; conditional means are averaged over its second half.
    :param num_draws: chains of each datum.
    :param seed: seed of the chains; the process's random state stays as it was.
    :raises ValueError: for a mask of another shape, values outside the support, or fewer than two sweeps.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> rbm = RestrictedBoltzmannMachine(3, 2, init_scale=0.0)
    >>> inpaint(rbm, torch.ones(1, 3), torch.tensor([True, True, False]), num_sweeps=2, seed=0)
    tensor([[1.0000, 1.0000, 0.5000]])
    """
    layer = machine.visible
    known = machine.checked(v, observed)
    v = known[layer]
    if num_sweeps < 2:
        raise ValueError(f"num_sweeps={num_sweeps}: expected at least 2.")
    with random_state(seed), torch.no_grad():
        values = {**machine.draw((num_draws, len(v))), **machine.conditions(known)}
        values[layer] = torch.where(observed, v, values[layer])
        total, count = torch.zeros_like(v), 0
        for sweep in range(num_sweeps):
            values = machine.gibbs(values, clamped={layer: observed})
            if 2 * sweep >= num_sweeps:
                total += machine.layers[layer].mean(machine.field(layer, values)).mean(0)
                count += 1
    return torch.where(observed, v, total / count)
