"""MCMC chains one after another in this process, each from a seed of its own, as one ``pyro.infer.MCMC``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

_FEWEST = 4  # draws that a diagnostic can be made of
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
    chains: Sequence[int],
    *,
    num_samples: int,
    num_warmup: int,
    seed: int | None,
    progress: bool = True,
) -> MCMC:
    """Draw chain after chain; chain ``c`` has the seed ``seed + c``. With a seed, the global random state stays.

    :param chains: numbers of the chains that are drawn here.
    :param num_samples: draws of each chain after warm-up.
    :param num_warmup: steps of each chain that adapt the kernel and are dropped.
    :returns: one ``MCMC`` that holds the chains, fewer than asked for if the user interrupted them; of one that was
        interrupted after its warm-up, with none before it, the draws so far.
    """
    done: list[MCMC] = []
    with preserved_rng(active=seed is not None):
        for index in chains:
            if seed is not None:
                pyro.set_rng_seed(seed + index)

            kept = _Kept()

            def run(kept: _Kept = kept) -> MCMC:
                kept.draws.clear()
                kept.chain = chain = MCMC(
                    make_kernel(model),
                    num_samples=num_samples,
                    warmup_steps=num_warmup,
                    disable_progbar=not progress,
                    hook_fn=kept,
                )
                chain.run(*args, **kwargs)
                return chain

            try:
                with explained():
                    done.append(retried(run))  # its first draws may have no density, later ones are rejected
            except KeyboardInterrupt:
                if not done and len(kept.draws) < _FEWEST:
                    raise
                if not done:
                    done.append(kept.cut_short())
                break
    return joined_chains(done)


class _Kept:
    """What a chain has drawn after its warm-up, in unconstrained space, should it be interrupted."""

    def __init__(self) -> None:
        self.draws: list[Mapping[str, Tensor]] = []
        self.chain: Any = None

    def __call__(self, kernel: Any, draw: Mapping[str, Tensor], stage: str, step: int) -> None:
        if not stage.lower().startswith("warm"):
            self.draws.append(draw)

    def cut_short(self) -> MCMC:
        """The chain with the draws that there are."""
        chain: MCMC = self.chain
        found = {name: torch.stack([draw[name] for draw in self.draws])[None] for name in self.draws[0]}
        transforms = chain.kernel.transforms or {}
        chain._samples = {n: transforms[n].inv(x) if n in transforms else x for n, x in found.items()}
        chain._diagnostics = [chain.kernel.diagnostics()]
        chain.num_samples = len(self.draws)
        return chain


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
