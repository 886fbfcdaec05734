"""Nested variational inference level by level, or all levels at once: milliseconds and memory of a training step.

The step is that of the annealing ring (benchmarks/annealing_ring.py): residual kernels with 50 hidden units, reverse KL
divergences, learned betas, Adam. Compared are ``NestedELBO(vectorize_levels=False)``, which goes backward level by
level, and ``True``, which scores all levels in one graph; the same step written by hand in batched
torch; and the recorded and the compiled step of ``CompiledSVI``. Time is CPU time of one thread, the median of steps
that take turns, for 8 targets and 36 particles. Memory is the largest number of bytes that autograd keeps for backward
passes at any one time, each storage counted once, for 1,000 particles.

    python -m benchmarks.levels --out benchmarks/results/levels.json
"""

from collections import Counter
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import pyro
import torch
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import softplus

from benchmarks.annealing_ring import MODES, ring, start
from benchmarks.reporting import Table, command_line, write
from pplvi.compile import CompiledSVI, CompileMode
from pplvi.guides import AnnealedGuide
from pplvi.kernels import ResidualKernel
from pplvi.losses import NestedELBO
from pplvi.weights import resample

QUICK = "--no-compiler --rounds 2 --targets 2 --particles 100"

Step = Callable[[], Any]


def guide_of(num_targets: int, name: str) -> AnnealedGuide:
    """The guide of the ring."""
    return AnnealedGuide(ring, start, num_targets - 1, ResidualKernel(hidden=50), learn_path=True, name=name)


