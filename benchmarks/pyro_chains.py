"""Hidden Markov models of tones, of the eight kinds of Pyro's ``examples/hmm.py``, for benchmarks/pyro_examples.py.

A sequence is a table of tones that are on or off, ``(time, tones)``; sequences differ in length and are padded. Hidden
states are summed out, what is above them has a point estimate or is a parameter.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

SUMMED = {"enumerate": "parallel"}
STATES, TONES = 4, 5


def tunes(count: int = 4, longest: int = 6) -> tuple[Tensor, Tensor]:
    """Simulated sequences ``(count, longest, TONES)`` and their lengths."""
    g = torch.Generator().manual_seed(5)
    chord = torch.rand(STATES, TONES, generator=g).round() * 0.8 + 0.1
    state = (torch.arange(longest) + torch.randint(STATES, (count, 1), generator=g)) % STATES
    return torch.bernoulli(chord[state], generator=g), torch.tensor([longest, longest - 1, longest - 3, longest])[
        :count
    ]


def sticky(states: int = STATES) -> Any:
    """A prior of transitions that tend to stay."""
    return dist.Dirichlet(torch.eye(states) + 0.2).to_event(1)


def tones_of(*shape: int) -> Any:
    """A prior of probabilities that a tone is on."""
    return dist.Beta(0.5, 1.5).expand([*shape, TONES]).to_event(len(shape) + 1)


def one_by_one(tune: Tensor, length: Tensor) -> None:
    """Each sequence has sites of its own, in a plate that is a Python loop."""
    move = pyro.sample("p_move", sticky())
    on = pyro.sample("p_on", tones_of(STATES))
    tones = pyro.plate("tones", TONES, dim=-1)
    for i in pyro.plate("tunes", len(tune)):
        state: Any = 0
        for t in pyro.markov(range(length[i])):
            state = pyro.sample(f"s_{i}_{t}", dist.Categorical(move[state]), infer=SUMMED)
            with tones:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(on[state.squeeze(-1)]), obs=tune[i, t])


def together(tune: Tensor, length: Tensor) -> None:
    """All sequences in one plate, what is behind a sequence's end masked."""
    move = pyro.sample("p_move", sticky())
    on = pyro.sample("p_on", tones_of(STATES))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("tunes", len(tune), dim=-2):
        state: Any = 0
        for t in pyro.markov(range(length.max())):
            with poutine.mask(mask=(t < length).unsqueeze(-1)):
                state = pyro.sample(f"s_{t}", dist.Categorical(move[state]), infer=SUMMED)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(on[state.squeeze(-1)]), obs=tune[:, t])


def remembering(tune: Tensor, length: Tensor) -> None:
    """A tone also depends on whether it was on before."""
    move = pyro.sample("p_move", sticky())
    on = pyro.sample("p_on", tones_of(STATES, 2))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("tunes", len(tune), dim=-2):
        state: Any = 0
        before: Any = 0
        for t in pyro.markov(range(length.max())):
            with poutine.mask(mask=(t < length).unsqueeze(-1)):
                state = pyro.sample(f"s_{t}", dist.Categorical(move[state]), infer=SUMMED)
                with tones as tone:
                    probs = on[state, before, tone]
                    before = pyro.sample(f"y_{t}", dist.Bernoulli(probs), obs=tune[:, t]).long()


def two_chains(tune: Tensor, length: Tensor) -> None:
    """Two independent chains decide together which tones are on."""
    half = int(STATES**0.5)
    slow, fast = pyro.sample("p_slow", sticky(half)), pyro.sample("p_fast", sticky(half))
    on = pyro.sample("p_on", tones_of(half, half))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("tunes", len(tune), dim=-2):
        a: Any = 0
        b: Any = 0
        for t in pyro.markov(range(length.max())):
            with poutine.mask(mask=(t < length).unsqueeze(-1)):
                a = pyro.sample(f"a_{t}", dist.Categorical(slow[a]), infer=SUMMED)
                b = pyro.sample(f"b_{t}", dist.Categorical(fast[b]), infer=SUMMED)
                with tones as tone:
                    pyro.sample(f"y_{t}", dist.Bernoulli(on[a, b, tone]), obs=tune[:, t])


def one_drives_another(tune: Tensor, length: Tensor) -> None:
    """The state of the first chain chooses the transitions of the second."""
    half = int(STATES**0.5)
    slow = pyro.sample("p_slow", sticky(half))
    fast = pyro.sample("p_fast", dist.Dirichlet(torch.eye(half) + 0.2).expand_by([half]).to_event(2))
    on = pyro.sample("p_on", tones_of(half, half))
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("tunes", len(tune), dim=-2):
        a = b = torch.tensor(0)
        for t in pyro.markov(range(length.max())):
            with poutine.mask(mask=(t < length).unsqueeze(-1)):
                a = pyro.sample(f"a_{t}", dist.Categorical(slow[a]), infer=SUMMED)
                b = pyro.sample(f"b_{t}", dist.Categorical(Vindex(fast)[a, b]), infer=SUMMED)
                with tones as tone:
                    pyro.sample(f"y_{t}", dist.Bernoulli(on[a, b, tone]), obs=tune[:, t])


