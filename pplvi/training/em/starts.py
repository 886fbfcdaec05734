"""Where EM starts: probabilities of the latents from k-means on what they explain, or random ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pplvi.programs.enumeration import depending, varies
from pplvi.programs.sites import is_enumerated, latent_sites, site_plates
from pplvi.programs.traces import Run

_CERTAIN = 100.0  # nats between what k-means says and all else
_SPREAD = 2.0
_TRIES = 20


def tells_apart(run: Run) -> bool:
    """Whether, for each latent, some other density depends on its value: from equal components EM never gets away.

    :param run: one whose expected counts were asked for.
    """
    names = [name for name, site in latent_sites(run.model).items() if is_enumerated(site)]
    return all(any(varies(run.model, other, name) for other in depending(run.model, name)) for name in names)


def random_start(run: Run) -> dict[str, Tensor]:
    """Random log probabilities of every latent's values, for each element of its plates."""
    sites = {n: s for n, s in latent_sites(run.model).items() if is_enumerated(s)}
    return {n: _placed(s, random_elements(s, _values(s))) for n, s in sites.items()}


def kmeans_start(run: Run) -> dict[str, Tensor]:
    """Log probabilities that put every element into the cluster that k-means finds for it.

    The clusters are those of the observations that depend on a latent; latents with as many values and observations of
    as many numbers, such as those of a Markov chain, are clustered together. Latents that nothing observed depends on
    directly get random probabilities.

    :param run: one whose expected counts were asked for.

    Source: Arthur & Vassilvitskii (2007), "k-means++: the advantages of careful seeding".
    """
    found = random_start(run)
    together: dict[tuple[int, int], list[tuple[str, Tensor]]] = defaultdict(list)
    for name in found:
        features = _features(run, name)
        if features is not None:
            together[_values(run.model.nodes[name]), features.shape[1]].append((name, features))
    for (clusters, _), members in together.items():
        labels = _kmeans(torch.cat([x for _, x in members]), clusters)
        for (name, _), part in zip(members, labels.split([len(x) for _, x in members]), strict=True):
            certain = _CERTAIN * torch.nn.functional.one_hot(part, clusters).to(found[name])
            found[name] = _placed(run.model.nodes[name], certain)
    return found


def random_elements(site: Any, clusters: int) -> Tensor:
    """Random log probabilities of so many clusters for each element of a site's plates, ``(elements, clusters)``."""
    return _SPREAD * torch.randn(_elements(site), clusters)


def clustered(site: Any, seen: Sequence[Any], clusters: int) -> Tensor:
    """Log probabilities that put every element of a site's plates into the cluster that k-means finds for it.

    :param seen: observed sites inside of these plates.
    """
    labels = _kmeans(torch.cat([_by_element(site, other) for other in seen], 1), clusters)
    return _CERTAIN * torch.nn.functional.one_hot(labels, clusters).double()


def _values(site: Any) -> int:
    return int(site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim])


def _elements(site: Any) -> int:
    return int(np.prod([plate.size for plate in site_plates(site)], dtype=int))


def _placed(site: Any, log_probs: Tensor) -> Tensor:
    """Log probabilities ``(elements, values)`` where the density of the site has its plates and values."""
    sizes = {plate.dim: plate.size for plate in site_plates(site)}
    depth = -min(sizes, default=0)
    inner = log_probs.T.reshape(-1, *(sizes.get(dim, 1) for dim in range(-depth, 0)))
    return inner.reshape(-1, *[1] * (-site["infer"]["_enumerate_dim"] - depth - 1), *inner.shape[1:])


def _features(run: Run, name: str) -> Tensor | None:
    """What is observed of each element of a latent's plates, ``(elements, numbers)``."""
    site = run.model.nodes[name]
    parts = []
    for other in depending(run.model, name):
        seen = run.model.nodes[other]
        if seen["is_observed"] and {p.name for p in site_plates(site)} <= {p.name for p in site_plates(seen)}:
            parts.append(_by_element(site, seen))
    return torch.cat(parts, 1) if parts else None


def _by_element(site: Any, seen: Any) -> Tensor:
    value, batch = torch.as_tensor(seen["value"]), len(seen["fn"].batch_shape)
    events = seen["fn"].event_dim
    value = value.reshape(*[1] * max(batch + events - value.dim(), 0), *value.shape)
    first = value.dim() - events
    mine = [first + plate.dim for plate in site_plates(site)]
    sizes = [plate.size for plate in site_plates(site)]
    rest = [d for d in range(value.dim()) if d not in mine]
    value = value.permute(*mine, *rest).expand(*sizes, *[-1] * len(rest))
    return value.reshape(_elements(site), -1).detach().double()


def _kmeans(x: Tensor, clusters: int) -> Tensor:
    from scipy.cluster.vq import ClusterError, kmeans2  # not at import: it is slow to load

    points = torch.nan_to_num(x).cpu().numpy()
    for _ in range(_TRIES):
        generator = np.random.default_rng(int(torch.randint(2**31, ())))
        try:
            with np.errstate(all="ignore"):  # where there are fewer different points than clusters
                labels = kmeans2(points, clusters, iter=100, minit="++", missing="raise", rng=generator)[1]
        except (ClusterError, ValueError):
            continue
        return torch.as_tensor(labels, dtype=torch.long, device=x.device)
    raise ValueError(
        f"k-means finds no {clusters} clusters in {len(points)} observations: expected at least as many different "
        "ones. Use ExpectationMaximization(start='random')."
    )
