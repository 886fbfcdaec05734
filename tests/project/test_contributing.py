"""The worked examples of CONTRIBUTING.md run in order, in one namespace."""

import doctest
import re
from pathlib import Path

import pyro
import pytest
import torch

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def examples() -> dict:
    """The names that the blocks define."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    namespace = {"__name__": "contributing"}
    for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL):
        exec(compile(block, str(CONTRIBUTING), "exec"), namespace)
    return namespace


def test_the_doctest_of_an_example_passes(examples):
    (found,) = doctest.DocTestFinder().find(examples["TruncatedBound"], "TruncatedBound", globs=examples)
    assert doctest.DocTestRunner().run(found) == (0, 3)


def test_the_truncated_bound_is_below_the_importance_weighted_one(examples):
    step = examples["Step"].from_proposal(log_target=torch.tensor([0.0, -1.0, 5.0]), log_forward=torch.zeros(3))
    weights = torch.tensor([0.0, -1.0, 5.0]).exp()
    cut = weights.clamp(max=3**0.5 * weights.mean())
    assert -examples["TruncatedBound"]()(step).value == pytest.approx(float(cut.mean().log()))
