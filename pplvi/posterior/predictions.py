"""What goes around a prediction: words for what cannot be predicted so, and data that are left out of new arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pplvi.posterior.draws import Draws


@contextmanager
def told_how_to_predict() -> Iterator[None]:
    """Add to the error about latents of another shape what the user of a posterior can do."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("the draws of latent site"):
            raise
        raise ValueError(
            f"{error} In predict(...) the latter is new_sites=['name of the site']. A guide that maps data to latents "
            "(amortised) has draws for the new data: Posterior(model, guide, (x_new,)).predict()."
        ) from error


def observed_as_before(found: Draws, fitted: Draws) -> Draws:
    """Data left out of the new arguments make latent sites of the observed ones: put those back."""
    names = set(found.latents) & set(fitted.observed)
    moved = {name: value for name, value in found.latents.items() if name in names}
    rest = {name: value for name, value in found.latents.items() if name not in names}
    return replace(found, latents=rest, observed={**found.observed, **moved})
