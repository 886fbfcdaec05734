"""A script as users run it by ``torchrun``: minibatches, an importance-weighted bound, a checkpoint that is resumed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, TensorDataset

import pplvi
from pplvi.fitting import Checkpoint

ROWS = 40
X = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64)


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", ROWS, subsample_size=len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 0.5), obs=y)


def train(path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Ten steps on shuffled minibatches, the last of which are shorter."""
    loader = DataLoader(TensorDataset(X, Y), batch_size=15, shuffle=True)
    saved = {} if path is None else {"checkpoint": Checkpoint(path, every=4), "resume": path if path.exists() else None}
    options = {"objective": pplvi.ELBO(8), "num_steps": 10, "seed": 0, "progress": False, **saved, **options}
    fit = pplvi.fit(model, AutoNormal, data=loader, dtype=torch.float64, **options)
    return {**fit.params[0], "losses": torch.as_tensor(fit.losses[0])}


def dies(run: Any) -> None:
    """The last rank is killed once, in the middle of the training."""
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], run.step) == ("0", "1", 6):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, killed = Path(sys.argv[1]), "--killed" in sys.argv
    found = train(folder / "run.pt" if killed else None, callbacks=[dies] if killed else [])
    torch.save(found, folder / f"{os.environ['RANK']}.pt")
