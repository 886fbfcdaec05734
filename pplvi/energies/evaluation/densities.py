"""What undirected models say of their densities to the table over models of all families."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pplvi.energies.evaluation.partition import annealed_importance_sampling
from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.energies.machines.dbn import DeepBeliefNetwork
from pplvi.energies.machines.energy import EnergyModel
from pplvi.evaluation.estimates import Unnormalised, unnormalised

NUM_CHAINS, NUM_BETAS, NUM_SWEEPS = 200, 2000, 500
LEAST_SHARE = 0.1  # of the chains that count, for an estimate that is ranked


@unnormalised.register
def _(machine: EnergyModel, seed: int | None) -> Unnormalised:
    """Nothing is known of the constant: a bound without it would be none.

    :raises ValueError: always.
    """
    raise ValueError(
        f"the density of {type(machine).__name__} is known but for a constant that nothing estimates: expected a "
        "BoltzmannMachine or a DeepBeliefNetwork."
    )


@unnormalised.register
def _(machine: BoltzmannMachine, seed: int | None) -> Unnormalised:
    """Exact where few enough units are left to enumerate; by annealed importance sampling otherwise."""

    def log_density(x: Tensor) -> Tensor:
        return machine.log_marginal({machine.visible: machine.checked(x)[machine.visible]})

    def sample(count: int) -> Tensor:
        return machine.gibbs(machine.draw((count,)), NUM_SWEEPS)[machine.visible]

    return _known(machine, log_density if machine.sums_out(machine.hidden) else None, sample, seed)


@unnormalised.register
def _(network: DeepBeliefNetwork, seed: int | None) -> Unnormalised:
    """The constant is that of the top machine; densities are bounded by a guide."""

    def sample(count: int) -> Tensor:
        return network.generate(count, num_sweeps=NUM_SWEEPS)[network.visible]

    return _known(network.top, None, sample, seed)


def _known(
    machine: BoltzmannMachine,
    log_density: Callable[[Tensor], Tensor] | None,
    sample: Callable[[int], Tensor],
    seed: int | None,
) -> Unnormalised:
    try:
        return Unnormalised(log_density, machine.log_partition().item(), None, None, True, sample)
    except ValueError:  # too many states
        found = annealed_importance_sampling(machine, NUM_CHAINS, NUM_BETAS, seed=seed)
    reliable = found.ess >= LEAST_SHARE * NUM_CHAINS
    return Unnormalised(log_density, found.log_z, found.interval, found.ess, reliable, sample)