class Tones(nn.Module):
    """Logits of the next tones, from the hidden state and a convolution of the tones before."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(STATES, width)
        self.smooth = nn.Conv1d(1, 2, 3, padding=1)
        self.before = nn.Linear(2 * TONES, width)
        self.out = nn.Linear(width, TONES)

    def forward(self, state: Tensor, before: Tensor) -> Tensor:
        """Logits ``(..., TONES)``; ``state`` has a last dimension of one, or none where it is ``arange``."""
        one_hot = before.new_zeros(*state.shape[:-1], STATES).scatter_(-1, state, 1)
        near = self.smooth(before.reshape(-1, 1, TONES)).relu().reshape(*before.shape[:-1], -1)
        return self.out((self.embed(one_hot) + self.before(near)).relu())


def neural() -> Callable[[Tensor, Tensor], None]:
    """A network gives the tones from the state and the tones before."""
    network = Tones()

    def model(tune: Tensor, length: Tensor) -> None:
        pyro.module("network", network)
        move = pyro.sample("p_move", sticky())
        with pyro.plate("tunes", len(tune), dim=-2):
            state: Any = 0
            before = torch.zeros(TONES)
            for t in pyro.markov(range(length.max())):
                with poutine.mask(mask=(t < length).unsqueeze(-1)):
                    state = pyro.sample(f"s_{t}", dist.Categorical(move[state]), infer=SUMMED)
                    with pyro.plate(f"tones_{t}", TONES, dim=-1):
                        logits = network(state, before)
                        before = pyro.sample(f"y_{t}", dist.Bernoulli(logits=logits), obs=tune[:, t])

    return model


def second_order(tune: Tensor, length: Tensor) -> None:
    """The next state depends on the last two, whose influences are mixed; all unknowns are parameters."""
    simplex, unit = dist.constraints.simplex, dist.constraints.unit_interval
    last = pyro.param("last", lambda: torch.rand(STATES, STATES), constraint=simplex)
    older = pyro.param("older", lambda: torch.rand(STATES, STATES), constraint=simplex)
    share = pyro.param("share", torch.tensor(0.5), constraint=unit)
    move = share * last + (1 - share) * older.unsqueeze(-2)
    on = pyro.param("on", lambda: torch.rand(STATES, TONES), constraint=unit)
    tones = pyro.plate("tones", TONES, dim=-1)
    with pyro.plate("tunes", len(tune), dim=-2):
        now, past = torch.tensor(0), torch.tensor(0)
        for t in pyro.markov(range(length.max()), history=2):
            with poutine.mask(mask=(t < length).unsqueeze(-1)):
                probs = Vindex(move)[past, now]
                past, now = now, pyro.sample(f"s_{t}", dist.Categorical(probs), infer=SUMMED)
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(on[now.squeeze(-1)]), obs=tune[:, t])


def in_parallel() -> Callable[[Tensor, Tensor], None]:
    """The whole chain is one distribution, its states summed out by a scan over time."""
    network = Tones()

    def model(tune: Tensor, length: Tensor) -> None:
        pyro.module("network", network)
        move = pyro.sample("p_move", sticky())
        with pyro.plate("tunes", len(tune), dim=-1):
            seen = tune[:, : length.max()]
            time = torch.arange(seen.shape[1])
            before = nn.functional.pad(seen[:, :-1], (0, 0, 1, 0))
            states = torch.arange(STATES).unsqueeze(-1)
            logits = network(states, before.unsqueeze(-2).expand(-1, -1, STATES, -1))
            emit = dist.Bernoulli(logits=logits).to_event(1).mask((time < length.unsqueeze(-1)).unsqueeze(-1))
            first = torch.full((STATES,), -torch.inf)
            first[0] = 0.0
            pyro.sample("y", dist.DiscreteHMM(first, move.log(), emit), obs=seen)

    return model


CHAINS: dict[str, Callable[[], Callable[[Tensor, Tensor], None]]] = {
    "hmm-0-one-by-one": lambda: one_by_one,
    "hmm-1-masked": lambda: together,
    "hmm-2-remembering": lambda: remembering,
    "hmm-3-two-chains": lambda: two_chains,
    "hmm-4-driven": lambda: one_drives_another,
    "hmm-5-neural": neural,
    "hmm-6-second-order": lambda: second_order,
    "hmm-7-in-parallel": in_parallel,
}
