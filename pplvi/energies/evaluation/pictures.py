"""Image grids for undirected models: what hidden units look at, and what machines dream."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from pplvi.energies.machines.boltzmann import BoltzmannMachine
from pplvi.kinds.checked import checked
from pplvi.kinds.kinds import Count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_filters", "plot_images"]


@checked
def plot_images(
    images: Tensor,
    shape: tuple[int, int] | None = None,
    *,
    columns: Count = 10,
    labels: list[str] | None = None,
    symmetric: bool = False,
) -> Figure:
    """Images side by side: data, fantasy particles, reconstructions, in-painting, neighbours.

    :param images: ``(num_images, height * width)``.
    :param shape: height and width; square unless given.
    :param columns: images in a row.
    :param labels: one for each row.
    :param symmetric: colours around zero, for weights, instead of grey levels from 0 to 1.
    :returns: the figure.
    :raises ValueError: if the images do not have that shape, or labels are not one for each row.

    >>> import torch
    >>> figure = plot_images(torch.rand(6, 16), columns=3, labels=["data", "dreams"])
    >>> len(figure.axes)
    6
    """
    from matplotlib import pyplot

    count, size = images.shape
    height, width = shape or (math.isqrt(size), math.isqrt(size))
    rows = math.ceil(count / columns)
    if height * width != size:
        raise ValueError(f"images of {size} pixels: expected {height} x {width}. Pass shape=(height, width).")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels: expected one for each of {rows} rows.")
    figure, axes = pyplot.subplots(rows, columns, figsize=(columns, 1.1 * rows), squeeze=False)
    limit = float(images.abs().max()) if symmetric else 1.0
    colours = (
        {"cmap": "coolwarm", "vmin": -limit, "vmax": limit} if symmetric else {"cmap": "gray_r", "vmin": 0, "vmax": 1}
    )
    for axis, image in zip(axes.flat, images.detach().cpu(), strict=False):
        axis.imshow(image.reshape(height, width).numpy(), **colours)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(axis.has_data())
    for axis, label in zip(axes[:, 0], labels or [], strict=False):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


@checked
def plot_filters(
    machine: BoltzmannMachine,
    layer: str | None = None,
    shape: tuple[int, int] | None = None,
    *,
    num_filters: Count = 50,
    columns: Count = 10,
) -> Figure:
    """Weights between the visible layer and the units of another one as images, the strongest first.

    Of a convolution one image for each map, of the filters' shape.

    :param layer: the other layer; the first hidden one unless given.
    :param shape: height and width of the visible layer; square unless given.
    :param num_filters: how many units.
    :param columns: images in a row.
    :returns: the figure.
    :raises ValueError: if the layers are not connected, or the visible layer does not have that shape.

    >>> from pplvi.energies import RestrictedBoltzmannMachine
    >>> len(plot_filters(RestrictedBoltzmannMachine(9, 4), num_filters=4, columns=4).axes)
    4
    """
    weight = machine.filters(machine.visible, layer or machine.hidden[0]).detach()
    strongest = weight.norm(dim=1).argsort(descending=True)[:num_filters]
    return plot_images(weight[strongest], shape, columns=columns, symmetric=True)
