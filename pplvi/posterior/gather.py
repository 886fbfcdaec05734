"""Weights of batch elements, carried over to sites: which draw of which site a weight or an index belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pplvi.posterior.draws import Draws
from pplvi.programs.sites import Plate


def align(per_batch: Tensor, batch: Sequence[Plate], plates: Sequence[Plate]) -> Tensor:
    """Give a tensor of shape ``(S, *batch)`` the dimensions of a site, size 1 where a plate is not of the batch.

    :param per_batch: weights or indices, one column for each batch element.
    :param batch: the plates of its dimensions, left to right.
    :param plates: the plates of the site, left to right; the batch is among them.
    :returns: a view of shape ``(S, *plates)`` with ones in it, which broadcasts against the site's values.
    :raises ValueError: if the site is outside a plate of the batch.

    >>> row, column = Plate("row", -2, 3, 3), Plate("column", -1, 2, 2)
    >>> align(torch.zeros(10, 3), [row], [row, column]).shape
    torch.Size([10, 3, 1])
    """
    sizes = {plate.name: plate.size for plate in batch}
    if missing := set(sizes) - {plate.name for plate in plates}:
        raise ValueError(
            f"the site is outside the plates {sorted(missing)} of the batch (it has {[p.name for p in plates]}), so "
            "that no single weight belongs to it. Move it into the plate."
        )
    return per_batch.reshape(per_batch.shape[0], *(sizes.get(plate.name, 1) for plate in plates))


def take(draws: Draws, name: str, indices: Tensor, batch: Sequence[Plate]) -> Tensor:
    """Draws of a latent or deterministic site at the given indices, every batch element at its own.

    :param draws: the draws to choose from.
    :param name: the site.
    :param indices: integers of shape ``(num_samples, *batch)``, as :func:`pplvi.weights.resample` gives them.
    :param batch: the plates of the dimensions of ``indices``.
    :returns: a tensor of shape ``(num_samples, *plates, *event)``.
    :raises ValueError: if the site is outside a plate of the batch.

    >>> z = torch.arange(6.0).reshape(3, 2)
    >>> data = (Plate("data", -1, 2, 2),)
    >>> draws = Draws({"z": z}, {}, {}, {}, z, z, data, {"z": data}, frozenset())
    >>> take(draws, "z", torch.tensor([[0, 2], [1, 2]]), data)
    tensor([[0., 5.],
            [2., 5.]])
    """
    values = draws.latents[name] if name in draws.latents else draws.deterministics[name]
    aligned = align(indices, batch, draws.plates[name])
    aligned = aligned.reshape(aligned.shape + (1,) * (values.dim() - aligned.dim()))
    return torch.take_along_dim(values, aligned.to(values.device), 0)
