"""Pyro's own objectives, which branch on values, as the ones of this package that compute the same and trace."""

from __future__ import annotations

from typing import Any, Literal

from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pplvi.elbo import ELBO, Loss


def own_loss(loss: Any) -> Loss:
    """A loss that traces: one of this package, or ours for exactly Pyro's trace ELBOs.

    :raises ValueError: for any other, subclasses included.

    >>> own_loss(Trace_ELBO(num_particles=3))
    ELBO(num_particles=3)
    """
    if isinstance(loss, Loss):
        return loss
    if type(loss) in (Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO):
        entropy: Literal["kl", "sampled"] = "kl" if type(loss) is TraceMeanField_ELBO else "sampled"
        return ELBO(loss.num_particles, entropy, vectorize_particles=loss.vectorize_particles)
    raise ValueError(
        f"{type(loss).__name__} branches on values and cannot be traced: expected a loss of this package, or exactly "
        "Trace_ELBO, TraceEnum_ELBO or TraceMeanField_ELBO, which stand for pplvi.ELBO. Use one of these, or "
        "compile=False."
    )
