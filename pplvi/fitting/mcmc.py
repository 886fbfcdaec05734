"""MCMC chains one after another in this process, each from a seed of its own, as one ``pyro.infer.MCMC``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pplvi.programs.errors import explained
from pplvi.programs.factorising import retried
from pplvi.programs.state import preserved_rng
from pplvi.types import Program

KernelFactory = Callable[[Program], MCMCKernel]


def kernel_factory(kernel: Any) -> KernelFactory | None:
    """What makes an MCMC kernel from a model: ``"nuts"``, a kernel class, or a ``functools.partial`` of one.

    >>> kernel_factory("nuts") is NUTS, kernel_factory(partial(NUTS, max_tree_depth=5)).func is NUTS, kernel_factory(3)
    (True, True, None)
    """
    made: Any = NUTS if isinstance(kernel, str) and kernel == "nuts" else kernel
    inner = made.func if isinstance(made, partial) else made
    return made if isinstance(inner, type) and issubclass(inner, MCMCKernel) else None


def run_chains(
    make_kernel: KernelFactory,
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_samples: int,
    num_warmup: int,
    num_chains: int,
    seed: int | None,
    progress: bool = True,
) -> MCMC:
    """Draw chain after chain; chain ``c`` has the seed ``seed + c``. With a seed, the global random state stays.

    :param num_samples: draws of each chain after warm-up.
    :param num_warmup: steps of each chain that adapt the kernel and are dropped.
    :returns: one ``MCMC`` that holds the chains, fewer than asked for if the user interrupted them.
    """
    chains: list[MCMC] = []
    with preserved_rng(active=seed is not None):
        for index in range(num_chains):
            if seed is not None:
                pyro.set_rng_seed(seed + index)

            def run() -> MCMC:
                chain = MCMC(
                    make_kernel(model), num_samples=num_samples, warmup_steps=num_warmup, disable_progbar=not progress
                )
                chain.run(*args, **kwargs)
                return chain

            try:
                with explained():
                    chains.append(retried(run))  # its first draws may have no density, later ones are rejected
            except KeyboardInterrupt:
                if not chains:
                    raise
                break
    return joined_chains(chains)


def joined_chains(chains: list[MCMC]) -> MCMC:
    """The first of several one-chain runs, with the draws and diagnostics of all of them."""
    first = chains[0]
    samples = [chain.get_samples(group_by_chain=True) for chain in chains]
    first._samples = {name: torch.cat([s[name] for s in samples]) for name in samples[0]}
    first._diagnostics = [chain._diagnostics[0] for chain in chains]
    first.num_chains = len(chains)
    return first


@dataclass(frozen=True)
class SavedChains:
    """What a file holds of an MCMC run, in the words of ``pyro.infer.MCMC``.

    :ivar samples: draws by site name, ``(num_chains, num_samples, ...)``.
    :ivar found: its diagnostics.

    >>> chains = SavedChains({"z": torch.zeros(2, 5)}, {})
    >>> chains.num_chains, chains.num_samples, chains.get_samples()["z"].shape
    (2, 5, torch.Size([10]))
    """

    samples: Mapping[str, Tensor]
    found: Mapping[str, Any]

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return len(next(iter(self.samples.values())))

    @property
    def num_samples(self) -> int:
        """Draws of each chain."""
        return next(iter(self.samples.values())).shape[1]

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws by site name, one chain after another unless they are grouped."""
        return {name: x if group_by_chain else x.flatten(0, 1) for name, x in self.samples.items()}

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample sizes, Gelman-Rubin statistics, acceptance rates and divergences, where there are any."""
        return dict(self.found)
