"""Factors of other guide families, trained by gradient of the bound between closed-form sweeps of all other blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pplvi.guides.conjugate.keeping import key_of
from pplvi.programs.handlers import parameters_of
from pplvi.programs.joint import guide_run
from pplvi.programs.running import plain_run
from pplvi.programs.sites import is_subsample, latent_sites, separately, site_plates
from pplvi.types import Program

GuideFactory = Callable[[Program], Any]
TRAINED = "trained:"


class TrainedFactor:
    """The factor of some sites, a guide of any family of the program in which they alone are latent.

    :param model: the program.
    :param sites: names of the sites.
    :param make: makes the guide of a program.
    :param call: arguments of the program, with which the guide is set up.
    :raises ValueError: for what is not an automatic guide, and sites that are discrete, subsampled or do not exist.
    """

    def __init__(self, model: Program, sites: tuple[str, ...], make: GuideFactory, call: Any) -> None:
        self.sites = sites
        _check_sites(model, sites, call)
        self.part = poutine.block(model, expose=list(sites))
        self.guide = make(self.part)
        if not isinstance(self.guide, AutoGuide):
            raise ValueError(
                f"fallback for {_named(sites)} made {type(self.guide).__name__} of the program: expected an automatic "
                "guide, such as pyro.infer.autoguide.AutoNormal, or a function that makes one of the model."
            )
        with own_parameters(), poutine.block(), torch.no_grad():
            missing = set(sites) - set(self.guide(*call[0], **call[1]) or {})
        if missing:
            raise ValueError(
                f"fallback for {_named(sites)} made {type(self.guide).__name__}, which draws no {_named(missing)}: "
                "expected a guide of all latent sites of the program that it is given."
            )

    @property
    def name(self) -> str:
        """Of the sites."""
        return "+".join(self.sites)

    def parameters(self, call: Any) -> list[Tensor]:
        """What is trained."""
        with own_parameters(), poutine.block():
            return [*parameters_of(lambda: self.guide(*call[0], **call[1])).values()]

    def draw(self, number: int, call: Any) -> tuple[list[Tensor], Tensor]:
        """Draws of each site ``(number, *shape)``, with their path, and their log densities ``(number,)``, nats."""
        with own_parameters():
            run = guide_run(self.part, self.guide, call[0], call[1], number, None)
        values = [separately(run.guide.nodes[n], run.num_particles, run.nesting) for n in self.sites]
        return values, run.log_forward().reshape(number, -1).sum(1)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the sites as sample statements of the guide that this is a part of."""
        with own_parameters(), poutine.block(hide_fn=lambda msg: msg["type"] == "param" or is_subsample(msg)):
            found: dict[str, Tensor] = self.guide(*args, **kwargs)
        return {name: found[name] for name in self.sites}

    def of_guide(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What a method of the guide gives, such as its median."""
        with own_parameters(), poutine.block():
            found: dict[str, Tensor] = getattr(self.guide, method)(*args, **kwargs)
        return {name: found[name] for name in self.sites}

    # ------------------------------------------------------------------ files

    def kept(self) -> dict[str, Tensor]:
        """Parameters and buffers, by the names of buffers of the guide that this is a part of."""
        return {self._key(name): value.detach().clone() for name, value in self.guide.state_dict().items()}

    def _key(self, name: str) -> str:
        return key_of(TRAINED, self.name, name)

    @classmethod
    def of(cls, model: Program, sites: tuple[str, ...], make: GuideFactory, call: Any, kept: Mapping[str, Any]) -> Self:
        """A factor, as it is among buffers if it is there."""
        made = cls(model, sites, make, call)
        state = {name: kept.get(made._key(name)) for name in made.guide.state_dict()}
        if all(value is not None for value in state.values()):
            made.guide.load_state_dict(state)
        return made


def of_guides(trained: Sequence[TrainedFactor], method: str, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """What a method of the guides of all factors gives, such as their medians."""
    found: dict[str, Tensor] = {}
    for factor in trained:
        found |= factor.of_guide(method, *args, **kwargs)
    return found


def one_draw(trained: Sequence[TrainedFactor], call: Any) -> dict[str, Tensor]:
    """A draw of each site."""
    with torch.no_grad():
        return {n: v[0] for f in trained for n, v in zip(f.sites, f.draw(2, call)[0], strict=True)}


def _named(sites: Any) -> str:
    return ", ".join(map(repr, sorted(sites)))


def _check_sites(model: Program, sites: Sequence[str], call: Any) -> None:
    latents = latent_sites(plain_run(model, *call).model)
    continuous = sorted(n for n, s in latents.items() if not s["fn"].has_enumerate_support)
    if unknown := [name for name in sites if name not in continuous]:
        raise ValueError(f"fallback= names {unknown}: expected continuous latent sites of the model, of {continuous}.")
    if cut := sorted({p.name for n in sites for p in site_plates(latents[n]) if p.size < p.full_size}):
        raise ValueError(
            f"fallback for {_named(sites)} is a guide family, and plates {cut} around them are subsampled: expected "
            "all data at once, or 'cvi' for a site of a minibatch."
        )


@contextmanager
def own_parameters() -> Iterator[None]:
    """A parameter store of its own: what a part trains is no parameter of the guide that it is a part of."""
    with pyro.get_param_store().scope():
        yield


def check_families(
    fallback: Mapping[Any, Any], rate: Any, conditional: Sequence[str]
) -> dict[tuple[str, ...], GuideFactory]:
    """The guide families of ``fallback=``, by the sites that each is for.

    :raises ValueError: for other keys, sites that are named twice, and families beside a ``rate``.
    """
    found = {(k if isinstance(k, tuple) else (k,)): v for k, v in fallback.items() if not isinstance(v, str)}
    names = [name for key in fallback for name in (key if isinstance(key, tuple) else (key,))]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"fallback= names {names}: expected each site once, or a tuple of sites that share a guide family."
        )
    if bad := [key for key, how in fallback.items() if isinstance(key, tuple) and isinstance(how, str)]:
        raise ValueError(f"fallback={{{bad[0]!r}: {fallback[bad[0]]!r}}}: expected one site, or a guide family.")
    if found and rate is not None:
        raise ValueError(
            f"fallback for {_named(next(iter(found)))} is a guide family, which is trained on all data at once: "
            "expected 'cvi', 'laplace' or 'delta' beside rate=, or no rate=."
        )
    if found and conditional:
        raise ValueError(
            f"conditional={list(conditional)} beside a guide family for {_named(next(iter(found)))}: expected 'cvi' as "
            "the fallback, or no conditional=."
        )
    return found


def standing_still(values: Sequence[float], window: int) -> bool:
    """Whether the mean of the last values is no further above that of those before than its standard error.

    >>> standing_still([0.0, 1.0] * 50, 50), standing_still([float(i) for i in range(100)], 50)
    (True, False)
    """
    if len(values) < 2 * window:
        return False
    before, after = torch.tensor(values[-2 * window :], dtype=torch.float64).split(window)
    error = math.sqrt((float(before.var()) + float(after.var())) / window)
    return float(after.mean() - before.mean()) <= error
