"""Posteriors of sequential Monte Carlo runs: islands of particles as chains of equal weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pplvi.posterior.posterior import Posterior
from pplvi.programs.errors import explained
from pplvi.programs.ways import Vectorize
from pplvi.types import Call, Program


@explained()
def posterior_of_islands(
    islands: Mapping[str, Tensor],
    evidence: Tensor,
    model: Program,
    call: Call,
    vectorize: Vectorize = None,
    chunk_size: int | None = None,
) -> Posterior:
    """The draws of a sequential Monte Carlo run, equally weighted, scored by the model; each island is a chain.

    It has no guide density and no k-hat (NaN). Its evidence is that of the islands, with an error by their spread.

    Source: Del Moral, Doucet and Jasra 2006, Sequential Monte Carlo samplers.

    :param islands: draws of the latent sites, constrained, ``(islands, draws, *plates, *event)`` each.
    :param evidence: log evidence by each island, ``(islands,)``, in nats.
    :param model: the model it was run on.
    :param call: its positional and keyword arguments.
    :param vectorize: the way of running draws, as for a guide.
    :param chunk_size: score at most so many draws in one call; chosen as for a guide unless given.
    :raises ValueError: if there are no draws, or another number of islands than of evidences.

    >>> import pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)
    >>> y, z = torch.tensor(0.5), 0.25 + 0.5**0.5 * torch.randn(4, 100)
    >>> posterior = posterior_of_islands({"z": z}, torch.full((4,), -1.328), model, ((y,), {}))
    >>> round(posterior.total_log_evidence.value, 3), posterior.pareto_k
    (-1.328, tensor(nan))
    """
    sizes = {name: tuple(value.shape[:2]) for name, value in islands.items()}
    if not sizes or len(set(sizes.values())) > 1 or {size[0] for size in sizes.values()} != set(evidence.shape):
        raise ValueError(
            f"islands has draws of {sizes} and evidence the shape {tuple(evidence.shape)}: expected draws (islands, "
            "draws, ...) of every latent site, and an evidence of each island."
        )
    return Posterior.of_chains(islands, model, *call, vectorize, chunk_size, evidence=evidence)
