"""Directed models on binary images, music and planes: NADE, MADE, RNN-NADE, deep latent Gaussians, networks of noise.

Images are stochastically binarised MNIST, drawn once (``--data`` holds ``mnist/mnist_sampled.npz``, the draw of
natural_bm, which is not the one of the papers), or scikit-learn's digits, thresholded at half intensity, without
``--data``. Chorales are the JSB set of Boulanger-Lewandowski et al. (``music/JSB_Chorales.mat``), left out without
``--data``. Every model gets ``--seconds`` CPU seconds of training on one thread, or those of ``SECONDS``; meanwhile the
rate falls to zero as a cosine. Validation data choose among points of the way; their time is not counted.

    nade          NADE with 500 hidden units: exact test log-likelihood (Larochelle & Murray 2011: -88.33)
    made          MADE with 500 hidden units in natural order (Germain et al. 2015: -88.04 with two layers, many orders)
    rnn_nade      RNN-NADE, nats a frame of chorales (Boulanger-Lewandowski et al. 2012: 5.19), or of other ``--music``
    factors       factor analysis of images: the ELBO of an amortised guide beside the exact marginal
    dlgm          deep latent Gaussians of three layers: importance-weighted bounds along the way, and with ``--draws``
    gmmn          moment matching with batches of 50, 100 and 500: unbiased MMD^2 of 1,000 draws from test images
    gan           a ring of 8 and a grid of 25 modes, non-saturating and minimax: modes that draws cover
    speed         milliseconds of 100 images forward and backward through NADE, and through a loop of autograd's

    python -m benchmarks.directed --data DIR --only nade --seconds 600 --out directed.json
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn

import pplvi
from benchmarks.reporting import command_line, table_of, write_table
from pplvi.evaluation import log_density, mode_coverage
from pplvi.models import MADE, NADE, DeepLatentGaussian, FactorAnalysis, Generator, maximum_mean_discrepancy
from pplvi.programs.plates import data_plate

SECONDS = {"nade": 600, "made": 200, "rnn_nade": 120, "factors": 60, "dlgm": 600, "gmmn": 60, "gan": 20, "speed": 0}
QUICK = "--only nade made factors dlgm gmmn gan speed --seconds 0.5 --hidden 8 --draws 20 --test-images 50"


class Images(NamedTuple):
    """Binary images, ``(N, D)``."""

    train: Tensor
    valid: Tensor
    test: Tensor


def images(folder: Path | None) -> Images:
    """Sampled MNIST, or digits of scikit-learn."""
    if folder is not None:
        found = np.load(folder / "mnist" / "mnist_sampled.npz")
        return Images(*(torch.from_numpy(found[f"{part}.data"]).float() for part in ("train", "valid", "test")))
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().data > 7.5).float()
    return Images(
        *digits[torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))].split([1397, 200, 200])
    )


# ---------------------------------------------------------------------- training for so many seconds


class Training(NamedTuple):
    """What became of a training."""

    steps: int
    seconds: float


def train(
    module: nn.Module,
    loss: Callable[[], Tensor],
    seconds: float,
    rate: float,
    watch: Callable[[float], None] = lambda share: None,
    **adam: Any,
) -> Training:
    """Adam for so many CPU seconds: the rate rises in 3 % of them, and falls as a cosine; ``watch`` is not counted."""
    optim = torch.optim.AdamW(module.parameters(), rate, fused=True, **{"weight_decay": 0.0, **adam})
    steps, start = 0, process_time()
    while (share := (process_time() - start) / seconds) < 1:
        for group in optim.param_groups:
            group["lr"] = rate * min(1.0, share / 0.03 + 0.02) * (1 + math.cos(math.pi * share)) / 2
        optim.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 100.0)
        optim.step()
        steps += 1
        before = process_time()
        watch(share)
        start += process_time() - before
    return Training(steps, process_time() - start)


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Minibatches without end, in a new order each epoch."""
    while True:
        for index in torch.randperm(len(x)).split(size):
            if len(index) == size or len(x) < size:
                yield x[index]


def pair_loss(model: Any, guide: Any, x: Iterator[Tensor], loss: Any) -> Callable[[], Tensor]:
    """The loss of a Pyro pair on the next batch, for each datum."""

    def next_loss() -> Tensor:
        batch = next(x)
        found: Tensor = loss.differentiable_loss(model, guide, batch) / len(batch)
        return found

    return next_loss


@torch.no_grad()
def mean_and_error(each: Callable[[Tensor], Tensor], x: Tensor, size: int = 500) -> tuple[float, float]:
    """Of what is computed in parts."""
    found = torch.cat([each(part) for part in x.split(size)]).double()
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


