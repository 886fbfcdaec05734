"""What leaves the runs of single particles: tensors, and from them the trace that one run of all would have left.

No distribution outlives the run of a particle. Its site keeps the density, and where they are wanted the entropy and
the divergence, that it had there, with the particles at the dimension where their plate would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.distributions.kl import register_kl

from pplvi.programs.masks import without_missing
from pplvi.programs.sites import (
    PARTICLES,
    Site,
    event_dims,
    is_deterministic,
    is_enumerated,
    is_factor,
    is_subsample,
    kind_of,
    latent_sites,
    sample_sites,
)
from pplvi.programs.together import is_batched
from pplvi.programs.traces import Run, unscaled_log_prob

Outputs = dict[str, dict[str, dict[str, Tensor]]]
"""Tensors of one particle, or stacked ones of all: by program, site and kind."""


class Stacked(Distribution):
    """Stands for a distribution in each particle's run: the numbers that are left of it.

    :ivar kind: the name of its family.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  (as torch declares it)

    def __init__(self, fn: Any, shapes: tuple[torch.Size, torch.Size], numbers: Mapping[str, Tensor]) -> None:
        super().__init__(*shapes, validate_args=False)
        self.kind, self.has_rsample = kind_of(fn), bool(getattr(fn, "has_rsample", False))
        self._numbers = numbers
        self._mask = fn._mask if isinstance(getattr(fn, "_mask", None), bool) else None

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one draw."""
        return len(self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density that each particle's value had."""
        return self._numbers["log_prob"]

    def entropy(self) -> Tensor:
        """The entropy in each particle's run."""
        if "entropy" not in self._numbers:
            raise NotImplementedError
        return self._numbers["entropy"]

    def divergence(self) -> Tensor:
        """The divergence from the model's distribution in each particle's run."""
        if "divergence" not in self._numbers:
            raise NotImplementedError
        return self._numbers["divergence"]


@register_kl(Stacked, Stacked)
def _divergence(p: Stacked, q: Stacked) -> Tensor:
    return p.divergence()


@dataclass(frozen=True)
class Record:
    """What one particle's run says of a site beside its numbers, and what of it is the same for all."""

    site: Site
    value_events: int
    shapes: tuple[torch.Size, torch.Size]


Records = dict[str, dict[str, Record]]


def take_apart(run: Run, *, densities: bool = True, exact: bool = False) -> tuple[Outputs, Records]:
    """Take the run of one particle apart.

    :param densities: log densities are wanted.
    :param exact: entropies and divergences are wanted too.
    """
    outputs: Outputs = {"kept": {"": dict(run.kept)}}
    records: Records = {}
    for role, trace in (("guide", run.guide), ("model", run.model)):
        outputs[role], records[role] = {}, {}
        for name, site in trace.nodes.items():
            outputs[role][name], records[role][name] = _numbers(site, densities), _record(site)
    if exact:
        _add_exact(run, outputs["guide"])
    return outputs, records


def _record(site: Site) -> Record:
    if site["type"] != "sample" or is_subsample(site):
        return Record(site, 0, (torch.Size(), torch.Size()))
    fn, value = site["fn"], site["value"]
    events = fn.event_dim if hasattr(fn, "event_dim") else len(fn.event_shape)
    if is_deterministic(site) and isinstance(value, Tensor):
        found = event_dims(site)
        events = value.dim() if found is None else found
    return Record(site, events, (torch.Size(fn.batch_shape), torch.Size(fn.event_shape)))


def _numbers(site: Site, densities: bool) -> dict[str, Tensor]:
    """Everything of a site that may differ between particles."""
    if site["type"] != "sample" or is_subsample(site):
        return {}
    found = {key: site[key] for key in ("value", "scale", "mask")}
    if densities and not is_deterministic(site):
        found["log_prob"] = unscaled_log_prob(site["name"], site)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def _add_exact(run: Run, outputs: dict[str, dict[str, Tensor]]) -> None:
    model = latent_sites(run.model)
    for name, site in sample_sites(run.guide):
        exact = {"entropy": site["fn"].entropy}
        if name in model:
            exact["divergence"] = lambda q=site["fn"], p=model[name]["fn"]: _kl(q, p)
        for key, compute in exact.items():
            if (found := _or_none(compute)) is not None:
                outputs[name][key] = found


