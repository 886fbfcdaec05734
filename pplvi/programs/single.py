"""Running one program by itself inside a larger computation: the levels of a path, and densities inside kernels.

The sibling of :mod:`pplvi.programs.joint`, which runs pairs: a level runs a kernel on the draws of the level before, or
scores a target at draws that something else has made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as torch_dist

from pplvi.programs.handlers import Detach, Supply
from pplvi.programs.sharding import current_shard, sharded
from pplvi.programs.sites import PARTICLES, is_enumerated, is_subsample, latent_sites
from pplvi.programs.state import preserved_rng
from pplvi.programs.traces import Run
from pplvi.types import Program, Values

Result = TypeVar("Result")


def run_alone(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_particles: int,
    nesting: int,
    values: Mapping[str, Tensor],
    complete: bool = False,
    detach: bool = False,
    redraw: bool = False,
) -> Run:
    """Run one program, all particles in one call, as the model of a run without a guide.

    :param nesting: how deep plates nest: the particles are one dimension further left.
    :param values: values that its latents and plates' indices take instead of being drawn.
    :param complete: every latent has to be among ``values``.
    :param detach: detach every draw at its site.
    :param redraw: values of latents are draws of this program made before: give them their reparameterised path.
    :raises ValueError: if a latent that should have been given is not, or one is enumerated.

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> run_alone(program, (), {}, num_particles=2, nesting=0, values={"z": torch.zeros(2)}).log_target()
    tensor([-0.9189, -0.9189])
    """
    recorder = _Recorder(values, detach, redraw)
    with recorder, _SideBySide(PARTICLES, num_particles, -nesting - 1) if num_particles > 1 else nullcontext():
        program(*args, **kwargs)
    run = sharded(Run(poutine.Trace(), recorder.trace, num_particles, nesting))
    latents = latent_sites(recorder.trace)
    if complete and (drawn := sorted(latents.keys() - values.keys())):
        raise ValueError(
            f"a program of the path has latent sites {drawn} that the draws {sorted(values)} do not have: expected "
            "every target to have the same sites. Rename them, or let the kernels and the base draw them too."
        )
    if enumerated := sorted(name for name, site in latents.items() if is_enumerated(site)):
        raise ValueError(
            f"sites {enumerated} are enumerated: expected drawn sites on a path. Draw them in the kernels."
        )
    return run


class _Recorder(Messenger):
    """Supply values and keep the sample sites: one handler where :mod:`pplvi.programs.joint` needs several.

    :param redraw: give supplied values the reparameterised path of the distributions that they were drawn from.
    """

    def __init__(self, values: Values, detach: bool, redraw: bool) -> None:
        super().__init__()
        self.supply, self.redraw = Supply(values), redraw
        self.detach = Detach() if detach else None
        self.trace = poutine.Trace()

    def _pyro_sample(self, msg: Any) -> None:
        self.supply._pyro_sample(msg)
        if self.redraw and msg["name"] in self.supply.values and hasattr(msg["fn"], "rsample"):
            msg["value"] = redrawn(msg["fn"], msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.detach is not None:
            self.detach._pyro_post_sample(msg)
        if not (is_subsample(msg) and msg["name"] in self.trace):  # inside a density that a kernel follows
            self.trace.add_node(msg["name"], **msg)


class _SideBySide(IndepMessenger):
    """The plate of the particles, without the index draw that a plate makes, which costs as much as a small program."""

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        BroadcastMessenger._pyro_sample(msg)


def rescored(run: Run, values: Mapping[str, Tensor]) -> Run:
    """The same run of a program with other values at its sites, under the distributions that they were drawn from.

    That is the program at these values only if no distribution depends on a site that is changed.
    """
    trace = run.model.copy()
    trace.nodes.update({name: {**trace.nodes[name], "value": value} for name, value in values.items()})
    return sharded(Run(run.guide, trace, run.num_particles, run.nesting))


def carried_path(density: Tensor, at: Values, live: Values, total: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The gradient path of draws through a density that was computed at leaves in their place.

    ``<grad_z density, z - sg(z)>``: zero in value, and to first order what the density at the live draws would carry.

    :param at: the leaves; nothing is left to carry where they are the draws themselves.
    :param live: the draws, with the same names.
    :param total: sums a site's products, of the shape of its value, to the shape of the density.

    >>> loc = torch.tensor([2.0, 3.0], requires_grad=True)
    >>> leaf = loc.detach().requires_grad_()
    >>> path = carried_path(leaf**2, {"z": leaf}, {"z": loc}, lambda name, product: product)
    >>> path, *torch.autograd.grad(path.sum(), loc)
    (tensor([0., 0.], grad_fn=<AddBackward0>), tensor([4., 6.]))
    """
    zero = torch.zeros_like(density)
    if at is live or not density.requires_grad:
        return zero
    gradients = torch.autograd.grad(density.sum(), list(at.values()), retain_graph=True, allow_unused=True)
    slopes = ((name, slope.detach()) for name, slope in zip(at, gradients, strict=True) if slope is not None)
    return sum((total(name, slope * (live[name] - live[name].detach())) for name, slope in slopes), zero)


