"""The annealing ring: nested variational inference on an unnormalised mixture of eight Gaussians.

Reproduces table 1 of Zimmermann et al. 2021 (section 4.1): gamma_K(x) = sum over m = 1..8 of
N(x; 10 (sin, cos)(2 pi m/8), 0.5 I), so that log Z = log 8 = 2.0794; gamma_1 = N(0, 25 I); a geometric path of K
targets; 288 / K particles; residual Gaussian kernels with 50 hidden units; Adam with rate 1e-3. Rows: AVO, NVI, NVIR,
NVI*, NVIR* (R: resampling at every level in training, *: learned betas). The paper trains for 20,000 steps.

Evaluation: batches of 1,000 draws, without resampling (the honest, cumulative effective sample size) and with it,
where the effective sample size is that of the last level alone; the published table gives the latter for the R rows.
Published for K = 8 (ESS of 1,000; log Z): AVO 295, 2.06; NVI 319, 2.07; NVIR 961, 2.08; NVI* 481, 2.08; NVIR* 965,
2.08. The row "best" has the same sample budget and other choices: a kernel with two smooth hidden layers and a full
covariance, betas that start early, and a learning rate that falls.

    python -m benchmarks.annealing_ring --targets 8 6 4 2 --steps 20000 --batches 100 --out ring.json
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from time import process_time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import linear, silu, softplus

from benchmarks.reporting import Table, command_line, write
from pplvi.compile import CompiledSVI, CompileMode
from pplvi.guides import AnnealedGuide
from pplvi.kernels import Coordinates, Kernel, ResidualKernel
from pplvi.kernels.base import LogDensity, Program
from pplvi.losses import NestedELBO
from pplvi.objectives import Routing
from pplvi.samplers import Annealed, Request
from pplvi.samplers.annealed import Resampling
from pplvi.training import Cosine, Schedule
from pplvi.weights import effective_sample_size, logmeanexp

QUICK = "--targets 2 --methods AVO --steps 2 --batches 2 --mode eager"

BUDGET = 288
EARLY = (0.02, 0.065, 0.14, 0.25, 0.4, 0.62)
HOW: dict[str, CompileMode] = {"compiled": True, "trace": "trace", "eager": False}


class Shear(Transform):
    """``mean + scale * (noise[0], noise[1] + slant * noise[0])``: a normal in the plane with any covariance."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, mean: Tensor, scale: Tensor, slant: Tensor) -> None:
        super().__init__()
        self.mean, self.scale, self.slant = mean, scale, slant

    def _call(self, x: Tensor) -> Tensor:
        return self.mean + self.scale * torch.stack([x[..., 0], x[..., 1] + self.slant * x[..., 0]], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        x = (y - self.mean) / self.scale
        return torch.stack([x[..., 0], x[..., 1] - self.slant * x[..., 0]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log scales."""
        return self.scale.log().sum(-1)


@dataclass(frozen=True)
class SmoothKernel:
    """A residual kernel of our own: two smooth hidden layers, and a covariance that need not be diagonal."""

    hidden: int = 96

    def build(self, sites: Sequence[Coordinates], log_density: LogDensity) -> tuple[Program, Program]:
        """Two programs with parameters of their own."""
        return SmoothProgram(self, sites[0]), SmoothProgram(self, sites[0])


class SmoothProgram(PyroModule):
    """The program that :class:`SmoothKernel` builds for one site in the plane."""

    def __init__(self, kernel: SmoothKernel, site: Coordinates) -> None:
        super().__init__()
        self.site = site
        self.alike = kernel, site  # what else than its parameters makes the program: levels can be run as one
        for index, inputs in enumerate((2, kernel.hidden)):
            layer = torch.nn.Linear(inputs, kernel.hidden)
            setattr(self, f"weight_{index}", PyroParam(layer.weight.detach().clone()))
            setattr(self, f"bias_{index}", PyroParam(layer.bias.detach().clone()))
        self.outputs = PyroParam(torch.zeros(5, kernel.hidden + 1))

    def forward(self, previous: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        """Sample around the previous value."""
        x = self.site.read(previous)
        hidden, outputs = silu(linear(x / 5, self.weight_0, self.bias_0)), self.outputs
        hidden = silu(linear(hidden, self.weight_1, self.bias_1))
        found = linear(hidden, outputs[:, :-1], outputs[:, -1])
        scale = softplus(found[..., 2:4] + 0.5413).sqrt()  # one at first
        noise = dist.Normal(torch.zeros_like(x), 1.0).to_event(1)
        shear = Shear(x + found[..., :2], scale, found[..., 4])
        pyro.sample(self.site.name, dist.TransformedDistribution(noise, [shear]))


RESIDUAL = ResidualKernel(hidden=50)


@dataclass(frozen=True)
class Method:
    """A row of the table; the defaults are the published set-up.

    :ivar annealed: the learning rate rises for 500 steps and then falls along a cosine.
    """

    divergence: Any = "reverse_kl"
    resample: bool = False
    learn_path: bool = False
    kernel: Kernel = RESIDUAL
    betas: tuple[float, ...] | None = None
    rate: float = 1e-3
    annealed: bool = False


METHODS = {
    "AVO": Method("avo"),
    "NVI": Method(),
    "NVIR": Method(resample=True),
    "NVI*": Method(learn_path=True),
    "NVIR*": Method(resample=True, learn_path=True),
    "best": Method(kernel=SmoothKernel(), betas=EARLY, rate=1e-2, annealed=True),
}
PUBLISHED = tuple(METHODS)[:5]


@dataclass(frozen=True)
class Row:
    """One method at one number of targets; ESS of 1,000 draws, log Z and its standard deviation over batches."""

    method: str
    num_targets: int
    seed: int
    steps: int
    ess: float
    log_z: float
    log_z_sd: float
    ess_resampled: float
    log_z_resampled: float
    ms_a_step: float
    betas: tuple[float, ...]


ANGLE = 2 * math.pi * torch.arange(1, 9) / 8
MODES = dist.Normal(10 * torch.stack([ANGLE.sin(), ANGLE.cos()], -1), 0.5**0.5).to_event(1)
ANYWHERE = dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False)
START = dist.Normal(torch.zeros(2), 5.0).to_event(1)


def ring() -> None:
    """Eight modes on a circle of radius 10, with a total mass of 8."""
    x = pyro.sample("x", ANYWHERE)
    pyro.factor("density", torch.logsumexp(MODES.log_prob(x.unsqueeze(-2)), -1))


def start() -> None:
    """The first target."""
    pyro.sample("x", START)


def evaluate(guide: AnnealedGuide, resample: bool, batches: int) -> tuple[float, float, float]:
    """Mean ESS of 1,000 draws, mean of log Z and its standard deviation over batches."""
    sampler, request = Annealed(Resampling(resample)), Request(1000, routing=Routing(detach=True, local=True))
    with torch.no_grad():
        last = [list(sampler(ring, guide, (), {}, request))[-1].log_weight for _ in range(batches)]
    log_weight: Tensor = torch.stack(last, 1)
    log_z = logmeanexp(log_weight)
    return float(effective_sample_size(log_weight).mean()), float(log_z.mean()), float(log_z.std())


def annealed(steps: int) -> Schedule:
    """500 steps up, then a cosine down to a ten-thousandth."""
    cosine = Cosine(steps)
    return lambda step: min(1.0, (step + 1) / 500) * (cosine(step) + 1e-4)


def measure(method: str, num_targets: int, steps: int, batches: int, seed: int, mode: CompileMode) -> Row:
    """Train one row of the table and evaluate it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    how = METHODS[method]
    guide = AnnealedGuide(ring, start, num_targets - 1, how.kernel, learn_path=how.learn_path, betas=how.betas)
    loss = NestedELBO(how.divergence, BUDGET // num_targets, resample=how.resample)
    schedule = annealed(steps) if how.annealed else None
    svi = CompiledSVI(ring, guide, Adam({"lr": how.rate}), loss, mode=mode, schedule=schedule)
    svi.step()
    began = process_time()
    svi.run(steps - 1)
    each = 1000 * (process_time() - began) / max(1, steps - 1)
    ess, log_z, sd = evaluate(guide, False, batches)
    ess_resampled, log_z_resampled, _ = evaluate(guide, True, batches)
    betas = tuple(round(beta, 4) for beta in guide.betas.tolist())
    return Row(method, num_targets, seed, steps, ess, log_z, sd, ess_resampled, log_z_resampled, each, betas)


def table() -> Table:
    """Its titles."""
    titles = {"method": "<6", "K": "3d", "ESS": "5.0f", "log Z": "6.3f", "sd": "6.3f"}
    return Table({**titles, "ESS (R)": "5.0f", "log Z (R)": "6.3f", "ms/step": "7.1f"})


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=[8])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(PUBLISHED))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--mode", choices=list(HOW), default="compiled", help="how CompiledSVI runs a step")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    shown = table()
    for num_targets, method, seed in product(options.targets, options.methods, options.seeds):
        rows.append(measure(method, num_targets, options.steps, options.batches, seed, HOW[options.mode]))
        r = rows[-1]
        shown.show(r.method, num_targets, r.ess, r.log_z, r.log_z_sd, r.ess_resampled, r.log_z_resampled, r.ms_a_step)
        write(options, rows=rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
