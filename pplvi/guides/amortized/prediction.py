"""Predictive sparse decomposition: codes that an encoder can predict, and an encoder that predicts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro.nn.module import PyroModule, to_pyro_module_
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pplvi.guides.owned import claim_name
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Positive
from pplvi.types import Program

__all__ = ["PredictionPenalty"]


@checked
class PredictionPenalty(PyroModule):
    r"""A program with a penalty on how far a latent is from what an encoder predicts.

    .. math:: \log p(v, h) - \tfrac{\gamma}{2} \lVert h - f(v) \rVert^2

    ``fit(PredictionPenalty(model, encoder), lambda model: AutoProximal(model, "h"), args=(v,))`` is predictive sparse
    decomposition: codes at the mode of the whole, dictionary and encoder by gradient. Afterwards the encoder alone is
    the inference: ``AutoAmortized(model, encoder, plates="data", family="delta")``.

    Source: Kavukcuoglu, Ranzato & LeCun (2008), "Fast inference in sparse coding algorithms with applications to object
    recognition".

    :param model: the program.
    :param encoder: a module from the inputs to predictions of the latent's shape; it is trained with the model.
    :param site: the latent.
    :param weight: :math:`\gamma`.
    :param inputs: what the encoder sees, from the model's arguments; the first of them unless given.
    :param name: prefix of the encoder's parameters.
    :raises ValueError: for an encoder that is no module, a weight that is not positive; when run, for a program without
        that site, and predictions of another shape.

    >>> import pyro.distributions as dist
    >>> from pplvi.guides import AutoProximal
    >>> def model(v):
    ...     with pyro.plate("data", len(v)):
    ...         h = pyro.sample("h", dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
    ...         pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)
    >>> import torch
    >>> v = torch.tensor([[3.0, 0.5]])
    >>> AutoProximal(PredictionPenalty(model, nn.Identity(), weight=1.0), "h")(v)["h"]  # between v and its mode
    tensor([[2.5000, 0.0000]])
    """

    def __init__(
        self,
        model: Program,
        encoder: nn.Module,
        site: str = "h",
        *,
        weight: Positive = 1.0,
        inputs: Callable[..., Any] | None = None,
        name: str = "prediction",
    ) -> None:
        super().__init__(name)
        to_pyro_module_(encoder)
        self.encoder, self.site, self.weight = encoder, site, float(weight)
        self._parts = (model, inputs)  # a tuple, so that a model that is a module keeps its own parameters' names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with its arguments, and add the penalty where the latent is."""
        claim_name(self)
        model, inputs = self._parts
        given = inputs(*args, **kwargs) if inputs is not None else next(iter((*args, *kwargs.values())))
        prediction = self.encoder(*given) if isinstance(given, tuple) else self.encoder(given)
        with _Penalty(self.site, prediction, self.weight) as penalty:
            found = model(*args, **kwargs)
        if not penalty.met:
            raise ValueError(f"the model has no site {self.site!r}: expected the name of the latent that is predicted.")
        return found


class _Penalty(Messenger):
    """Add a factor behind a site, in its plates."""

    def __init__(self, site: str, prediction: Tensor, weight: float) -> None:
        super().__init__()
        self.site, self.prediction, self.weight, self.met = site, prediction, weight, False

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] != self.site:
            return
        self.met, value, events = True, msg["value"], msg["fn"].event_dim
        event = tuple(value.shape[value.dim() - events :])
        if tuple(self.prediction.shape[self.prediction.dim() - events :]) != event:
            raise ValueError(
                f"the encoder predicts {tuple(self.prediction.shape)} for site {self.site!r} of shape "
                f"{tuple(value.shape)}: expected the latent's own shape."
            )
        square = (value - self.prediction).square()
        total = square.flatten(square.dim() - events).sum(-1) if events else square
        pyro.factor(f"{self.site}_prediction", -0.5 * self.weight * total)