# ---------------------------------------------------------------------- autoregressive


def likelihood(model: Any, data: Images, options: argparse.Namespace, rate: float, decay: float) -> dict[str, Any]:
    """Train a model with an exact density by its own program, and keep what is best on validation images."""
    rate, size = options.rate or rate, options.batch
    model.start_at(data.train)
    best: dict[str, Any] = {"valid": -math.inf}
    curve: list[tuple[float, float]] = []  # share of the time, and nats
    marks = [0.1, 0.25, 0.5, 0.7, 0.8, 0.9]

    def watch(share: float) -> None:
        if marks and share >= marks[0]:
            curve.append((marks.pop(0), keep()))
            print(f"  {share:.2f} of the time: {curve[-1][1]:.2f} on validation images", flush=True)

    def keep() -> float:
        valid = mean_and_error(model.distribution().log_prob, data.valid[:2000])[0]
        if valid > best["valid"]:
            best.update(valid=valid, state={name: value.clone() for name, value in model.state_dict().items()})
        return valid

    loss = pair_loss(model.model, model.guide, batches(data.train, size), pplvi.ELBO())
    done = train(model, loss, options.seconds, rate, watch, weight_decay=decay)
    keep()
    model.load_state_dict(best["state"])
    test, error = mean_and_error(model.distribution().log_prob, data.test[: options.test_images])
    return {
        "model": type(model).__name__,
        "test": test,
        "error": error,
        "train": mean_and_error(model.distribution().log_prob, data.train[:5000])[0],
        "valid": [*curve, (1.0, best["valid"])],
        "steps": done.steps,
        "epochs": done.steps * size / len(data.train),
        "rate": rate,
        "weight_decay": decay,
        "cpu_seconds": done.seconds,
    }