def redrawn(fn: Any, value: Tensor) -> Tensor:
    """A draw made before, with the gradient path of the distribution's parameters: the noise it came from is kept.

    :raises ValueError: for a distribution that does not shift, scale or transform normal noise.

    >>> import pyro.distributions as dist
    >>> loc = torch.tensor(1.0, requires_grad=True)
    >>> redrawn(dist.LogNormal(loc, 1.0), torch.tensor(2.0))
    tensor(2., grad_fn=<ExpBackward0>)
    """
    if isinstance(fn, torch_dist.Normal):
        return fn.loc + fn.scale * ((value - fn.loc) / fn.scale).detach()
    if isinstance(fn, torch_dist.MultivariateNormal):
        factor = fn.scale_tril
        noise = torch.linalg.solve_triangular(factor, (value - fn.loc).unsqueeze(-1), upper=False).detach()
        return fn.loc + (factor @ noise).squeeze(-1)
    if isinstance(fn, torch_dist.TransformedDistribution):
        return _transformed(fn, value)
    if hasattr(fn, "base_dist"):  # independent, expanded or masked
        return redrawn(fn.base_dist, value)
    raise ValueError(
        f"draws of {type(fn).__name__} cannot be traced back to normal noise: expected a normal distribution, shifted, "
        "scaled or transformed. Walk level by level instead: vectorize_levels=False."
    )


def _transformed(fn: Any, value: Tensor) -> Tensor:
    with torch.no_grad():
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
    live = redrawn(fn.base_dist, value)
    for transform in fn.transforms:
        live = transform(live)
    return live


def parameter_names(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parameters that a program asks for, in their order; the random state is left as it was."""
    with preserved_rng(), torch.no_grad(), poutine.block(), poutine.trace() as recorder:
        program(*args, **kwargs)
    return tuple(name for name, site in recorder.trace.nodes.items() if site["type"] == "param")


def run_stacked(
    program: Program, names: Sequence[Sequence[str]], values: Any, read: Callable[[Program, Any], Result]
) -> Result:
    """Run several programs that differ in nothing but their parameters as one, whose parameters are stacked.

    :param program: any one of them.
    :param names: for each program, the names of its parameters in the store, the one at hand first.
    :param values: what they read, tensors in nested containers, stacked on dimension 0.
    :param read: runs the program at the values of one and returns tensors; the results are stacked on dimension 0.

    >>> import pyro, pyro.distributions as dist
    >>> a, b = pyro.param("a", torch.tensor(1.0)), pyro.param("b", torch.tensor(2.0))
    >>> run_stacked(lambda x: x * pyro.param("a"), [["a"], ["b"]], {"x": torch.ones(2)}, lambda f, v: f(v["x"]))
    tensor([1., 2.], grad_fn=<MulBackward0>)
    """
    stacks = {same[0]: torch.stack([pyro.param(name) for name in same]) for same in zip(*names, strict=True)}

    def one(parameters: Values, values: Any) -> Result:
        with poutine.block(hide_types=["param"]), poutine.substitute(data=dict(parameters)):
            return read(program, values)

    with pyro.validation_enabled(False):  # checks branch on values
        result: Result = torch.func.vmap(one)(stacks, values)
    return result


def log_density_of(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Tensor]
) -> Tensor:
    """Log density of a program at given values, summed over everything: for gradients in the values.

    Sample statements are hidden from whatever handlers run around; parameters are not, so that they are trained, nor
    are the indices of a minibatch, so that the density is that of the data that the draws belong to.

    >>> import pyro, pyro.distributions as dist
    >>> def program():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> log_density_of(program, (), {}, {"z": torch.zeros(2)})
    tensor(-1.8379)
    """
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and not _draws_minibatch(msg)), Supply(values):
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        _check_together(trace)
        return torch.as_tensor(trace.log_prob_sum())


def _check_together(trace: Any) -> None:
    """Check that the gradient of a density in its values needs no other rank."""
    shard = current_shard()
    outside = {n for n, s in latent_sites(trace).items() if not shard.splits(s)} if shard is not None else set()
    if outside:
        raise ValueError(
            f"a kernel follows the gradient of a density in the sites {sorted(outside)}, whose data are on several "
            "ranks: expected kernels that do not, such as ResidualKernel, or latents inside the plate of the data."
        )


def _draws_minibatch(msg: Any) -> bool:
    """Whether a site is the index draw of a plate that is subsampled: all plates make one."""
    return is_subsample(msg) and msg["fn"].subsample_size not in (None, msg["fn"].size)
