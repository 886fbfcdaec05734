"""Posteriors as tables: weighted means and quantiles as a pandas frame, and the small HTML that notebooks show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pplvi.posterior.draws import Draws
from pplvi.posterior.gather import align

if TYPE_CHECKING:
    import pandas

QUANTILES = (0.05, 0.5, 0.95)
_ROWS = 12  # that a notebook shows
_CHUNK = 2**22  # numbers that are sorted at a time


def frame_of(draws: Draws, log_weight: Tensor | None = None) -> pandas.DataFrame:
    r"""Mean, standard deviation and quantiles of every element of the latent and deterministic sites.

    .. math:: \bar z = \sum_s \tilde w_s z_s, \qquad q_p = \min \{z_s : \sum_{r: z_r \le z_s} \tilde w_r \ge p\}

    Elements of a batch have weights of their own, as far as a site is in its plates; sites outside it, of which no one
    weight belongs to a draw, are left out.

    :param draws: the draws.
    :param log_weight: ``(S, *batch)``; all draws count alike without.
    :returns: a row for each element, ``"theta[2]"``, counted from 0; columns ``mean``, ``sd`` and the quantiles.

    >>> z = torch.tensor([1.0, 2.0, 4.0])
    >>> draws = Draws({"z": z}, {}, {}, {}, z, z, (), {"z": ()}, frozenset())
    >>> print(frame_of(draws, torch.tensor([0.25, 0.25, 0.5]).log()).round(2))
       mean   sd   5%  50%  95%
    z  2.75  1.3  1.0  2.0  4.0
    """
    import pandas

    names, parts = [], [torch.zeros(0, 2 + len(QUANTILES), dtype=torch.float64)]
    for name, value in {**draws.latents, **draws.deterministics}.items():
        plates = draws.plates.get(name, ())
        if not {plate.name for plate in draws.batch} <= {plate.name for plate in plates}:
            continue
        names += [_element(name, index) for index in product(*map(range, value.shape[1:]))]
        weight = torch.zeros(len(value)) if log_weight is None else align(log_weight, draws.batch, plates)
        weight = weight.reshape(*weight.shape, *(1,) * (value.dim() - weight.dim())).expand(value.shape)
        parts += _numbers(value.reshape(len(value), -1), weight.reshape(len(value), -1))
    columns = ["mean", "sd", *(f"{100 * p:.0f}%" for p in QUANTILES)]
    return pandas.DataFrame(torch.cat(parts).numpy(), index=names, columns=columns)


def _element(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _numbers(values: Tensor, log_weight: Tensor) -> Iterator[Tensor]:
    size = max(1, _CHUNK // len(values))
    for value, log_part in zip(values.split(size, 1), log_weight.split(size, 1), strict=True):
        part, weight = value.detach().cpu().double(), torch.softmax(log_part.detach().cpu().double(), 0)
        mean = (weight * part).sum(0)
        sd = (weight * (part - mean).square()).sum(0).sqrt()
        ordered, order = part.sort(0)
        reached = torch.take_along_dim(weight, order, 0).cumsum(0)
        places = [(reached < p * (1 - 1e-9)).sum(0, keepdim=True).clamp(max=len(part) - 1) for p in QUANTILES]
        yield torch.stack([mean, sd, *(torch.take_along_dim(ordered, place, 0)[0] for place in places)], 1)


def to_html(title: str, lines: Sequence[str], frame: pandas.DataFrame | None = None) -> str:
    """A title, some lines and the first rows of a frame, all names escaped.

    >>> to_html("<Fit>", ["reliable"])
    '<div><b>&lt;Fit&gt;</b><br>reliable</div>'
    """
    words = "".join(f"<br>{escape(line)}" for line in lines)
    shown = ""
    if frame is not None and len(frame):
        shown = frame.head(_ROWS).to_html(float_format="{:.3g}".format)
        shown += f"<div>{len(frame) - _ROWS:,} more rows</div>" if len(frame) > _ROWS else ""
    return f"<div><b>{escape(title)}</b>{words}</div>{shown}"


class Summary(str):
    """The words of a report, with the numbers of the posterior as a frame; notebooks show both.

    :param text: the words.
    :param frame: a row for each element of a latent or deterministic site (:func:`frame_of`), or ``None``.

    >>> summary = Summary("all is well")
    >>> print(summary), summary.frame is None
    all is well
    (None, True)
    """

    frame: pandas.DataFrame | None

    def __new__(cls, text: str, frame: pandas.DataFrame | None = None) -> Summary:
        """A text with a frame."""
        self = super().__new__(cls, text)
        self.frame = frame
        return self

    def _repr_html_(self) -> str:
        title, *lines = self.splitlines() or [""]
        return to_html(title, lines, self.frame)