def nade(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """NADE in the order of the pixels."""
    return [likelihood(NADE(data.train.shape[1], options.hidden), data, options, 1.5e-2, 0.01)]


def made(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """MADE in the order of the pixels."""
    return [likelihood(MADE(data.train.shape[1], [options.hidden]), data, options, 1e-2, 0.1)]


def speed(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """100 images forward and backward, the least of five."""
    model, x = NADE(data.train.shape[1], options.hidden), data.train[:100]

    def loop() -> Tensor:
        p, terms = model.distribution(), []
        state = p.hidden.expand(len(x), -1)
        for d in range(x.shape[1]):
            terms.append((torch.sigmoid(state) * p.output[d]).sum(-1) + p.bias[d])
            state = state + x[:, d : d + 1] * p.weight[d]
        return torch.distributions.Bernoulli(logits=torch.stack(terms, 1)).log_prob(x).sum(-1)

    def blocks() -> Tensor:
        return model.distribution().log_prob(x)

    rows = []
    for name, log_prob in (("blocks", blocks), ("loop", loop)):
        times = []
        for _ in range(5):
            start = process_time()
            log_prob().mean().backward()
            times.append(1e3 * (process_time() - start))
        rows.append({"pass": name, "ms": min(times)})
    return rows


class Chorales(nn.Module):
    """RNN-NADE: a recurrent network gives NADE its biases for each frame."""

    def __init__(self, frames: Tensor, hidden: int = 150, units: int = 200) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(frames.shape[1], units, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.nade = NADE(frames.shape[1], hidden, given=units, init_scale=0.05)
        self.nade.start_at(frames)

    def model(self, x: Tensor, mask: Tensor) -> None:
        """All frames of pieces ``(N, T, 88)`` that ``mask`` says are there."""
        pyro.module("chorales", self)
        past = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        given = self.drop(self.recurrent(past)[0])[mask]
        with data_plate(len(given), None):
            pyro.sample("frame", self.nade.distribution(given), obs=x[mask])

    def guide(self, x: Tensor, mask: Tensor) -> None:
        """There are no latents."""


def padded(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pieces of unequal length, and where they are."""
    x = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
    lengths = torch.tensor([len(piece) for piece in pieces])
    return x, torch.arange(x.shape[1]) < lengths[:, None]


def rnn_nade(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """Music; nats a frame."""
    if options.data is None:
        return []
    from scipy.io import loadmat

    rows = []
    if options.out and options.out.exists():  # other pieces, of earlier runs
        before = json.loads(options.out.read_text())["tables"].get("rnn_nade", {"rows": []})["rows"]
        rows = [row for row in before if row["music"] not in options.music]
    for name in options.music:
        found = loadmat(options.data / "music" / f"{name}.mat")
        parts = {
            p: [torch.from_numpy(s.astype("f4")) for s in found[f"{p}data"][0]] for p in ("train", "valid", "test")
        }
        rows.append({"music": name, **chorales(parts, options)})
    return rows


def transposed(piece: Tensor, steps: int) -> Tensor:
    """A piece some semitones higher, if all of its notes stay on the keyboard; else as it is."""
    edge = piece[:, -steps:] if steps > 0 else piece[:, :-steps]
    return piece if steps == 0 or bool(edge.any()) else piece.roll(steps, 1)


def chorales(parts: dict[str, list[Tensor]], options: argparse.Namespace) -> dict[str, Any]:
    """One set of pieces; the parameters are those that validation pieces like best."""
    net, elbo = Chorales(torch.cat(parts["train"])), pplvi.ELBO()
    best: dict[str, Any] = {"valid": math.inf}
    marks = [i / 12 for i in range(3, 12)]

    @torch.no_grad()
    def evaluate(part: str) -> float:
        net.eval()
        groups = [parts[part][i : i + 16] for i in range(0, len(parts[part]), 16)]
        total = sum(elbo.loss(net.model, net.guide, *padded(group)) for group in groups)
        net.train()
        return total / sum(map(len, parts[part]))

    def loss() -> Tensor:
        chosen = [parts["train"][i] for i in torch.randint(len(parts["train"]), (options.pieces,)).tolist()]
        chosen = [
            transposed(piece, int(torch.randint(-options.transpose, options.transpose + 1, ()))) for piece in chosen
        ]
        starts = [int(torch.randint(max(1, len(piece) - 100), ())) for piece in chosen]
        x, mask = padded([piece[at : at + 100] for piece, at in zip(chosen, starts, strict=True)])
        return elbo.differentiable_loss(net.model, net.guide, x, mask) / mask.sum()

    def watch(share: float) -> None:
        if marks and share >= marks[0]:
            marks.pop(0)
            keep()

    def keep() -> None:
        valid = evaluate("valid")
        if valid < best["valid"]:
            best.update(valid=valid, state={name: value.clone() for name, value in net.state_dict().items()})

    done = train(net, loss, options.seconds, options.rate or 2e-2, watch)
    keep()
    net.load_state_dict(best.pop("state"))
    found = {part: evaluate(part) for part in ("valid", "test", "train")}
    return {**found, "transpose": options.transpose, "steps": done.steps, "cpu_seconds": done.seconds}


# ---------------------------------------------------------------------- directed latent


def factors(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """Factor analysis of images as numbers: the ELBO of an amortised guide, and the exact marginal."""
    noise = 0.3 * torch.randn(data.train.shape, generator=torch.Generator().manual_seed(0))
    x = data.train + noise
    model = FactorAnalysis(x.shape[1], 10)
    encoder = nn.Linear(x.shape[1], 20)
    guide = pplvi.AutoAmortized(model.model, encoder, plates="data", family="multivariate_normal")
    guide(x[:2])
    both = nn.ModuleList([model, guide])
    done = train(both, pair_loss(model.model, guide, batches(x, 100), pplvi.ELBO()), options.seconds, 5e-3)
    part = x[:1000]
    with torch.no_grad():
        exact = float(model.distribution().log_prob(part).mean())
        elbo = -pplvi.ELBO(num_particles=50).loss(model.model, guide, part) / len(part)
        own = -pplvi.ELBO().loss(model.model, model.guide, part) / len(part)
    return [{"exact": exact, "elbo": elbo, "elbo_of_exact_guide": own, "gap": exact - elbo, "steps": done.steps}]


def dlgm(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """Three layers of latents with a ladder guide: the curve in time, and at its end the bound of many draws."""
    model = DeepLatentGaussian(data.train.shape[1], [50, 20, 10], hidden=min(options.hidden, 200))
    with torch.no_grad():
        list(model.decoder.parameters())[-1].copy_(data.train.mean(0).clamp(1e-3, 1 - 1e-3).logit())
    test = data.test[: min(options.test_images, 500)]
    rows: list[dict[str, Any]] = []
    marks = [0.1, 0.3]

    def bound(draws: int, share: float) -> None:
        found = log_density((model, model.guide), test, num_draws=draws, seed=0)
        error = float(found.log_prob.std() / math.sqrt(len(test)))
        row = {"cpu_seconds": share * options.seconds, "bound": found.mean, "error": error, "draws": draws}
        rows.append({**row, "test": len(test)})
        print(f"  {rows[-1]}", flush=True)

    def watch(share: float) -> None:
        if marks and share >= marks[0]:
            bound(min(options.draws, 500), marks.pop(0))

    steps = pair_loss(model.model, model.guide, batches(data.train, 100), pplvi.ImportanceWeightedELBO(5))
    done = train(model, steps, options.seconds, options.rate or 3e-3, watch)
    for draws in sorted({min(options.draws, 500), options.draws}):
        bound(draws, 1.0)
    return [{**row, "steps": done.steps} for row in rows]


# ---------------------------------------------------------------------- implicit


def gmmn(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """Moment matching with three sizes of batches; training images for comparison."""
    test, rows = data.test[:1000], []
    for size in (50, 100, 500):
        torch.manual_seed(0)
        widths = [10, 64, 256, 256, data.train.shape[1]]
        layers = [part for i in range(4) for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
        model = Generator(nn.Sequential(*layers[:-1], nn.Sigmoid()), 10, noise="uniform")
        loss = pplvi.MomentMatching()
        batch = batches(data.train, size)
        done = train(
            model,
            lambda loss=loss, model=model, batch=batch: loss.differentiable_loss(model.model, model.guide, next(batch)),
            options.seconds,
            options.rate or 7e-3,
        )
        draws = model.sample(1000)
        rows.append({"batch": size, "mmd2": float(maximum_mean_discrepancy(draws, test)), "steps": done.steps})
    rows.append({"batch": None, "mmd2": float(maximum_mean_discrepancy(data.train[:1000], test)), "steps": 0})
    return rows


def gan(options: argparse.Namespace, data: Images) -> list[dict[str, Any]]:
    """Two planes of modes."""
    angle = torch.arange(8) * 2 * math.pi / 8
    axis = torch.arange(-2.0, 3.0)
    modes = {"ring": 2 * torch.stack([angle.cos(), angle.sin()], 1), "grid": torch.cartesian_prod(axis, axis)}
    return [
        adversarial(name, centres, saturating, options)
        for name, centres in modes.items()
        for saturating in (False, True)
    ]


def adversarial(name: str, centres: Tensor, saturating: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One plane and one form of the loss."""
    torch.manual_seed(0)
    scale = 0.1
    model = Generator(nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)), 2)
    judge = nn.Sequential(
        nn.Linear(2, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
    )
    loss = pplvi.Adversarial(saturating=saturating)

    def guide(x: Tensor) -> Tensor:
        pyro.module("judge", judge)
        return judge(x).squeeze(-1)

    def next_loss() -> Tensor:
        x = centres[torch.randint(len(centres), (256,))] + scale * torch.randn(256, 2)
        return loss.differentiable_loss(model.model, guide, x)

    done = train(nn.ModuleList([model, judge]), next_loss, options.seconds, 1e-3, betas=(0.5, 0.999))
    found = mode_coverage(model.sample(5000), centres, 4 * scale)
    x = centres[torch.randint(len(centres), (5000,))] + scale * torch.randn(5000, 2)
    with torch.no_grad():
        value = loss.loss(model.model, guide, x)
    row = {"modes": name, "of": len(centres), "saturating": saturating, "covered": found.covered}
    return {**row, "near": found.share, "loss": value, "log 4": math.log(4), "steps": done.steps}


TABLES: dict[str, Callable[[argparse.Namespace, Images], list[dict[str, Any]]]] = {
    "nade": nade,
    "made": made,
    "rnn_nade": rnn_nade,
    "factors": factors,
    "dlgm": dlgm,
    "gmmn": gmmn,
    "gan": gan,
    "speed": speed,
}


def main(argv: Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Make the tables that are asked for."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mnist/ and music/; scikit-learn's digits without")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seconds", type=float, help="CPU seconds of each training; else those of each table")
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--rate", type=float, help="learning rate of Adam")
    parser.add_argument("--batch", type=int, default=100, help="images of a step of NADE and MADE")
    parser.add_argument("--draws", type=int, default=5000, help="of importance-weighted bounds")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument(
        "--transpose", type=int, default=5, help="semitones, at most, by which pieces are moved in training"
    )
    parser.add_argument("--pieces", type=int, default=8, help="of a step of RNN-NADE")
    parser.add_argument("--music", nargs="+", default=["JSB_Chorales"])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    data, found = images(options.data), {}
    for name in options.only:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        seconds = SECONDS[name] if options.seconds is None else options.seconds
        settings = argparse.Namespace(**{**vars(options), "only": [name], "seconds": seconds})
        found[name] = TABLES[name](settings, data)
        if found[name]:
            print(f"\n{name}\n{table_of(found[name])}")
        write_table(settings, name, found[name])
    return found


if __name__ == "__main__":
    main()
