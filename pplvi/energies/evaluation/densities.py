"""What machines say of their densities to the table over models of all families."""

from __future__ import annotations

from torch import Tensor

from pplvi.energies.evaluation.partition import annealed_importance_sampling
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.evaluation.estimates import Unnormalised, unnormalised

NUM_CHAINS, NUM_BETAS, NUM_SWEEPS = 200, 2000, 500
LEAST_SHARE = 0.1  # of the chains that count, for an estimate that is ranked


@unnormalised.register
def _(machine: BoltzmannMachine, seed: int | None) -> Unnormalised:
    """Exact where few enough units are left to enumerate; by annealed importance sampling otherwise."""

    def log_density(x: Tensor) -> Tensor:
        return machine.log_marginal({machine.visible: machine.checked(x)[machine.visible]})

    def sample(count: int) -> Tensor:
        return machine.gibbs(machine.draw((count,)), NUM_SWEEPS)[machine.visible]

    sums_out = log_density if machine.sums_out(machine.hidden) else None
    try:
        return Unnormalised(sums_out, machine.log_partition().item(), None, None, True, sample)
    except ValueError:  # too many states
        found = annealed_importance_sampling(machine, NUM_CHAINS, NUM_BETAS, seed=seed)
    reliable = found.ess >= LEAST_SHARE * NUM_CHAINS
    return Unnormalised(sums_out, found.log_z, found.interval, found.ess, reliable, sample)
