"""The pass of NADE through all pixels at once, and its gradient, as operators that recorded programs keep whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 24  # pixels at a time: fewer cost more calls, more cost wider products


class _Runs(NamedTuple):
    """The hidden states of one block of pixels, a row for each datum and one more for each of its pixels that is on.

    :ivar seen: the pixels of the block that a row has seen, ``(rows, block)``.
    :ivar datum: whose row it is, ``(rows,)``.
    :ivar place: the row that each pixel of each datum is predicted from, ``(N, block)``.
    """

    seen: Tensor
    datum: Tensor
    place: Tensor

    @classmethod
    def of(cls, block: Tensor) -> _Runs:
        """Hidden states change only where a pixel is not zero."""
        on = (block != 0).long()
        before = on.cumsum(1)
        count = before[:, -1] + 1
        first = count.cumsum(0) - count
        datum = torch.repeat_interleave(torch.arange(len(block), device=block.device), count)
        number = torch.arange(len(datum), device=block.device) - first[datum]
        seen = block[datum].mul_(before[datum] <= number[:, None])
        return cls(seen, datum, first[:, None] + before - on)


def _cut(low: int, x: Tensor, weight: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = min(BLOCK, x.shape[1] - low)
    return x.narrow(1, low, size), weight.narrow(0, low, size), output.narrow(0, low, size)


@torch.library.custom_op("pplvi::nade", mutates_args=())
def _nade(x: Tensor, weight: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
    state, columns = hidden.clone(memory_format=torch.contiguous_format), torch.arange(BLOCK, device=x.device)
    logits = torch.empty_like(x)
    for low in range(0, x.shape[1], BLOCK):
        block, w, v = _cut(low, x, weight, output)
        runs = _Runs.of(block)
        h = torch.addmm(state[runs.datum], runs.seen, w).sigmoid_()
        logits[:, low : low + len(w)] = (h @ v.T)[runs.place, columns[: len(w)]]
        state.addmm_(block, w)
    return logits


@_nade.register_fake
def _(x: Tensor, weight: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("pplvi::nade_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, output: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, output and hidden biases, from the last block to the first; states are undone on the way."""
    state, later = torch.addmm(hidden, x, weight), hidden.new_zeros(hidden.shape)
    columns = torch.arange(BLOCK, device=x.device)
    d_weight, d_output = torch.empty_like(weight), torch.empty_like(output)
    for low in reversed(range(0, x.shape[1], BLOCK)):
        block, w, v = _cut(low, x, weight, output)
        size = len(w)
        state.addmm_(block, w, alpha=-1)
        runs = _Runs.of(block)
        h = torch.addmm(state[runs.datum], runs.seen, w).sigmoid_()
        d_logits = grad.new_zeros(len(h), size)
        d_logits[runs.place, columns[:size]] = grad[:, low : low + size]
        d_output[low : low + size] = d_logits.T @ h
        d_state = torch.ops.aten.sigmoid_backward(d_logits @ v, h)
        d_weight[low : low + size] = torch.addmm(block.T @ later, runs.seen.T, d_state)
        later.index_add_(0, runs.datum, d_state)
    return d_weight, d_output, later


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, output: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(output), hidden.new_empty(hidden.shape)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
    return None, *_backward(grad.contiguous(), *ctx.saved_tensors)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_nade.register_autograd(_differentiate, setup_context=_remember)


def _one_by_one(operator: Any, info: Any, dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> list[Any]:
    def row(k: int) -> list[Tensor]:
        return [x if dim is None else x.select(dim, k) for x, dim in zip(inputs, dims, strict=True)]

    return [operator(*row(k)) for k in range(info.batch_size)]


@_nade.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
    return torch.stack(_one_by_one(_nade, info, dims, inputs)), 0


@_backward.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    rows = _one_by_one(_backward, info, dims, inputs)
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0, 0, 0)


def nade_logits(x: Tensor, weight: Tensor, output: Tensor, hidden: Tensor) -> Tensor:
    r"""Log odds of every pixel given those before it, without visible biases, ``(N, D)``.

    .. math:: \ell_{nd} = V_d \cdot \sigma\Big(c_n + \sum_{i < d} x_{ni} W_i\Big)

    Hidden states change only where a pixel is on, so that a block of pixels needs one state for each run of zeros. The
    gradient works through the blocks backwards and keeps no state between. Data get no gradient.

    Source: Larochelle & Murray (2011), "The neural autoregressive distribution estimator".

    :param x: binary data, ``(N, D)``.
    :param weight: ``W``, ``(D, H)``.
    :param output: ``V``, ``(D, H)``.
    :param hidden: ``c``, ``(N, H)``.

    >>> weight, ones = torch.tensor([[9.0], [0.0]]), torch.ones(2, 1)
    >>> nade_logits(torch.ones(1, 2), weight, ones, torch.zeros(1, 1)).round(decimals=2)
    tensor([[0.5000, 1.0000]])
    """
    found: Tensor = _nade(x, weight, output, hidden)
    return found