def _kl(q: Any, p: Any) -> Tensor:
    kl = torch.as_tensor(kl_divergence(q, p))
    return kl.expand(torch.broadcast_shapes(kl.shape, q.batch_shape, p.batch_shape))


def _or_none(compute: Callable[[], Tensor]) -> Tensor | None:
    try:
        return compute()
    except NotImplementedError:
        return None


def check_observed(run: Run) -> None:
    """Check that data lie in the supports of their distributions: inside ``vmap`` their densities do not.

    Supports that move with a particle's draws are left to the densities.

    :raises ValueError: with the first site that has a value outside.
    """
    for name, site in sample_sites(run.model):
        if not site["is_observed"] or is_factor(site) or is_deterministic(site) or is_batched(site["value"]):
            continue
        try:
            inside = site["fn"].support.check(without_missing(site))
        except (NotImplementedError, RuntimeError):  # not known, or not known inside vmap
            continue
        for mask in (site["mask"], getattr(site["fn"], "_mask", None)):
            inside = inside if mask is None else inside | ~torch.as_tensor(mask, device=inside.device)
        if not (is_batched(inside) or bool(inside.all())):
            raise ValueError(
                f"the log density at site {name!r} cannot be computed: the data have values outside the support "
                f"{site['fn'].support} of {kind_of(site['fn'])}. Check them for NaN or out-of-range entries, or mask "
                "these by poutine.mask or obs_mask=."
            )


def shared_draws(run: Run) -> list[str]:
    """Names of drawn sites whose value does not differ between particles inside ``vmap``."""
    model = {n: s for n, s in latent_sites(run.model).items() if n not in run.guide.nodes}
    sites = {**latent_sites(run.guide), **model}
    drawn = {n: s for n, s in sites.items() if not (is_enumerated(s) or is_factor(s) or kind_of(s["fn"]) == "Delta")}
    return sorted(name for name, site in drawn.items() if not is_batched(site["value"]))


def stack_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Stack the tensors of single particles; those that are one and the same in all runs keep one copy of it."""
    first = parts[0]
    return {
        role: {
            name: {key: _stack([part[role][name][key] for part in parts]) for key in numbers}
            for name, numbers in sites.items()
        }
        for role, sites in first.items()
    }


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if is_batched(first):  # inside vmap tensors have no storage of their own
        return torch.stack(list(tensors))
    same = all(x.data_ptr() == first.data_ptr() and x.stride() == first.stride() for x in tensors)
    return first.expand(len(tensors), *first.shape) if same and first.numel() else torch.stack(list(tensors))


def rebuild(
    records: Mapping[str, Record], outputs: Mapping[str, Mapping[str, Tensor]], count: int, nesting: int
) -> Any:
    """The trace of all particles, as one run under a plate of them would have left it."""
    trace: Any = Trace()
    plate = CondIndepStackFrame(PARTICLES, -nesting - 1, count, 0, count)
    for name, record in records.items():
        trace.nodes[name] = _rebuilt(record, outputs[name], plate) if outputs[name] else record.site
    return trace


def _rebuilt(record: Record, numbers: Mapping[str, Tensor], plate: Any) -> Site:
    nesting, site = -plate.dim - 1, record.site
    placed = {
        key: _placed(number, record.value_events if key == "value" else 0, nesting) for key, number in numbers.items()
    }
    batch, event = record.shapes
    like = torch.empty((), device="meta").expand(plate.size, *batch)
    shapes = _placed(like, 0, nesting).shape, event
    changed: dict[str, Any] = {key: placed[key] for key in ("value", "scale", "mask") if key in placed}
    fn = Stacked(site["fn"], shapes, placed)
    stack = (*site["cond_indep_stack"], plate)
    kept = {key: value for key, value in site.items() if key not in ("log_prob", "unscaled_log_prob", "packed")}
    infer = dict(site["infer"])
    return {**kept, **changed, "fn": fn, "args": (), "kwargs": {}, "cond_indep_stack": stack, "infer": infer}


def _placed(x: Tensor, events: int, nesting: int) -> Tensor:
    """Move the particles from the front to the left of the plates; enumerated dimensions are further left."""
    inner = tuple(x.shape[1:])
    batch = max(len(inner) - events, 0)
    if batch <= nesting:
        return x.reshape(len(x), *(1,) * (nesting - batch), *inner)
    place = batch - nesting - 1
    return x.squeeze(1 + place).movedim(0, place)
