"""Signal-to-noise ratio of the gradient against the number of samples: nested against whole-sequence objectives.

After figure 3 of Zimmermann et al. 2021 ("Nested variational inference"), on their annealing ring (see
benchmarks/annealing_ring.py): the gradient in all parameters of the forward and reverse kernels, from independent
repetitions at one and the same guide. Objectives, all in nats:

- nested: the reverse KL divergence of each level, without (NVI) and with resampling (NVIR) between levels;
- AVO: the incremental bound of each level, level by level (Huang et al. 2018);
- ELBO: the evidence bound of the whole sequence, gradients through all levels;
- IWAE and FIVO: the bound of the whole sequence, without and with resampling (Burda et al. 2016; Maddison et al. 2017).

The signal is the norm of the mean gradient, the noise the norm of one gradient's standard deviation over the
repetitions, SNR their ratio; the noise that is left in the mean is taken off the signal. At random kernels, and
after ``--steps`` steps of NVIR.

    python -m benchmarks.nested_gradients --out benchmarks/results/nested_gradients.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import process_time

import pyro
import torch
from pyro.optim import Adam
from torch import Tensor

from benchmarks.annealing_ring import ring, start
from benchmarks.reporting import Table, command_line, write
from pplvi.compile import CompiledSVI, FlatParameters, record
from pplvi.guides import AnnealedGuide
from pplvi.kernels import ResidualKernel
from pplvi.losses import ELBO, NestedELBO, WeightedELBO
from pplvi.objectives import FilteringBound
from pplvi.programs import parameters_of
from pplvi.samplers import Annealed
from pplvi.samplers.annealed import Resampling

QUICK = "--targets 2 --samples 4 --repetitions 4 --steps 0 --objectives NVI"

OBJECTIVES = ("NVI", "NVIR", "AVO", "ELBO", "IWAE", "FIVO")


@dataclass(frozen=True)
class Row:
    """One objective at one number of samples; norms are over all parameters of the kernels."""

    objective: str
    trained_steps: int
    num_samples: int
    signal: float
    noise: float
    snr: float
    seconds: float


def objective_of(name: str, num_samples: int) -> WeightedELBO:
    """A row's objective; the nested ones are divergences of single levels, the last three of the whole sequence."""
    if name == "AVO":
        return NestedELBO("avo", num_samples)
    if name == "ELBO":
        return ELBO(num_samples, estimator="stl")
    if name in ("IWAE", "FIVO"):
        return WeightedELBO(FilteringBound(), Annealed(Resampling(name == "FIVO")), num_samples)
    return NestedELBO("reverse_kl", num_samples, resample=name == "NVIR")


def gradients(guide: AnnealedGuide, name: str, num_samples: int, repetitions: int) -> Tensor:
    """Independent gradients, one a row: the program is recorded once and its graph run again and again."""
    loss = objective_of(name, num_samples)
    parameters = FlatParameters(parameters_of(lambda: loss.differentiable_loss(ring, guide)))

    def gradient(flat: Tensor) -> tuple[Tensor, ...]:
        return (parameters.gradient(loss.differentiable_loss(ring, guide)),)

    recorded = record(gradient, [parameters.flat], parameters.places)
    with torch.no_grad():
        rows = [recorded.graph(parameters.flat, *recorded.constants)[0] for _ in range(repetitions)]
    return torch.stack(rows).double()


def measure(guide: AnnealedGuide, name: str, steps: int, num_samples: int, repetitions: int) -> Row:
    """One cell of the table."""
    began = process_time()
    found = gradients(guide, name, num_samples, repetitions)
    variance = found.var(0).sum()
    signal = (found.mean(0).square().sum() - variance / repetitions).clamp(min=0.0).sqrt()
    noise = variance.sqrt()
    return Row(name, steps, num_samples, float(signal), float(noise), float(signal / noise), process_time() - began)


def table(rows: Sequence[Row]) -> str:
    """SNR: a line for each objective, a column for each number of samples."""
    lines = []
    for steps in sorted({row.trained_steps for row in rows}):
        counts = sorted({row.num_samples for row in rows})
        own = {(r.objective, r.num_samples): r.snr for r in rows if r.trained_steps == steps}
        names = dict.fromkeys(row.objective for row in rows)
        cells = [(name, *(own[name, count] for count in counts)) for name in names]
        columns = {"objective": "<9", **{str(count): "7.3f" for count in counts}}
        lines += [f"after {steps} steps", Table(columns).text(cells)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options = parser.parse_args(arguments)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AnnealedGuide(ring, start, options.targets - 1, ResidualKernel(hidden=50))
    svi = CompiledSVI(ring, guide, Adam({"lr": 1e-3}), NestedELBO("reverse_kl", 36, resample=True), mode="trace")
    rows: list[Row] = []
    for steps in sorted({0, options.steps}):
        svi.run(steps)
        for name in options.objectives:
            rows += [measure(guide, name, steps, count, options.repetitions) for count in options.samples]
            write(options, rows=rows)
    print(table(rows))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
