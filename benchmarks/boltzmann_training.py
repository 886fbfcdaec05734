"""What the benchmarks of Boltzmann machines share: binary images, training with averaged weights, tables as files."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pplvi import BoltzmannELBO, CompiledSVI

Kind = Literal["sampled", "threshold"]

EVERY = 10  # updates from one average to the next


@dataclass(frozen=True)
class Data:
    """Binary images, ``(num_images, num_pixels)``, and their labels."""

    name: str
    v: Tensor
    y: Tensor
    test_v: Tensor
    test_y: Tensor


def load(folder: str | Path | None, kind: Kind) -> Data:
    """MNIST from ``mnist_sampled.npz`` or ``mnist_threshold.npz``, 60,000 images to train on; digits without folder.

    Sampled images have every pixel drawn once, in proportion to its grey level.
    """
    if folder is None:
        return _digits(kind)
    with np.load(Path(folder) / f"mnist_{kind}.npz") as file:
        parts = {key: torch.as_tensor(file[key]) for key in file}
    v = torch.cat([parts["train.data"], parts["valid.data"]]).float()
    y = torch.cat([parts["train.lbl"], parts["valid.lbl"]]).long()
    return Data("mnist", v, y, parts["test.data"].float(), parts["test.lbl"].long())


def _digits(kind: Kind) -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    grey, y = torch.as_tensor(images)[order] / 16, torch.as_tensor(labels)[order]
    v = (grey > 7.5 / 16).float() if kind == "threshold" else torch.bernoulli(grey, generator=generator).float()
    return Data("digits", v[:1300], y[:1300], v[1300:], y[1300:])


def batches(data: Tensor, size: int = 100) -> Iterator[tuple[Tensor]]:
    """Batches of one size, epoch after epoch, without end."""
    while True:
        for rows in torch.randperm(len(data)).split(size):
            if len(rows) == size:
                yield (data[rows],)


def started(machine: Any, data: Tensor) -> Any:
    """A machine whose visible biases and offsets are those of the data's mean."""
    mean = data.mean(0).clamp(0.01, 0.99)
    with torch.no_grad():
        machine.bias("v").copy_(torch.logit(mean))
        machine.offset("v").copy_(mean)
    return machine


class Training:
    """Persistent contrastive divergence by SGD, with an exponential average of the parameters beside it.

    :ivar window: updates over which parameters are averaged.
    :ivar seconds: CPU seconds of the updates so far, without those of the compiler's own processes.
    """

    def __init__(
        self,
        machine: Any,
        guide: Any,
        data: Tensor,
        updates: int,
        *,
        lr: float,
        sweeps: int = 1,
        weight_decay: float = 0.0,
        falling: bool = True,
        window: int = 1000,
        mode: Any = "trace",
    ) -> None:
        self.machine, self.batches, self.window = machine, batches(data), window
        self.svi = CompiledSVI(
            machine.model,
            guide,
            partial(torch.optim.SGD, lr=lr, weight_decay=weight_decay),
            BoltzmannELBO(100, sweeps=sweeps),
            mode=mode,
            schedule=(lambda t: max(1.0 - t / updates, 0.0)) if falling else None,
        )
        self.seconds = 0.0
        self._average: AveragedModel | None = None

    def run(self, updates: int) -> None:
        """More updates."""
        start = time.process_time()
        for first in range(0, updates, EVERY):
            self.svi.epoch(islice(self.batches, min(EVERY, updates - first)))
            self._follow()
        self.seconds += time.process_time() - start

    def _follow(self) -> None:
        if self._average is None:  # not before the first updates have made the chains
            keep = max(0.0, 1.0 - EVERY / self.window)
            self._average = AveragedModel(self.machine, multi_avg_fn=get_ema_multi_avg_fn(keep))
        self._average.update_parameters(self.machine)

    @property
    def average(self) -> Any:
        """The machine with averaged parameters."""
        assert self._average is not None
        return self._average.module