def eager(num_targets: int, num_particles: int, resampling: bool, together: bool) -> Step:
    """A step through Pyro's handlers, with one torch optimiser for all parameters."""
    guide = guide_of(num_targets, f"{num_targets}_{num_particles}_{resampling}_{together}")
    loss = NestedELBO("reverse_kl", num_particles, resample=resampling, vectorize_levels=together)
    loss.loss(ring, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        value = loss.loss_and_grads(ring, guide)
        optimizer.step()
        return value

    return step


def recorded(resampling: bool, mode: CompileMode) -> Step:
    """A step of CompiledSVI, ten at a time."""
    loss = NestedELBO("reverse_kl", 36, resample=resampling)
    svi = CompiledSVI(ring, guide_of(8, f"{mode}_{resampling}"), Adam({"lr": 1e-3}), loss, mode=mode)
    return lambda: svi.run(10)


class ByHand:
    """The same step in plain torch: parameters stacked over levels, all levels in one graph."""

    def __init__(self, num_targets: int, num_particles: int, resampling: bool) -> None:
        self.levels, self.count, self.resampling = num_targets - 1, num_particles, resampling
        width, both = 50, 2 * self.levels
        sizes = [(both, width, 2), (both, 1, width), (both, 4, width), (both, 1, 4), (self.levels,)]
        self.parameters = [torch.zeros(size) for size in sizes]
        for parameter in self.parameters[:2]:
            parameter.uniform_(-(2**-0.5), 2**-0.5)
        self.parameters = [parameter.requires_grad_() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)

    def kernel(self, x: Tensor, which: slice) -> Normal:
        """Kernels of several levels at their own particles, ``(levels, particles, 2)``."""
        weight, bias, outputs, offset = (parameter[which] for parameter in self.parameters[:4])
        hidden = torch.relu(x @ weight.mT + bias)
        shift, spread = (hidden @ outputs.mT + offset).chunk(2, -1)
        return Normal(x + shift, softplus(spread + 0.5413).sqrt(), validate_args=False)

    def targets(self, x: Tensor, betas: Tensor) -> Tensor:
        """Log densities of the targets with these betas, ``(levels, 1)``."""
        base = Normal(0.0, 5.0, validate_args=False).log_prob(x).sum(-1)
        return (1 - betas) * base + betas * torch.logsumexp(MODES.log_prob(x.unsqueeze(-2)), -1)

    def betas(self) -> Tensor:
        """``beta[0], ..., beta[levels]``, in a column."""
        inner = torch.softmax(self.parameters[4], 0).cumsum(0)
        return torch.cat([inner.new_zeros(1), inner[:-1], inner.new_ones(1)]).unsqueeze(-1)

    @torch.no_grad()
    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draws, their noise and, when resampling, their log weights, level by level."""
        x, weight = 5 * torch.randn(self.count, 2), torch.zeros(self.count)
        before, noises, weights, betas = [], [], [], self.betas()
        for level in range(self.levels):
            before.append(x)
            weights.append(weight)
            q = self.kernel(x[None], slice(level, level + 1))
            noises.append(torch.randn(1, self.count, 2))
            y = q.loc + q.scale * noises[-1]
            if self.resampling and level < self.levels - 1:
                r = self.kernel(y, slice(self.levels + level, self.levels + level + 1))
                change = self.targets(torch.stack([x, y[0]]), betas[level : level + 2])
                weight = weight + change[1] - change[0] + (r.log_prob(x) - q.log_prob(y)).sum(-1)[0]
                chosen = resample(weight)
                weight = (weight.logsumexp(0) - torch.tensor(self.count).log()).expand(self.count)
                y = y[:, chosen]
            x = y[0]
        return torch.stack(before), torch.cat(noises), torch.stack(weights), betas

    def __call__(self) -> float:
        """One training step."""
        before, noises, weights, _ = self.draw()
        betas, levels = self.betas(), self.levels
        q = self.kernel(before, slice(0, levels))
        y = q.loc + q.scale * noises
        frozen = Normal(q.loc.detach(), q.scale.detach(), validate_args=False)
        reverse = self.kernel(y, slice(levels, 2 * levels)).log_prob(before).sum(-1)
        initial = self.targets(before, betas[:-1])
        log_v = self.targets(y, betas[1:]) + reverse - initial - frozen.log_prob(y).sum(-1)
        if not self.resampling:
            after = log_v.detach().cumsum(0)
            weights = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
        came = torch.softmax(weights, -1)
        left = torch.softmax(weights + log_v.detach(), -1)
        mean = (came * log_v).sum(-1, keepdim=True)
        signal = (log_v - mean).detach()
        fixed = self.targets(y.detach(), betas[1:])
        loss = (-mean.squeeze(-1) - (came * (signal + 1) * initial).sum(-1) + (left * fixed).sum(-1)).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def milliseconds(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median CPU time of each step; they take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = process_time()
            step()
            times[name].append(1000 * (process_time() - began))
    return {name: float(torch.tensor(found).median()) for name, found in times.items()}


class _Kept:
    """What autograd keeps: bytes of all storages that are saved for a backward pass, now and at most."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "_Held":
        storage = tensor.untyped_storage()
        if self.users[storage.data_ptr()] == 0:
            self.now += storage.nbytes()
        self.users[storage.data_ptr()] += 1
        self.most = max(self.most, self.now)
        return _Held(self, tensor.detach())  # the graph of a tensor would keep itself alive

    def release(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.users[storage.data_ptr()] -= 1
        if self.users[storage.data_ptr()] == 0:
            self.now -= storage.nbytes()


class _Held:
    """One saved tensor, released together with its graph."""

    def __init__(self, kept: _Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor

    def __del__(self) -> None:
        self.kept.release(self.tensor)


def kept_bytes(step: Step) -> int:
    """Most bytes that autograd keeps at any one time in a step."""
    step()
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        step()
    return kept.most


def time_table(rounds: int, modes: Sequence[CompileMode]) -> list[dict[str, Any]]:
    """Milliseconds of a step at 8 targets and 36 particles."""
    rows = []
    for resampling in (False, True):
        steps: dict[str, Step] = {
            "level by level": eager(8, 36, resampling, together=False),
            "all levels": eager(8, 36, resampling, together=True),
            "by hand": ByHand(8, 36, resampling),
        }
        found = milliseconds(steps, rounds)
        tens = milliseconds({str(mode): recorded(resampling, mode) for mode in modes}, max(3, rounds // 10))
        found |= {f"CompiledSVI {mode}": ms / 10 for mode, ms in tens.items()}
        rows += [{"resampling": resampling, "step": name, "ms": ms} for name, ms in found.items()]
    return rows


def memory_table(targets: Sequence[int], num_particles: int) -> list[dict[str, Any]]:
    """Bytes against the number of targets."""
    return [
        {"targets": count, "step": name, "bytes": kept_bytes(eager(count, num_particles, False, together))}
        for count in targets
        for name, together in (("level by level", False), ("all levels", True))
    ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and write."""
    parser = command_line(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--targets", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--particles", type=int, default=1000, help="of the memory table")
    parser.add_argument("--no-compiler", action="store_true", help="leave out the compiled step")
    options = parser.parse_args(arguments)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    modes: tuple[CompileMode, ...] = ("trace",) if options.no_compiler else ("trace", True)
    kept = Table({"targets": "7d", "step": "<15", "MB": "9.2f"})
    spent = Table({"resampling": "<14", "step": "<20", "ms": "8.2f"})
    memory = memory_table(options.targets, options.particles)
    for row in memory:
        kept.show(row["targets"], row["step"], row["bytes"] / 1e6)
    print()
    times = time_table(options.rounds, modes)
    for row in times:
        spent.show("at every level" if row["resampling"] else "none", row["step"], row["ms"])
    found = {"memory": memory, "time": times}
    write(options, **found)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
