"""Functions that run for all particles at once, inside ``vmap``, are those of each particle."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pplvi.programs.randomness import OutOfPlace, carried

X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
FUNCTIONS = {
    "a vector": lambda b: X @ b,
    "a column": lambda b: (X @ b.unsqueeze(-1)).squeeze(-1),
    "mv": lambda b: torch.mv(X, b),
    "matmul": lambda b: X.matmul(b),
    "a matrix of each": lambda b: X @ torch.stack([b, 2 * b], -1),
    "a matrix of each particle": lambda b: (X * b) @ b,
    "a vector on the left": lambda b: b @ X.mT,
    "Bernoulli": lambda b: dist.Bernoulli(logits=X @ b, validate_args=False).log_prob(Y),
    "Bernoulli of draws": lambda b: dist.Bernoulli(logits=X[:, 0], validate_args=False).log_prob((b[0] + Y).sigmoid()),
    "Bernoulli of a number": lambda b: dist.Bernoulli(logits=b[0], validate_args=False).log_prob(Y),
    "a weighted loss": lambda b: torch.nn.functional.binary_cross_entropy_with_logits(X @ b, Y, weight=Y),
}


class Counted(TorchDispatchMode):
    """Counts the calls of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_each(name):
    function = FUNCTIONS[name]
    draws = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)
    with carried(OutOfPlace()):
        found = torch.func.vmap(function)(draws)
    expected = torch.stack([function(b) for b in draws])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    gradients = [torch.autograd.grad((weights @ x.reshape(4, -1)).sum(), draws)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_gradients_inside_vmap_are_those_of_each():
    function = torch.func.grad(lambda b: FUNCTIONS["Bernoulli"](b).sum())
    draws = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with carried(OutOfPlace()):
        found = torch.func.vmap(function)(draws)
    torch.testing.assert_close(found, torch.stack([function(b) for b in draws]), rtol=1e-12, atol=1e-13)


def test_a_carried_regression_takes_one_product():
    """And its density few passes: no product of batches, which reads the data once for each particle."""

    def program(b):
        with pyro.plate("data", 7):
            return pyro.sample("y", dist.Bernoulli(logits=(X @ b.unsqueeze(-1)).squeeze(-1)), obs=Y)

    def density(b):
        return pyro.poutine.trace(program).get_trace(b).log_prob_sum()

    with carried(OutOfPlace()), Counted() as counted:
        torch.func.vmap(density)(torch.randn(4, 3, dtype=torch.float64))
    assert "aten.bmm" not in counted.names
    assert counted.names.count("aten.mm") == 1
    assert counted.names.count("aten.binary_cross_entropy_with_logits") <= 1
    assert "aten.clamp_min" not in counted.names


def test_a_product_that_is_written_into_a_tensor_is_as_elsewhere():
    def program(b):
        torch.matmul(X.mT, X, out=(square := X.new_empty(3, 3)))
        return square @ b

    draws = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with carried(OutOfPlace()):
        found = torch.func.vmap(program)(draws)
    torch.testing.assert_close(found, draws @ X.mT @ X, rtol=1e-12, atol=1e-12)
